"""Decides which run is trained or scored next.  Pure bookkeeping, without clock or cluster.

    to train ── next_to_train ──> training ── trained ──> waiting ── next_to_score ──> scoring ─┐
                     ^                                                                          │
                     └──────── at most `max_checkpoints` in between ─────────────── scored <────┘

A checkpoint is as large as the model, so the number of checkpoints that wait for scoring is
limited: at the limit training pauses.  Runs that start from a warm-up wait for it.  Warm-ups are
never scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from system.influence.design.design import InterventionRun


def open_checkpoints(num_tuners: int, num_scorers: int) -> int:
    """Largest number of checkpoints at one time: one per tuner and two per scorer."""
    return num_tuners + 2 * num_scorers


class Ledger:
    """The state of all runs of a stage.

    Args:
        runs: in starting order.
        trained: names of the runs that have a checkpoint.
        scored: names of the runs that have scores.
        max_checkpoints: largest number of runs between the start of training and the end of
            scoring.
    """

    def __init__(
        self,
        runs: Iterable[InterventionRun],
        *,
        trained: Collection[str],
        scored: Collection[str],
        max_checkpoints: int,
    ) -> None:
        self._max_checkpoints = max_checkpoints
        runs = tuple(runs)
        left = [run for run in runs if run.kind != "warm" and run.name not in scored]
        needed = {run.replication for run in left}
        # The warm-up of a replication that is scored already need not be trained again.
        warm = [run for run in runs if run.kind == "warm" and run.replication in needed]
        self._cold = {run.replication for run in warm if run.name not in trained}
        self._unscored = {run.name for run in left}
        self._to_score = deque(run for run in left if run.name in trained)
        untrained = {run.name for run in [*left, *warm] if run.name not in trained}
        self._to_train = [run for run in runs if run.name in untrained]
        self._open = len(self._to_score)

    @property
    def is_done(self) -> bool:
        """Whether all runs are scored."""
        return not self._unscored

    @property
    def num_to_train(self) -> int:
        """Number of trainings that have not started."""
        return len(self._to_train)

    @property
    def num_unscored(self) -> int:
        """Units without scores."""
        return len(self._unscored)

    def num_scored_replications(self, total: int) -> int:
        """Length of the longest prefix of replications that are scored completely."""
        open_ones = {name.partition("-")[0] for name in self._unscored}
        for replication in range(total):
            if f"r{replication:02d}" in open_ones:
                return replication
        return total

    def next_to_train(self) -> InterventionRun | None:
        """The next run to train, or None if no training may start now."""
        for place, run in enumerate(self._to_train):
            if run.kind == "warm":
                return self._to_train.pop(place)
            if self._open < self._max_checkpoints and run.replication not in self._cold:
                self._open += 1
                return self._to_train.pop(place)
        return None

    def next_to_score(self) -> InterventionRun | None:
        """The next run to score, or None if no checkpoint waits."""
        return self._to_score.popleft() if self._to_score else None

    def trained(self, run: InterventionRun) -> None:
        """Records that a training has finished."""
        if run.kind == "warm":
            self._cold.discard(run.replication)
        else:
            self._to_score.append(run)

    def scored(self, run: InterventionRun) -> None:
        """Records that a scoring has finished."""
        self._unscored.discard(run.name)
        self._open -= 1
