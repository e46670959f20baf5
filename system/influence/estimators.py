"""Which runs a replication of each estimator makes: what `check` counts and what the stage does.

A new estimator is one entry in `ESTIMATORS`.  What a run trains on follows from its kind
(`system.influence.interventions.switched_sources`, `system.influence.cost.run_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from system.influence.random_design import design_runs

Run = tuple[str, int]
"""Kind of a run and the index of its source or pattern, -1 where it has none (`design.Unit`)."""

UNSCORED = frozenset({"warm"})
"""Kinds of runs whose checkpoints other runs start from and nobody scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """What `check` and the stage have to agree on."""

    runs: Callable[[int, tuple[str, ...]], list[Run]]
    """(number of sources, directions) -> runs of one replication, in the order to start them."""
    in_words: str
    """What a replication is, for people."""


def retrain_runs(num_sources: int, directions: tuple[str, ...]) -> list[Run]:
    """A reference, and every source's dose on its own."""
    single = [(direction, source) for direction in directions for source in range(num_sources)]
    return [("reference", -1), *single]


def branch_runs(num_sources: int, directions: tuple[str, ...]) -> list[Run]:
    """The same after a warm-up that all of them start from."""
    return [("warm", -1), *retrain_runs(num_sources, directions)]


ESTIMATORS: Mapping[str, Estimator] = {
    "retrain": Estimator(
        runs=retrain_runs, in_words="one reference run and one run per category and direction"
    ),
    "branch": Estimator(
        runs=branch_runs,
        in_words="one warm-up, one reference run and one run per category and direction",
    ),
    "random-design": Estimator(
        runs=design_runs, in_words="runs with half of all doses each, for every direction"
    ),
    "auto": Estimator(
        runs=design_runs,
        in_words="runs with half of all doses each, for every direction, until the mix is settled",
    ),
}
"""By the names that `influence.estimator` takes."""
