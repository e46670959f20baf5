"""report.json: the numbers of the report page in a form for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from system.influence.estimate.agreement import json_number
from system.influence.estimate.comparison import Comparison
from system.influence.estimate.matrix import EffectMatrix
from system.report.heatmap import clustered_order
from system.report.influence_section import reference_dose
from system.report.run_section import total_seconds
from system.report.verdict import give_verdict
from system.report.view import Influence, RunView

FORMAT = 1


def report_json(view: RunView) -> dict[str, Any]:
    """Everything that the page shows, as JSON values; null if a stage has not run.

    Keys: `format`, `run_dir`, `seconds`, `verdict`, `mix`, `sweep`, `influence` (matrices as rows
    of targets, effects in nats per response token per example, null if unknown), `taxonomy`,
    `comparisons` (agreement with other runs, by direction), `curriculum`, `training` (one record
    per step), `evaluation`, `corpus`, `tagging`, `stages`, `config`.
    """
    return {
        "format": FORMAT,
        "run_dir": view.run_dir,
        "seconds": round(total_seconds(view), 1),
        "verdict": asdict(give_verdict(view)),
        "mix": None if view.mix is None else asdict(view.mix),
        "sweep": view.sweep,
        "influence": None if view.influence is None else _influence(view.influence),
        "comparisons": [_comparison(comparison) for comparison in view.comparisons],
        "taxonomy": None if view.taxonomy is None else view.taxonomy.to_json(),
        "curriculum": None if view.curriculum is None else view.curriculum.to_json(),
        "training": view.training,
        "evaluation": None if view.evaluation is None else view.evaluation.summary,
        "corpus": _corpus(view),
        "tagging": view.tagging,
        "stages": [asdict(record) for record in view.records.values()],
        "config": view.config,
    }


def _corpus(view: RunView) -> dict[str, Any] | None:
    if view.corpus is None:
        return None
    manifest = asdict(view.corpus)
    del manifest["shards"]
    return manifest


def _influence(influence: Influence) -> dict[str, Any]:
    targets, sources = clustered_order(list(influence.matrices.values()))
    return {
        "order": {"targets": targets, "sources": sources},
        "reference_dose": reference_dose(influence),
        "matrices": {name: _matrix(matrix) for name, matrix in influence.matrices.items()},
        "summary": influence.summary,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "run_dir": comparison.second.name,
        "estimator": comparison.second.summary["estimator"],
        "cost_ratio": comparison.cost_ratio,
        "directions": {
            part.direction: {
                **part.agreement.to_json(),
                "worth": json_number(part.worth_agreement),
                "scale": json_number(part.scale),
            }
            for part in comparison.directions
        },
    }


def _matrix(matrix: EffectMatrix) -> dict[str, Any]:
    return {
        "estimator": matrix.estimator,
        "unit": matrix.unit,
        "targets": list(matrix.targets),
        "sources": list(matrix.sources),
        "dose": matrix.dose_S.tolist(),
        "effect": matrix.effect_TS.tolist(),
        "effect_se": matrix.effect_se_TS.tolist(),
        "effect_low": _nullable(matrix.effect_low_TS),
        "effect_high": _nullable(matrix.effect_high_TS),
        "effect_shrunk": matrix.shrunk_TS.tolist(),
        "gamma": _nullable(matrix.gamma_TS),
        "gamma_low": _nullable(matrix.gamma_low_TS),
        "gamma_high": _nullable(matrix.gamma_high_TS),
        "identifiable": matrix.identifiable_TS.tolist(),
    }


def _nullable(values_TS: np.ndarray) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values_TS]
