"""Paired differences of example losses between intervention runs and their reference runs.

Legend of shape suffixes: R replications, T targets, S sources, H held-out examples of one target,
N held-out examples of all targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from system.errors import DataError
from system.influence.design.design import Design, InterventionRun
from system.influence.design.estimators import APPEND
from system.influence.design.random_design import effect_weights
from system.schema import SCORES, check_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The losses of all runs of one direction, paired with the reference run of the replication."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    direction: str
    """`add` or `remove`."""
    estimator: str
    dose_S: np.ndarray
    """[S] examples by which a run of the source differs from the reference run (mean over R)."""
    dose_tokens_S: np.ndarray
    """[S] the same dose in response tokens (mean over R)."""
    differences: tuple[np.ndarray, ...]
    """Per target [R, S, H] float64, nats per response token of one held-out example: loss without
    the dose minus loss with it.  Positive: the source's data helps.  Axis H is the same example in
    every replication and run."""
    is_binary: bool = False
    """True if losses are 0 (right answer) or 1 (wrong answer)."""

    @property
    def num_replications(self) -> int:
        """The number of independent schedules."""
        return self.differences[0].shape[0]

    @property
    def own_T(self) -> np.ndarray:
        """[T] int: the column of the target's own category; -1 for an external target."""
        place = {source: column for column, source in enumerate(self.sources)}
        return np.array([place.get(target, -1) for target in self.targets])

    @property
    def mean_RTS(self) -> np.ndarray:
        """[R, T, S] differences averaged over held-out examples, nats per response token."""
        return np.stack([row_RSH.mean(axis=2) for row_RSH in self.differences], axis=1)

    @property
    def unresponsive_T(self) -> np.ndarray:
        """[T] bool: no source but the target's own changes any example of it in any run.

        This happens with accuracy, if a model answers none of the questions right, or all of them.
        """
        return np.array(
            [
                not np.delete(row_RSH, own, axis=1).any() if own >= 0 else not row_RSH.any()
                for row_RSH, own in zip(self.differences, self.own_T, strict=True)
            ]
        )

    def replications(self, chosen: list[int]) -> Measurements:
        """The measurements of these replications alone."""
        rows = tuple(row_RSH[chosen] for row_RSH in self.differences)
        return replace(self, differences=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Held-out losses of all runs, on the examples that every run was scored on."""

    examples: tuple[np.ndarray, ...]
    """Per target, the positions of its examples in each array of `loss`."""
    num_tokens_N: np.ndarray
    """[N] response tokens."""
    loss: dict[str, np.ndarray]
    """InterventionRun name -> [N] float64, mean nats per response token of each example."""
    num_incomplete: int
    """Number of examples left out because some run has no finite loss for them."""


def own_mask(own_T: np.ndarray, num_sources: int) -> np.ndarray:
    """[T, S] bool: true where the source is the target's own category."""
    return own_T[:, None] == np.arange(num_sources)[None, :]


def collect_losses(design: Design, scores: Mapping[str, pa.Table]) -> Losses:
    """Collects the losses of all scored runs, aligned by target and example.

    An example without a score in any run is left out of all runs, so that differences stay paired.

    Args:
        design: the runs and targets.
        scores: run name -> SCORES table, for every run of the design.

    Raises:
        DataError: a run or a target has no scores, or two runs were scored on different tokens.
    """
    names = [run.name for run in design.runs]
    missing = [name for name in names if name not in scores]
    if missing:
        raise DataError(
            f"influence: expected scores of {len(names)} runs, {len(missing)} are missing, first "
            f"{missing[0]}; run the stage again to finish them"
        )
    by_run = {name: _by_example(check_table(scores[name], SCORES, name)) for name in names}
    tokens_of = {key: tokens for of_run in by_run.values() for key, (_, tokens) in of_run.items()}
    keys = [key for key in tokens_of if all(key in of_run for of_run in by_run.values())]
    place = {target.name: row for row, target in enumerate(design.targets)}
    # A fixed order, whichever run is read first: sums over examples must not depend on it.
    keys.sort(key=lambda key: (place[key[0]], key[1]))
    tokens_N = np.array([tokens_of[key] for key in keys], dtype=np.int64)
    loss: dict[str, np.ndarray] = {}
    for name, of_run in by_run.items():
        values = np.array([of_run[key] for key in keys], dtype=float).reshape(len(keys), 2)
        if not np.array_equal(values[:, 1], tokens_N):
            raise DataError(
                f"influence: expected that all runs are scored on the same tokens, but run {name} "
                "was scored on others; the tokenizer or the held-out rows changed: run the stage "
                "again with --redo influence"
            )
        loss[name] = values[:, 0] / tokens_N
    owner = np.array([place[key[0]] for key in keys], dtype=int)
    examples = tuple(np.flatnonzero(owner == row) for row in range(len(design.targets)))
    for target, columns in zip(design.targets, examples, strict=True):
        if columns.size < 2:
            raise DataError(
                f"influence: target {target.name!r} has {columns.size} held-out examples that "
                "every run was scored on; expected at least 2. See the runs' rejected rows in "
                "influence/scores."
            )
    return Losses(
        examples=examples,
        num_tokens_N=tokens_N,
        loss=loss,
        num_incomplete=len(tokens_of) - len(keys),
    )


def paired_differences(
    design: Design, losses: Losses, direction: str, *, is_binary: bool = False
) -> Measurements:
    """Differences between each run of a direction and the reference run of its replication.

    Positive if the source's data helps: reference - added, or removed - reference.  For
    `random-design` the differences are the coefficients of the regression.  If a small category has
    different doses in different replications, its differences are scaled to the mean dose, because
    effects are per unit of data.

    Args:
        design: the runs.
        losses: of all runs.
        direction: `add` or `remove`.
        is_binary: whether losses are 0 (right answer) or 1 (wrong answer).
    """
    dose_RS = design.dose_rows(direction)
    dose_S = dose_RS.mean(axis=0)
    num_replications, num_sources = dose_RS.shape
    difference_RSN = np.empty((num_replications, num_sources, losses.num_tokens_N.size))
    for replication in range(num_replications):
        difference_SN = _replication_differences(design, losses, direction, replication)
        scale_S = dose_S / dose_RS[replication]
        difference_RSN[replication] = difference_SN * scale_S[:, None]
    return Measurements(
        targets=tuple(target.name for target in design.targets),
        sources=design.sources,
        direction=direction,
        estimator=design.estimator,
        dose_S=dose_S,
        dose_tokens_S=design.dose_tokens(direction).mean(axis=0),
        differences=tuple(difference_RSN[:, :, columns] for columns in losses.examples),
        is_binary=is_binary,
    )


def _replication_differences(
    design: Design, losses: Losses, direction: str, replication: int
) -> np.ndarray:
    """[S, N] loss without the dose minus loss with the dose."""
    patterns = design.replications[replication].patterns
    if patterns:
        runs = [
            InterventionRun(replication=replication, kind=f"mix-{direction}", source=run)
            for run in range(len(patterns[direction]))
        ]
        loss_KN = np.stack([losses.loss[run.name] for run in runs])
        return -effect_weights(np.array(patterns[direction])) @ loss_KN
    sign = 1.0 if direction == "add" else -1.0
    reference_N = losses.loss[
        InterventionRun(replication=replication, kind="reference", source=-1).name
    ]
    is_appended_S = np.array([design.is_appended(name) for name in design.sources])
    runs = [
        InterventionRun(
            replication=replication, kind=APPEND if appended else direction, source=source
        )
        for source, appended in enumerate(is_appended_S)
    ]
    sign_S = np.where(is_appended_S, 1.0, sign)  # an appended dose is always added
    loss_SN = np.stack([losses.loss[run.name] for run in runs])
    return sign_S[:, None] * (reference_N - loss_SN)


def _by_example(table: pa.Table) -> dict[tuple[str, str], tuple[float, int]]:
    columns = (table.column(name).to_pylist() for name in ("category", "id", "nll", "num_tokens"))
    return {
        (category, key): (nll, tokens)
        for category, key, nll, tokens in zip(*columns, strict=True)
        if np.isfinite(nll) and tokens > 0
    }
