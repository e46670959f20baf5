"""Which unit comes next: train, score, or wait.  Pure bookkeeping, no clock and no cluster.

    to train ── next_to_train ──> training ── trained ──> waiting ── next_to_score ──> scoring ─┐
                     ^                                                                          │
                     └──────── at most `max_checkpoints` in between ─────────────── scored <────┘

A checkpoint is as big as the model, so training stops getting ahead of scoring at the bound.  Runs
that start from a warm-up wait for it; warm-ups are never scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from system.influence.design.design import Unit


def open_checkpoints(num_tuners: int, num_scorers: int) -> int:
    """Checkpoints that may exist at once: one in every tuner's hands, two for every scorer."""
    return num_tuners + 2 * num_scorers


class Ledger:
    """The state of all units of a stage.

    Args:
        units: in the order in which they are best started.
        trained: names of units whose checkpoint is there.
        scored: names of units whose scores are there.
        max_checkpoints: units that may be between the start of training and the end of scoring.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        *,
        trained: Collection[str],
        scored: Collection[str],
        max_checkpoints: int,
    ) -> None:
        self._max_checkpoints = max_checkpoints
        units = tuple(units)
        left = [unit for unit in units if unit.kind != "warm" and unit.name not in scored]
        needed = {unit.replication for unit in left}
        warm = [unit for unit in units if unit.kind == "warm" and unit.replication in needed]
        self._cold = {unit.replication for unit in warm if unit.name not in trained}
        self._unscored = {unit.name for unit in left}
        self._to_score = deque(unit for unit in left if unit.name in trained)
        wanted = {unit.name for unit in [*left, *warm] if unit.name not in trained}
        self._to_train = [unit for unit in units if unit.name in wanted]
        self._open = len(self._to_score)

    @property
    def is_done(self) -> bool:
        """Whether every unit is scored."""
        return not self._unscored

    @property
    def num_to_train(self) -> int:
        """Trainings not handed out yet."""
        return len(self._to_train)

    @property
    def num_unscored(self) -> int:
        """Units without scores."""
        return len(self._unscored)

    def num_scored_replications(self, total: int) -> int:
        """How many of the first `total` replications are scored whole, without a gap."""
        open_ones = {name.partition("-")[0] for name in self._unscored}
        for replication in range(total):
            if f"r{replication:02d}" in open_ones:
                return replication
        return total

    def next_to_train(self) -> Unit | None:
        """The next training to start, or None where none may start now."""
        for place, unit in enumerate(self._to_train):
            if unit.kind == "warm":
                return self._to_train.pop(place)
            if self._open < self._max_checkpoints and unit.replication not in self._cold:
                self._open += 1
                return self._to_train.pop(place)
        return None

    def next_to_score(self) -> Unit | None:
        """The next checkpoint to score, or None where none waits."""
        return self._to_score.popleft() if self._to_score else None

    def trained(self, unit: Unit) -> None:
        """A training is done."""
        if unit.kind == "warm":
            self._cold.discard(unit.replication)
        else:
            self._to_score.append(unit)

    def scored(self, unit: Unit) -> None:
        """A scoring is done."""
        self._unscored.discard(unit.name)
        self._open -= 1
