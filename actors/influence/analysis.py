"""Estimates effects from the scores of an influence stage, for all or the first replications.

scores/*.parquet ──> losses ──> paired differences ──> estimates, by unit and direction
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from actors.stage import StageContext
from system import storage
from system.config import InfluenceConfig
from system.influence.append.append import flag_appended, keep_earlier_entries
from system.influence.append.earlier import EarlierResult
from system.influence.design.accuracy_targets import check_some_vary
from system.influence.design.design import Design
from system.influence.estimate.dose_views import design_at, levels_table, losses_at
from system.influence.estimate.matrix import DataUnit, EffectMatrix, Estimate, estimate_effects
from system.influence.estimate.measurements import (
    Losses,
    Measurements,
    collect_losses,
    paired_differences,
)
from system.influence.measure.first_order import predicted_scores

_UNITS: tuple[DataUnit, ...] = ("examples", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The measurements and estimates at one dose."""

    measured: dict[str, Measurements]
    """By direction."""
    estimates: dict[str, dict[str, Estimate]]
    """By unit of data, then by direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The scores of a design, and what is estimated from them."""

    scores: dict[str, pa.Table]
    losses: Losses
    levels: tuple[Level, ...]
    """By ascending dose; one level if there is one dose."""

    @property
    def largest(self) -> Level:
        """The level of the largest dose."""
        return self.levels[-1]

    def matrix_table(self) -> pa.Table:
        """`matrix.parquet`: directions outermost, then units, then doses."""
        return pa.concat_tables(
            levels_table([level.estimates[unit][direction].matrix for level in self.levels])
            for direction in self.largest.measured
            for unit in _UNITS
        )


def analyse(context: StageContext, design: Design) -> Analysis:
    """Reads the scores of all runs of a design and estimates its effects at every dose.

    In an appended design the entries of the earlier result keep their published values
    (`system.influence.append.append.keep_earlier_entries`).

    Raises:
        DataError: all runs gave the same answers, so nothing can be measured.
    """
    config = context.config.influence
    joint = _checked(config, estimate_attempt(config, context.attempt, design))
    if context.appends_to is None:
        return joint
    attempts = context.attempt.rsplit("/", 1)[0]
    return _keep_earlier(config, joint, design, EarlierResult(attempts, context.appends_to))


def _keep_earlier(
    config: InfluenceConfig, joint: Analysis, design: Design, earlier: EarlierResult
) -> Analysis:
    """Puts the entries of the earlier result into a joint analysis of all scores."""
    before = estimate_attempt(config, earlier.uri, earlier.design)
    if earlier.before is not None:
        before = _keep_earlier(config, before, earlier.design, earlier.before)
    published = before.largest.estimates
    estimates = {
        unit: {
            direction: replace(
                estimate,
                matrix=keep_earlier_entries(
                    design, estimate.matrix, published[unit][direction].matrix
                ),
            )
            for direction, estimate in by_direction.items()
        }
        for unit, by_direction in joint.largest.estimates.items()
    }
    # There is one level: `append_refused` rejects designs with several doses.
    return replace(joint, levels=(replace(joint.largest, estimates=estimates),))


def estimate_attempt(config: InfluenceConfig, attempt: str, design: Design) -> Analysis:
    """Estimates effects from the scores of one attempt, for the replications of `design`.

    If all runs of the first replications gave the same answers, that is no error yet, because later
    replications may differ.
    """
    scores = {
        run.name: storage.read_table(storage.join(attempt, "scores", f"{run.name}.parquet"))
        for run in design.all_runs
        if run.kind != "warm"
    }
    by_gradient = design.estimator == "gradient"
    losses = collect_losses(design, predicted_scores(design, scores) if by_gradient else scores)
    views = [(design_at(design, dose), losses_at(design, losses, dose)) for dose in design.doses]
    levels = tuple(_level(config, *view) for view in views or [(design, losses)])
    return Analysis(scores=scores, losses=losses, levels=levels)


def _checked(config: InfluenceConfig, analysis: Analysis) -> Analysis:
    """Checks the analysis of a complete design: with accuracy, some answer must vary."""
    if config.metric == "accuracy":
        check_some_vary(analysis.losses.loss)
    return analysis


def _level(config: InfluenceConfig, design: Design, losses: Losses) -> Level:
    is_binary = config.metric == "accuracy"
    measured = {
        name: paired_differences(design, losses, name, is_binary=is_binary)
        for name in design.directions
    }
    estimates = {
        unit: {
            direction: _flagged(
                design,
                estimate_effects(
                    measurements,
                    unit=unit,
                    confidence=config.confidence,
                    gamma_floor=config.gamma_floor,
                    gamma_max_width=config.gamma_max_width,
                ),
            )
            for direction, measurements in measured.items()
        }
        for unit in _UNITS
    }
    return Level(measured=measured, estimates=dict(estimates))


def _flagged(design: Design, estimate: Estimate) -> Estimate:
    return replace(estimate, matrix=flag_appended(design, estimate.matrix))


def largest_dose_matrices(context: StageContext, design: Design) -> dict[str, EffectMatrix]:
    """The effects of a design per example, by direction; with several doses, at the largest.

    Raises:
        DataError: all runs gave the same answers, so nothing can be measured.
    """
    config = context.config.influence
    return largest_matrices(_checked(config, estimate_attempt(config, context.attempt, design)))


def largest_matrices(analysis: Analysis) -> dict[str, EffectMatrix]:
    """The effects of the largest dose per example, by direction."""
    estimates: Mapping[str, Estimate] = analysis.largest.estimates["examples"]
    return {direction: estimate.matrix for direction, estimate in estimates.items()}
