"""Entries of the effect matrix as plain numbers, scaled to a dose of examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from system.influence.estimate.matrix import EffectMatrix
from system.report.formatting import interval, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The effect of a dose of `source` on `target`, in nats per response token."""

    target: str
    source: str
    effect: float
    se: float
    low: float
    high: float
    shrunk: float
    gamma: float | None
    gamma_low: float | None
    gamma_high: float | None
    is_identifiable: bool
    needed: int | None
    """Total replications that would make gamma identifiable; None: unknown, or no number would."""
    is_own: bool
    is_appended: bool
    """Appended to an earlier measurement, whose base had no rows of the source or the target."""

    @property
    def mark(self) -> str:
        """The mark behind a number that was appended; empty for others."""
        return " †" if self.is_appended else ""

    @property
    def has_sign(self) -> bool:
        """Whether the interval of gamma excludes zero."""
        if self.gamma_low is None or self.gamma_high is None:
            return False
        return self.gamma_low > 0 or self.gamma_high < 0

    @property
    def gamma_text(self) -> str:
        """Gamma to two decimals, or a dash."""
        return signed(self.gamma, 2)

    @property
    def gamma_interval(self) -> str:
        """The interval of gamma, or a dash."""
        return interval(self.gamma_low, self.gamma_high, 2)

    @property
    def identifiable_text(self) -> str:
        """`yes`, `no`, or how many replications are needed to make gamma identifiable."""
        if self.is_identifiable:
            return "yes"
        return "no" if self.needed is None else f"no; with {self.needed} replications"


def entry_grid(
    matrix: EffectMatrix,
    targets: list[str],
    sources: list[str],
    dose: float,
    needed: list[list[int | None]] | None = None,
) -> list[list[Entry]]:
    """[T][S] entries in the order given, effects for `dose` examples of the source.

    Args:
        matrix: of one direction.
        targets: in the order of the rows.
        sources: in the order of the columns.
        dose: examples.
        needed: replications by pair, in the matrix's own order
        (`system.influence.estimate.identify`).
    """
    rows = [matrix.targets.index(name) for name in targets]
    columns = [matrix.sources.index(name) for name in sources]
    return [
        [
            _entry(matrix, row, column, dose, None if needed is None else needed[row][column])
            for column in columns
        ]
        for row in rows
    ]


def _entry(matrix: EffectMatrix, row: int, column: int, dose: float, needed: int | None) -> Entry:
    def effect(values_TS: np.ndarray) -> float:
        return float(values_TS[row, column]) * dose

    def ratio(values_TS: np.ndarray) -> float | None:
        value = float(values_TS[row, column])
        return value if np.isfinite(value) else None

    return Entry(
        target=matrix.targets[row],
        source=matrix.sources[column],
        effect=effect(matrix.effect_TS),
        se=effect(matrix.effect_se_TS),
        low=effect(matrix.effect_low_TS),
        high=effect(matrix.effect_high_TS),
        shrunk=effect(matrix.shrunk_TS),
        gamma=ratio(matrix.gamma_TS),
        gamma_low=ratio(matrix.gamma_low_TS),
        gamma_high=ratio(matrix.gamma_high_TS),
        is_identifiable=bool(matrix.identifiable_TS[row, column]),
        needed=needed,
        is_own=matrix.targets[row] == matrix.sources[column],
        is_appended=bool(matrix.appended_TS[row, column]),
    )
