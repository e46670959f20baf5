"""Which runs a replication of each estimator makes: what `check` counts and what the stage does.

A new estimator is one entry in `ESTIMATORS`.  What a run trains on follows from its kind
(`system.influence.design.interventions.switched_sources`,
`system.influence.design.cost.run_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from system.influence.design.random_design import design_runs

Run = tuple[str, int]
"""Kind of a run and the index of its source or pattern, -1 where it has none (`design.InterventionRun`)."""

WARM = "warm"
"""Kind of the runs whose checkpoints others start from and nobody scores."""
GRADIENT = "gradient"
"""Kind of the units that differentiate doses and held-out rows at one checkpoint."""
APPEND = "append"
"""Kind of the runs that add a dose of a category to a base that has no rows of it."""
UNSCORED = frozenset({WARM, GRADIENT})
"""Kinds that leave no checkpoint for a scorer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """What `check` and the stage have to agree on."""

    runs: Callable[[int, tuple[str, ...]], list[Run]]
    """(number of sources, directions) -> runs of one replication that have held-out losses, in the
    order to start them."""
    in_words: str
    """What a replication is, for people."""
    is_warmed: bool = False
    """Whether a replication begins with a warm-up."""
    is_first_order: bool = False
    """Whether the runs are predicted from gradients at checkpoints of the warm-up."""

    def all_runs(
        self, num_sources: int, directions: tuple[str, ...], num_checkpoints: int
    ) -> list[Run]:
        """All work of one replication: the warm-up, then its runs or its gradients."""
        warm: list[Run] = [(WARM, -1)] if self.is_warmed else []
        if self.is_first_order:
            return [*warm, *((GRADIENT, part) for part in range(num_checkpoints))]
        return [*warm, *self.runs(num_sources, directions)]


def retrain_runs(num_sources: int, directions: tuple[str, ...]) -> list[Run]:
    """A reference, and every source's dose on its own."""
    single = [(direction, source) for direction in directions for source in range(num_sources)]
    return [("reference", -1), *single]


ESTIMATORS: Mapping[str, Estimator] = {
    "retrain": Estimator(
        runs=retrain_runs, in_words="one reference run and one run per category and direction"
    ),
    "branch": Estimator(
        runs=retrain_runs,
        in_words="one warm-up, one reference run and one run per category and direction",
        is_warmed=True,
    ),
    "random-design": Estimator(
        runs=design_runs, in_words="runs with half of all doses each, for every direction"
    ),
    "gradient": Estimator(
        runs=retrain_runs,
        in_words="one warm-up and gradients at its checkpoints, no run per category",
        is_warmed=True,
        is_first_order=True,
    ),
}
"""By the names that `influence.estimator` takes; `auto` chooses among some of them."""

FIRST_ORDER = (
    "first-order estimates are no trained-for measurements: that they agree with themselves does "
    "not say that training agrees with them; confirm with estimator retrain, branch or "
    "random-design"
)
"""Said of estimator `gradient` wherever its effects are used."""
