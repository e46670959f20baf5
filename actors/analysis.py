"""From the scores of an influence stage to its effects: of all replications, or of the first few.

scores/*.parquet ──> losses ──> paired differences ──> estimates, by unit and direction
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa

from actors.stage import StageContext
from system import storage
from system.config import InfluenceConfig
from system.influence.accuracy_targets import check_some_vary
from system.influence.append import flag_appended, overlay
from system.influence.design import Design
from system.influence.earlier import Earlier
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
    """Reads the scores of all runs of a design and estimates its effects.

    What an appended design was told before stays as it was told (`system.influence.append`).
    """
    config = context.config.influence
    found = _estimated(config, context.attempt, design)
    if context.appends_to is None:
        return found
    attempts = context.attempt.rsplit("/", 1)[0]
    return _on_earlier(config, found, design, Earlier(attempts, context.appends_to))


def _on_earlier(
    config: InfluenceConfig, found: Analysis, design: Design, earlier: Earlier
) -> Analysis:
    known = _estimated(config, earlier.uri, earlier.design)
    if earlier.before is not None:
        known = _on_earlier(config, known, earlier.design, earlier.before)
    estimates = {
        unit: {
            direction: replace(
                estimate,
                matrix=overlay(design, estimate.matrix, known.estimates[unit][direction].matrix),
            )
            for direction, estimate in by_direction.items()
        }
        for unit, by_direction in found.estimates.items()
    }
    return replace(found, estimates=estimates)


def _estimated(config: InfluenceConfig, attempt: str, design: Design) -> Analysis:
    """The estimates from the scores of one attempt alone."""
    scores = {
        unit.name: storage.read_table(storage.join(attempt, "scores", f"{unit.name}.parquet"))
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
    config = context.config.influence
    found = _estimated(config, context.attempt, design).estimates["examples"]
    return {name: flag_appended(design, estimate.matrix) for name, estimate in found.items()}
