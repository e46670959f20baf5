"""Compares two finished influence stages and their costs (`instructmix compare`).

The two may differ in estimator, size of the proxy model, dose or seed.  A cheap estimate should not
be trusted before it was compared with an expensive one.  Entries are matched by name; only targets
and sources that both stages have are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from system import storage
from system.errors import ConfigError, DataError
from system.influence.design.doses import in_words
from system.influence.estimate.agreement import Agreement, Correlation, compare
from system.influence.estimate.matrix import EffectMatrix
from system.rundir import RunDir
from system.stages import STAGE_FOLDERS

MIN_CATEGORIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A finished influence stage."""

    name: str
    summary: dict[str, Any]
    matrices: dict[str, EffectMatrix]
    """By direction; with several doses, at the largest."""

    @property
    def token_equivalents(self) -> float:
        """The cost of the stage."""
        return self.summary["cost"]["token_equivalents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionComparison:
    """Two effect matrices of one direction, and how well they agree."""

    direction: str
    first: EffectMatrix
    second: EffectMatrix
    """Both have only the targets and sources that they share, in the order of the first."""
    agreement: Agreement
    worth_agreement: float
    """Rank correlation of the worth of the sources; NaN if all have the same worth."""
    scale: float
    """Root mean square effect of the second divided by that of the first; NaN if that is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The comparison of two influence stages."""

    first: Measured
    second: Measured
    directions: tuple[DirectionComparison, ...]

    @property
    def cost_ratio(self) -> float:
        """Cost of the second divided by the cost of the first."""
        return self.second.token_equivalents / self.first.token_equivalents


def read_measured(run_dir_uri: str) -> Measured:
    """Reads the influence stage of a run directory.

    Raises:
        ConfigError: its stage `influence` is not finished.
    """
    run_dir = RunDir(run_dir_uri)
    record = run_dir.read_record(STAGE_FOLDERS["influence"])
    if record is None:
        raise ConfigError(
            f"{run_dir_uri}: expected a run whose stage `influence` is finished, found none; "
            "finish it with `instructmix run CONFIG --until influence`"
        )
    uri = run_dir.output_uri(record, "matrix")
    table = storage.read_table(uri)
    summary = storage.read_json(run_dir.output_uri(record, "summary"))
    directions = summary["directions"]
    return Measured(
        name=run_dir_uri,
        summary=summary,
        matrices={d: EffectMatrix.from_table(table, direction=d, where=uri) for d in directions},
    )


def compare_runs(first_uri: str, second_uri: str) -> Comparison:
    """Compares two influence stages, direction by direction.

    Raises:
        ConfigError: a run has no finished influence stage, or they measured no common direction.
        DataError: they have fewer than three categories in common.
    """
    first, second = read_measured(first_uri), read_measured(second_uri)
    common = [direction for direction in first.matrices if direction in second.matrices]
    if not common:
        raise ConfigError(
            f"expected a direction that both measured, found {list(first.matrices)} in {first_uri} "
            f"and {list(second.matrices)} in {second_uri}; see influence.directions"
        )
    return Comparison(
        first=first,
        second=second,
        directions=tuple(
            _compare_direction(name, first.matrices[name], second.matrices[name]) for name in common
        ),
    )


def describe_comparison(first_uri: str, second_uri: str) -> str:
    """The comparison as text: agreement by direction, and the costs.

    Raises:
        ConfigError: a run has no finished influence stage, or they measured no common direction.
        DataError: they have fewer than three categories in common.
    """
    comparison = compare_runs(first_uri, second_uri)
    lines = [describe_measured(comparison.first), describe_measured(comparison.second)]
    for part in comparison.directions:
        lines += [
            "",
            f"{part.direction}: {len(part.first.targets)} targets x {len(part.first.sources)} "
            "sources in common",
            *_agreement_lines(part.agreement),
            f"  worth of the categories (mean effect on all targets): {part.worth_agreement:+.2f}",
            f"  size of effects, second per first: {part.scale:.2f}",
        ]
    lines += ["", f"cost, second per first: {comparison.cost_ratio:.3f}"]
    return "\n".join(lines)


def shared_part(first: EffectMatrix, second: EffectMatrix) -> tuple[EffectMatrix, EffectMatrix]:
    """Reduces both matrices to their common targets and sources, in the order of the first.

    Raises:
        DataError: fewer than three categories in common.
    """
    targets = tuple(name for name in first.targets if name in second.targets)
    sources = tuple(name for name in first.sources if name in second.sources)
    if min(len(targets), len(sources)) < MIN_CATEGORIES:
        raise DataError(
            f"expected at least {MIN_CATEGORIES} targets and sources that both measured, found "
            f"targets {list(targets)} and sources {list(sources)}; were the categories renamed?"
        )
    return first.part(targets, sources), second.part(targets, sources)


def describe_measured(measured: Measured) -> str:
    """One line of text: run, estimator, size and cost."""
    summary, cost = measured.summary, measured.summary["cost"]
    doses = in_words(summary.get("doses", {}).get("asked", ()))
    return (
        f"{measured.name}: {summary['estimator']}, {summary['replications']} replications, "
        f"{cost['runs']} runs, {cost['token_equivalents'] / 1e6:.2f} M forward + backward tokens"
        f"{f'; {doses}, compared at the largest' if doses else ''}"
    )


def _compare_direction(
    direction: str, first: EffectMatrix, second: EffectMatrix
) -> DirectionComparison:
    one, other = shared_part(first, second)
    return DirectionComparison(
        direction=direction,
        first=one,
        second=other,
        agreement=compare(one, other),
        worth_agreement=_worth_agreement(one, other),
        scale=_scale(one, other),
    )


def _agreement_lines(agreement: Agreement) -> list[str]:
    median = agreement.target_rank_median
    return [
        f"  rank correlation over all pairs: {_interval(agreement.rank)}",
        f"  linear correlation: {_interval(agreement.linear)}",
        f"  rank correlation within a target, median over targets: {median:+.2f}",
        f"  same sign: {agreement.sign:.0%} of pairs",
    ]


def _interval(correlation: Correlation) -> str:
    if not np.isfinite(correlation.low):
        return f"{correlation.value:+.2f}"
    return f"{correlation.value:+.2f} [{correlation.low:+.2f}, {correlation.high:+.2f}]"


def _worth_agreement(first: EffectMatrix, second: EffectMatrix) -> float:
    one_S, other_S = first.effect_TS.mean(axis=0), second.effect_TS.mean(axis=0)
    if np.ptp(one_S) == 0 or np.ptp(other_S) == 0:
        return float("nan")
    return float(stats.spearmanr(one_S, other_S)[0])  # pyright: ignore


def _scale(first: EffectMatrix, second: EffectMatrix) -> float:
    """Ratio of the root mean square effects, own-category effects included."""
    size = np.sqrt(np.mean(first.effect_TS**2))
    return float(np.sqrt(np.mean(second.effect_TS**2)) / size) if size > 0 else float("nan")
