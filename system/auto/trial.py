"""Which design `auto` goes on with: what an error of the same size costs by each.

Every design of `influence.auto.designs` makes the first round on the same rows and the same
schedules.  Errors fall with the square root of what is spent, so the squared error times the cost
is what a design takes for its precision, however much is bought of it; the smallest goes on.

Theory does not settle it.  A run of a weighing design speaks about every effect, so with one
noise for all runs N runs know an effect with the variance 4 s^2 / N, whatever the number of sources
(Hotelling 1944), where one dose at a time has 2 s^2 (S + 1) / N.  But the noise of a run grows with
what is switched in it, and doses need not add up: on eight real categories the weighing design had
1.4 times the error of branches at the same cost, on nine planted ones more
(`tests/benchmarks/influence.md`).
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
    """Median standard error of a dose's effect off the diagonal, the worse direction's; the unit of
    the effects."""
    token_equivalents: float
    trained_tokens: int
    tuner_hours: float

    @property
    def price(self) -> float:
        """Token equivalents for an error of one unit."""
        return self.precision**2 * self.token_equivalents


def typical_error(matrices: Mapping[str, EffectMatrix]) -> float:
    """Median standard error of a dose's effect off the diagonal, the worse direction's."""
    return max(
        float(np.median((matrix.effect_se_TS * matrix.dose_S)[~matrix.own_TS]))
        for matrix in matrices.values()
    )


def cheapest(trials: Sequence[Trial]) -> Trial:
    """The design whose error costs least; of equal ones the first."""
    return min(trials, key=lambda trial: trial.price)


def describe_choice(trials: Sequence[Trial], unit: str) -> str:
    """For a person.

    Args:
        trials: all designs.
        unit: of effects, short.
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
