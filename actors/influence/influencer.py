"""Stage `influence`: draws a design, measures its runs, estimates the effect matrix.

designer ──> design.json ──> measuring ──> scores/*.parquet ──> analysis ──> matrix.parquet,
plans/*.arrow                    ^                 │                  replicates.parquet,
(`auto`: design_trial, then      └── rounds <──────┘                  summary.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from actors.influence.analysis import analyse, largest_dose_matrices
from actors.influence.appender import AppendRunner, draw_appended
from actors.influence.design_trial import choose_design
from actors.influence.designer import answer_tokens, draw_design
from actors.influence.intervention_runner import TUNERS, InterventionRunner
from actors.influence.rounds import measure_in_rounds
from actors.stage import StageContext, StageResult
from system import storage
from system.auto.rounds import Round
from system.auto.trial import Trial, describe_choice
from system.data.corpus import Corpus
from system.influence.append.append_summary import append_summary
from system.influence.design.design import Design
from system.influence.estimate.dose_summary import dose_lines, summarise_doses
from system.influence.estimate.dose_views import levels_replicates
from system.influence.estimate.summary import (
    Cost,
    result_lines,
    short_unit,
    summarise,
)
from system.mix.question import importance_weights


def run(context: StageContext) -> StageResult:
    """Measures how a dose of every category changes the loss on every target."""
    if context.appends_to is not None:
        planned = draw_appended(context)
        AppendRunner(context, planned).run()
        context.cluster.close_pool(TUNERS)
        return _estimate(context, planned, [], "")
    if context.config.influence.estimator == "auto":
        return _run_auto(context)
    planned = draw_design(context)
    InterventionRunner(context, planned).run()
    context.cluster.close_pool(TUNERS)
    return _estimate(context, planned, [], "")


def _run_auto(context: StageContext) -> StageResult:
    """Chooses a design, then measures in rounds until there is a reason to stop."""
    context, trials = choose_design(context)
    planned = draw_design(context)
    others = [trial for trial in trials if trial.design != planned.estimator]
    rounds, reason = measure_in_rounds(
        context,
        planned,
        lambda design: InterventionRunner(context, design).run(),
        lambda design: largest_dose_matrices(context, design),
        spent_tokens=sum(trial.trained_tokens for trial in others),
        spent_hours=sum(trial.tuner_hours for trial in others),
    )
    context.cluster.close_pool(TUNERS)
    return _estimate(context, planned.first(rounds[-1].replications), rounds, reason, trials)


def _uri(context: StageContext, *parts: str) -> str:
    return storage.join(context.attempt, *parts)


def _estimate(
    context: StageContext,
    design: Design,
    rounds: Sequence[Round],
    reason: str,
    trials: Sequence[Trial] = (),
) -> StageResult:
    config = context.config.influence
    storage.write_json(_uri(context, "design.json"), design.to_json())
    analysis = analyse(context, design)
    storage.write_table(_uri(context, "matrix.parquet"), analysis.matrix_table())
    by_example = [level.estimates["examples"] for level in analysis.levels]
    storage.write_table(_uri(context, "replicates.parquet"), levels_replicates(by_example))
    cost, rejected = _cost(context, design, analysis.scores)
    summary = summarise(
        design,
        config,
        analysis.largest.measured,
        by_example[-1],
        analysis.losses,
        cost,
        rejected,
        importance_weights(
            context.config.solve,
            tuple(target.name for target in design.targets),
            Corpus.open(context.input("tag", "manifest")).counts("train"),
        ),
    )
    if design.doses:
        summary["doses"] = summarise_doses(
            design.doses, [level.measured for level in analysis.levels], config.confidence
        )
    append = append_summary(design, _trainings(context, design))
    if append is not None:
        summary["append"] = append
    if rounds:
        summary["rounds"] = {"stopped": reason, "rounds": [asdict(item) for item in rounds]}
    chosen = []
    if trials:
        summary["trial"] = [asdict(trial) for trial in trials]
        chosen = [describe_choice(trials, short_unit(summary["unit"]))]
    storage.write_json(_uri(context, "summary.json"), summary)
    return StageResult(
        outputs={
            "design": "design.json",
            "scores": "scores",
            "matrix": "matrix.parquet",
            "replicates": "replicates.parquet",
            "summary": "summary.json",
        },
        counts={
            "sources": len(design.sources),
            "targets": len(design.targets),
            "replications": len(design.replications),
            **asdict(cost),
            "rows dropped": design.dropped,
            "rows rejected by the scorer": len(rejected),
        },
        lines=(
            *([reason] if reason else []),
            *chosen,
            *result_lines(summary),
            *dose_lines(summary),
        ),
    )


def _trainings(context: StageContext, design: Design) -> dict[str, dict[str, Any]]:
    """What the training of every unit took, by its name."""
    return {
        run.name: storage.read_json(_uri(context, "units", f"{run.name}.json"))
        for run in design.all_runs
    }


def _cost(
    context: StageContext, design: Design, scores: Mapping[str, pa.Table]
) -> tuple[Cost, dict[str, str]]:
    """The cost of all runs, from their files; and the held-out rows that some run rejected."""
    stats = list(_trainings(context, design).values())
    heldout = storage.read_table(_uri(context, "heldout.arrow"))
    row_tokens = sum(len(row) for row in heldout.column("input_ids").to_pylist())
    if context.config.influence.metric == "accuracy":  # an upper bound: answers may be shorter
        row_tokens += heldout.num_rows * answer_tokens(context.config)
    rejected: dict[str, str] = {}
    seconds = 0.0
    for table in scores.values():
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        seconds += float(metadata["instructmix.seconds"])
        rejected |= json.loads(metadata["instructmix.rejected"])
    cost = Cost(
        runs=sum(run.kind != "gradient" for run in design.all_runs),
        trained_tokens=sum(item["trained_tokens"] for item in stats),
        gradient_tokens=sum(item.get("gradient_tokens", 0) for item in stats),
        scored_tokens=0 if design.estimator == "gradient" else row_tokens * len(scores),
        train_seconds=sum(item["seconds"] for item in stats),
        score_seconds=seconds,
    )
    return cost, rejected
