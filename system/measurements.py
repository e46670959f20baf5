"""What the interventions measured, as arrays: paired differences of example losses.

Legend of shape suffixes: R replications, T targets, S sources, H held-out examples of one target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Losses of every run of one direction, paired with its replication's reference run."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    direction: str
    """`add` or `remove`."""
    estimator: str
    dose_S: np.ndarray
    """[S] examples by which a run of the source differs from the reference (mean over R)."""
    dose_tokens_S: np.ndarray
    """[S] the same dose in response tokens (mean over R)."""
    differences: tuple[np.ndarray, ...]
    """Per target [R, S, H] float64, nats per response token of one held-out example: loss without
    the dose minus loss with it.  Positive: the source's data helps.  Axis H is the same example in
    every replication and run."""

    @property
    def num_replications(self) -> int:
        """How many independent schedules were run."""
        return self.differences[0].shape[0]

    @property
    def own_T(self) -> np.ndarray:
        """[T] int: the column of the target's own category; -1 where no source owns it."""
        place = {source: column for column, source in enumerate(self.sources)}
        return np.array([place.get(target, -1) for target in self.targets])

    @property
    def mean_RTS(self) -> np.ndarray:
        """[R, T, S] differences averaged over held-out examples, nats per response token."""
        return np.stack([row_RSH.mean(axis=2) for row_RSH in self.differences], axis=1)

    def replications(self, chosen: list[int]) -> Measurements:
        """The same measurements with some of the replications only."""
        return Measurements(
            targets=self.targets,
            sources=self.sources,
            direction=self.direction,
            estimator=self.estimator,
            dose_S=self.dose_S,
            dose_tokens_S=self.dose_tokens_S,
            differences=tuple(row_RSH[chosen] for row_RSH in self.differences),
        )


def own_mask(own_T: np.ndarray, num_sources: int) -> np.ndarray:
    """[T, S] bool: true where the source is the target's own category."""
    return own_T[:, None] == np.arange(num_sources)[None, :]
