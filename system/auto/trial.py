"""Chooses the design of `auto`: the one that reaches the same error at the lowest cost.

Every design of `influence.auto.designs` makes its first round on the same rows and schedules.
Errors fall with the square root of the cost, so squared error times cost does not depend on how
much is measured.  The design with the smallest product is chosen.

Theory cannot decide this.  Every run of a weighing design informs about every effect: with equal
noise in all runs, N runs give an effect the variance 4 s^2 / N for any number of sources (Hotelling
1944), while one dose at a time gives 2 s^2 (S + 1) / N.  But the noise of a run grows with the
number of doses that it switches, and doses need not be additive.  On eight real categories the
weighing design had 1.4 times the error of `branch` at the same cost, and more on nine planted
categories (`tests/benchmarks/influence.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from system.influence.estimate.matrix import EffectMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The first round of one design."""

    design: str
    precision: float
    """Median standard error of a dose's off-diagonal effect in the worse direction, in the unit of
    the effects."""
    token_equivalents: float
    trained_tokens: int
    tuner_hours: float

    @property
    def price(self) -> float:
        """Token equivalents that an error of one unit would cost."""
        return self.precision**2 * self.token_equivalents


def typical_error(matrices: Mapping[str, EffectMatrix]) -> float:
    """Median standard error of a dose's off-diagonal effect, in the worse direction."""
    return max(
        float(np.median((matrix.effect_se_TS * matrix.dose_S)[~matrix.own_TS]))
        for matrix in matrices.values()
    )


def cheapest(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest price; of equal ones the first."""
    return min(trials, key=lambda trial: trial.price)


def describe_choice(trials: Sequence[Trial], unit: str) -> str:
    """One line of text about the choice.

    Args:
        trials: of all designs.
        unit: short name of the unit of effects.
    """
    chosen = cheapest(trials)
    parts = [
        f"{trial.design}: typical error {trial.precision:.4f} {unit} for "
        f"{trial.token_equivalents / 1e6:.2f} M token equivalents"
        + (
            f", {trial.price / chosen.price:.1f} times the price"
            if trial.price > chosen.price > 0
            else ""
        )
        for trial in trials
    ]
    return f"the design is {chosen.design} ({'; '.join(parts)})"
