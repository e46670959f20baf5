"""Whether two influence stages tell the same story, and what each cost: `instructmix compare`.

For two estimators, two sizes of the proxy model, two doses, two seeds: a cheap estimate is worth
nothing until it is compared with an expensive one.  Entries are matched by name; only targets and
sources that both have are compared.
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

LEAST_CATEGORIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An influence stage that is done."""

    name: str
    summary: dict[str, Any]
    matrices: dict[str, EffectMatrix]
    """By direction; of several doses, the largest."""

    @property
    def token_equivalents(self) -> float:
        """What it cost."""
        return self.summary["cost"]["token_equivalents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionComparison:
    """Two measurements of one direction."""

    direction: str
    first: EffectMatrix
    second: EffectMatrix
    """Both cut to what they have in common, in the order of the first."""
    agreement: Agreement
    worth: float
    """Rank correlation of the categories' mean effects on all targets; NaN where all are alike."""
    scale: float
    """Root mean square effect of the second per that of the first; NaN where the first has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two influence stages beside each other."""

    first: Measured
    second: Measured
    directions: tuple[DirectionComparison, ...]

    @property
    def cost_ratio(self) -> float:
        """Token equivalents of the second per one of the first."""
        return self.second.token_equivalents / self.first.token_equivalents


def read_measured(run_dir_uri: str) -> Measured:
    """The influence stage of a run directory.

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
    """Two influence stages, direction by direction.

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
    """Agreement by direction, and the costs, as text.

    Raises:
        ConfigError: a run has no finished influence stage, or they measured no common direction.
        DataError: they have fewer than three categories in common.
    """
    found = compare_runs(first_uri, second_uri)
    lines = [describe_measured(found.first), describe_measured(found.second)]
    for part in found.directions:
        lines += [
            "",
            f"{part.direction}: {len(part.first.targets)} targets x {len(part.first.sources)} "
            "sources in common",
            *_agreement_lines(part.agreement),
            f"  worth of the categories (mean effect on all targets): {part.worth:+.2f}",
            f"  size of effects, second per first: {part.scale:.2f}",
        ]
    lines += ["", f"cost, second per first: {found.cost_ratio:.3f}"]
    return "\n".join(lines)


def shared_part(first: EffectMatrix, second: EffectMatrix) -> tuple[EffectMatrix, EffectMatrix]:
    """Both matrices, cut to the targets and sources of both, in the order of the first.

    Raises:
        DataError: fewer than three categories in common.
    """
    targets = tuple(name for name in first.targets if name in second.targets)
    sources = tuple(name for name in first.sources if name in second.sources)
    if min(len(targets), len(sources)) < LEAST_CATEGORIES:
        raise DataError(
            f"expected at least {LEAST_CATEGORIES} targets and sources that both measured, found "
            f"targets {list(targets)} and sources {list(sources)}; were the categories renamed?"
        )
    return first.part(targets, sources), second.part(targets, sources)


def describe_measured(measured: Measured) -> str:
    """Run, estimator, size and cost in a line."""
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
        worth=_worth(one, other),
        scale=_scale(one, other),
    )


def _agreement_lines(found: Agreement) -> list[str]:
    return [
        f"  rank correlation over all pairs: {_interval(found.rank)}",
        f"  linear correlation: {_interval(found.linear)}",
        f"  rank correlation within a target, median over targets: {found.target_rank_median:+.2f}",
        f"  same sign: {found.sign:.0%} of pairs",
    ]


def _interval(correlation: Correlation) -> str:
    if not np.isfinite(correlation.low):
        return f"{correlation.value:+.2f}"
    return f"{correlation.value:+.2f} [{correlation.low:+.2f}, {correlation.high:+.2f}]"


def _worth(first: EffectMatrix, second: EffectMatrix) -> float:
    one_S, other_S = first.effect_TS.mean(axis=0), second.effect_TS.mean(axis=0)
    if np.ptp(one_S) == 0 or np.ptp(other_S) == 0:
        return float("nan")
    return float(stats.spearmanr(one_S, other_S)[0])  # pyright: ignore


def _scale(first: EffectMatrix, second: EffectMatrix) -> float:
    """Ratio of the root mean square effects, own ones included."""
    size = np.sqrt(np.mean(first.effect_TS**2))
    return float(np.sqrt(np.mean(second.effect_TS**2)) / size) if size > 0 else float("nan")
