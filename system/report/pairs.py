"""One entry of the effect matrix as plain numbers, at a dose that people can picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from system.influence.estimate.matrix import EffectMatrix
from system.report.formatting import interval, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a dose of `source` does to `target`; effects in nats per response token."""

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
    """Replications, in all, that would identify gamma; None: not known, or none would."""
    is_own: bool
    is_appended: bool
    """Measured at an earlier base, without rows of the source or the target."""

    @property
    def mark(self) -> str:
        """What stands behind a number that is appended."""
        return " †" if self.is_appended else ""

    @property
    def has_sign(self) -> bool:
        """Whether gamma's interval leaves out zero."""
        if self.gamma_low is None or self.gamma_high is None:
            return False
        return self.gamma_low > 0 or self.gamma_high < 0

    @property
    def gamma_text(self) -> str:
        """Gamma to two decimals, or a dash."""
        return signed(self.gamma, 2)

    @property
    def gamma_interval(self) -> str:
        """Its interval, or a dash."""
        return interval(self.gamma_low, self.gamma_high, 2)

    @property
    def known(self) -> str:
        """`yes` or `no`: whether gamma may be used, and if not, what it would take."""
        if self.is_identifiable:
            return "yes"
        return "no" if self.needed is None else f"no, by {self.needed} replications"


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
