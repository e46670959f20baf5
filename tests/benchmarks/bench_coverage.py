"""Whether intervals hold under real replication, not only on a simulator.

    python bench_influence.py --store DIR --data shared/data/instructions \
        --measure retrain-reference --replications 24
    python bench_coverage.py --store DIR --groups 8 4

The replications are dealt out to groups, and so are the held-out rows: an estimate of one group
shares neither a training nor a row with the others.  Its interval is held against the mean of all
other groups.  That mean has an error of its own, so intervals are widened by it
(`sqrt(1 + se_others^2 / se^2)`) before it is asked whether they cover; beside it stands the share
that cover as they are.  Groups share their truth with each other, so shares of few groups scatter:
the standard error is taken over groups.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_influence import REFERENCE, Measured, joined, measured_with, stored

from system.influence.estimate.matrix import EffectMatrix, estimate_effects
from system.influence.estimate.measurements import Measurements


@dataclass(frozen=True)
class Coverage:
    """Of the intervals of one way to deal out."""

    groups: int
    replications: int
    """Of a group."""
    rows: int
    """Held-out rows of a group and target."""
    off_diagonal: tuple[float, float]
    """Share of covering intervals, widened, and its standard error over groups."""
    own: tuple[float, float]
    as_they_are: float
    """Off the diagonal, not widened."""


def part(measured: Measurements, replications: list[int], group: int, groups: int) -> Measurements:
    """Some replications on every `groups`-th held-out row, or on all others (group < 0)."""
    chosen = measured.replications(replications)
    rows = []
    for row_RSH in chosen.differences:
        turn_H = np.arange(row_RSH.shape[2]) % groups
        rows.append(row_RSH[:, :, turn_H != ~group if group < 0 else turn_H == group])
    return replace(chosen, differences=tuple(rows))


def coverage(measured: Measurements, groups: int) -> Coverage:
    """How often the interval of a group covers the mean of the others."""
    size = measured.num_replications // groups
    found: dict[str, list[float]] = {"off": [], "own": [], "plain": []}
    for group in range(groups):
        own = list(range(group * size, (group + 1) * size))
        others = [r for r in range(groups * size) if r not in own]
        one = estimate_effects(part(measured, own, group, groups)).matrix
        truth = estimate_effects(part(measured, others, ~group, groups)).matrix
        wide = covers(one, truth, is_widened=True)
        found["off"].append(float(wide[~one.own_TS].mean()))
        found["own"].append(float(wide[one.own_TS].mean()))
        found["plain"].append(float(covers(one, truth, is_widened=False)[~one.own_TS].mean()))
    return Coverage(
        groups=groups,
        replications=size,
        rows=measured.differences[0].shape[2] // groups,
        off_diagonal=mean_and_error(found["off"]),
        own=mean_and_error(found["own"]),
        as_they_are=float(np.mean(found["plain"])),
    )


def covers(one: EffectMatrix, truth: EffectMatrix, *, is_widened: bool) -> np.ndarray:
    """[T, S] bool."""
    half_TS = (one.effect_high_TS - one.effect_low_TS) / 2.0
    if is_widened:
        half_TS = half_TS * np.sqrt(1.0 + (truth.effect_se_TS / one.effect_se_TS) ** 2)
    return np.abs(one.effect_TS - truth.effect_TS) <= half_TS


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Over groups."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def main() -> None:
    """Prints a line for every way to deal out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 4])
    arguments = parser.parse_args()
    parts: list[Measured] = stored(arguments.store, REFERENCE)
    measured = joined(parts).measurements
    targets, sources = len(measured.targets), len(measured.sources)
    print("  ".join(f"{name}: {value}." for name, value in measured_with().items()))
    print(f"{len(parts)} replications, {targets} targets, {sources} sources, nominal 95 %")
    print("| groups | replications | held-out rows | off the diagonal | own | as they are |")
    print("|---|---|---|---|---|---|")
    for groups in arguments.groups:
        found = coverage(measured, groups)
        cells = [
            str(found.groups),
            str(found.replications),
            str(found.rows),
            *(f"{100 * m:.1f} +- {100 * e:.1f} %" for m, e in (found.off_diagonal, found.own)),
            f"{100 * found.as_they_are:.1f} %",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
