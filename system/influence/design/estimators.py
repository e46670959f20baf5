"""The estimators of effects, and the runs that one replication of each makes.

`check` counts these runs and the stage makes them.  To add an estimator, add an entry to
`ESTIMATORS`.  The kind of a run decides its training rows
(`system.influence.design.interventions.switched_sources`) and its tokens
(`system.influence.design.cost.run_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from system.influence.design.random_design import design_runs

Run = tuple[str, int]
"""(kind of a run, index of its source or pattern or -1); see `design.InterventionRun`."""

WARM = "warm"
"""Kind of the warm-up runs: other runs start from their checkpoints; they are never scored."""
GRADIENT = "gradient"
"""Kind of the runs that compute gradients of doses and held-out rows at one checkpoint."""
APPEND = "append"
"""Kind of the runs that add a dose of a category to a base that has no rows of it."""
UNSCORED = frozenset({WARM, GRADIENT})
"""Kinds of runs that no scorer scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """The runs of one replication; `check` and the stage both use this record."""

    runs: Callable[[int, tuple[str, ...]], list[Run]]
    """(number of sources, directions) -> the runs with held-out losses, in starting order."""
    in_words: str
    """Text that says what a replication consists of."""
    is_warmed: bool = False
    """Whether a replication begins with a warm-up."""
    is_first_order: bool = False
    """Whether the runs are predicted from gradients at checkpoints of the warm-up."""

    def all_runs(
        self, num_sources: int, directions: tuple[str, ...], num_checkpoints: int
    ) -> list[Run]:
        """All runs of one replication: the warm-up, then the scored runs or the gradient runs."""
        warm: list[Run] = [(WARM, -1)] if self.is_warmed else []
        if self.is_first_order:
            return [*warm, *((GRADIENT, part) for part in range(num_checkpoints))]
        return [*warm, *self.runs(num_sources, directions)]


def retrain_runs(num_sources: int, directions: tuple[str, ...]) -> list[Run]:
    """The reference run, then one run per direction and source."""
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
"""By the value of `influence.estimator`; `auto` chooses among some of them."""

FIRST_ORDER = (
    "first-order estimates are predictions, not measurements: their replications may agree with "
    "each other and still disagree with training; confirm them with estimator retrain, branch or "
    "random-design"
)
"""Warning that goes with all effects of estimator `gradient`."""
