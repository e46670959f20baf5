"""From the scores of an influence stage to its effects: of all replications, or of the first few.

scores/*.parquet ──> losses ──> paired differences ──> estimates, by unit and direction
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from actors.stage import StageContext
from system import storage
from system.influence.accuracy_targets import check_some_vary
from system.influence.design import Design
from system.influence.first_order import predicted_scores
from system.influence.matrix import EffectMatrix, Estimate, estimate_effects
from system.influence.matrix import Unit as DataUnit
from system.influence.measurements import (
    Losses,
    Measurements,
    collect_losses,
    paired_differences,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What the scores of a design say."""

    scores: dict[str, pa.Table]
    losses: Losses
    measured: dict[str, Measurements]
    """By direction."""
    estimates: dict[str, dict[str, Estimate]]
    """By unit of data, then by direction."""


def analyse(context: StageContext, design: Design) -> Analysis:
    """Reads the scores of all runs of a design and estimates its effects."""
    config = context.config.influence
    scores = {
        unit.name: storage.read_table(
            storage.join(context.attempt, "scores", f"{unit.name}.parquet")
        )
        for unit in design.units
        if unit.kind != "warm"
    }
    by_gradient = design.estimator == "gradient"
    losses = collect_losses(design, predicted_scores(design, scores) if by_gradient else scores)
    if config.metric == "accuracy":
        check_some_vary(losses.loss)
    measured = {name: paired_differences(design, losses, name) for name in design.directions}
    units: tuple[DataUnit, ...] = ("examples", "tokens")
    estimates = {
        unit: {
            direction: estimate_effects(
                measurements,
                unit=unit,
                confidence=config.confidence,
                gamma_floor=config.gamma_floor,
                gamma_max_width=config.gamma_max_width,
            )
            for direction, measurements in measured.items()
        }
        for unit in units
    }
    return Analysis(scores=scores, losses=losses, measured=measured, estimates=dict(estimates))


def matrices_of(context: StageContext, design: Design) -> dict[str, EffectMatrix]:
    """The effects of a design per example, by direction."""
    found = analyse(context, design).estimates["examples"]
    return {direction: estimate.matrix for direction, estimate in found.items()}
