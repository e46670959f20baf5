"""How many tokens a second one actor works off, and where the number comes from.

Units that an influence stage has finished tell more than any probe: they ran where the rest will
run, beside the actors that the rest will have beside it.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from system import storage

_LATEST = 200
"""Units that are read at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second of one actor."""

    mean: float
    """All tokens over all seconds: what a sum of many such pieces of work goes by."""
    low: float
    high: float
    """Quartiles of single pieces, drawn out to the mean where it lies beyond them."""
    num_samples: int

    @classmethod
    def of(cls, samples: Sequence[tuple[float, float]]) -> Rate:
        """The rate of pieces of work, each (tokens, seconds)."""
        tokens, seconds = np.asarray(samples, dtype=np.float64).T
        mean = float(tokens.sum() / seconds.sum())
        low, high = (float(value) for value in np.percentile(tokens / seconds, [25, 75]))
        return cls(mean=mean, low=min(low, mean), high=max(high, mean), num_samples=len(samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What hours are computed from."""

    train: Rate
    """One tuner."""
    score: Rate
    """One scorer."""
    source: str
    """For people: what was measured, where."""
    is_probe: bool
    """Measured alone on this machine, without the actors that a run has beside it."""
    run_seconds: float
    """Of one training, apart from its tokens."""


def finished_units(attempt_uri: str, answer_tokens: int = 0) -> Rates | None:
    """The rates of the units that an influence attempt has finished; None where there are none.

    Args:
        attempt_uri: of the stage.
        answer_tokens: that every held-out row's answer counts for (`accuracy`).
    """
    heldout_uri = storage.join(attempt_uri, "heldout.arrow")
    if not storage.exists(heldout_uri):
        return None
    rows = storage.read_table(heldout_uri).column("input_ids")
    scored_tokens = pc.sum(pc.list_value_length(rows)).as_py() + answer_tokens * len(rows)
    train: list[tuple[float, float]] = []
    score: list[tuple[float, float]] = []
    for name in storage.list_names(storage.join(attempt_uri, "units"))[-_LATEST:]:
        stats = storage.read_json(storage.join(attempt_uri, "units", name))
        if stats["seconds"] > 0 and stats["trained_tokens"]:
            train.append((stats["trained_tokens"], stats["seconds"]))
    for name in storage.list_names(storage.join(attempt_uri, "scores"))[-_LATEST:]:
        with storage.open_input(storage.join(attempt_uri, "scores", name)) as file:
            metadata = pq.read_schema(file).metadata or {}
        seconds = float(metadata.get(b"instructmix.seconds", b"0"))
        if seconds > 0:
            score.append((scored_tokens, seconds))
    if not train or not score:
        return None
    return Rates(
        train=Rate.of(train),
        score=Rate.of(score),
        source=f"{len(train)} trainings and {len(score)} scorings that this run directory has",
        is_probe=False,
        run_seconds=0.0,
    )
