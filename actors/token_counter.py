"""Measures the lengths of all rows in tokens, shard by shard: the last part of stage `tag`.

driver: shards of the tagged manifest ──> TokenCounter.measure ──> lengths/*.parquet
totals of all shards ──> manifest without the rows that have no response to learn
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from actors.pool import ActorSpec
from actors.stage import StageContext
from system import storage
from system.data.corpus import Corpus, Manifest, Shard
from system.data.lengths import (
    ShardLengths,
    copy_lengths,
    measure_shard,
    read_lengths,
    without_unusable,
)
from system.models.base import load_tokenizer
from system.rundir import fingerprint

POOL = "measure"


class TokenCounter:
    """Measures shards.  Holds a tokenizer; every call can be repeated."""

    def __init__(
        self, corpus: Corpus, attempt: str, model_uri: str, trust_remote_code: bool, max_length: int
    ) -> None:
        self._corpus = corpus
        self._attempt = attempt
        self._tokenizer = load_tokenizer(model_uri, trust_remote_code=trust_remote_code)
        self._max_length = max_length

    def measure(self, shard: Shard) -> ShardLengths:
        """Measures the rows of one shard, writes their lengths and returns the totals."""
        return measure_shard(self._corpus, shard, self._attempt, self._tokenizer, self._max_length)


def measured_manifest(context: StageContext, manifest: Manifest) -> Manifest:
    """Measures all shards; returns the manifest of the rows that have a response to learn.

    Args:
        context: of stage `tag`.
        manifest: of the tagged corpus, with paths relative to the attempt.
    """
    # Lengths are named by the content of the shard and kept for this model, so those of an earlier
    # attempt can be used again.
    shared = storage.join(context.shared_uri, fingerprint(context.model_identity))
    measured: dict[Any, ShardLengths] = {
        number: lengths
        for number, shard in enumerate(manifest.shards)
        if (lengths := read_lengths(shard, context.attempt)) is not None
        or (lengths := copy_lengths(shard, shared, context.attempt)) is not None
    }
    units: dict[Hashable, tuple[Shard]] = {
        number: (shard,) for number, shard in enumerate(manifest.shards) if number not in measured
    }
    if units:
        _measure(context, manifest, units, measured)
    for shard in manifest.shards:
        copy_lengths(shard, context.attempt, shared)
    return without_unusable(manifest, [measured[number] for number in range(len(manifest.shards))])


def _measure(
    context: StageContext,
    manifest: Manifest,
    units: dict[Hashable, tuple[Shard]],
    measured: dict[Any, ShardLengths],
) -> None:
    """Measures the shards in `units` with actors and adds them to `measured`."""
    config = context.config
    context.cluster.connect()
    pool = context.cluster.pool(
        ActorSpec(
            name=POOL,
            actor_class=TokenCounter,
            args=(
                Corpus(storage.join(context.attempt, "manifest.json"), manifest),
                context.attempt,
                context.input("model", "model"),
                config.model.trust_remote_code,
                config.model.max_length,
            ),
            num_actors=config.cluster.num_ingestors,
            # On a cluster of our own the scorers still reserve all CPUs, but they are idle now: no
            # CPU is asked for, else the actors would never start.
            num_cpus=0.0 if context.cluster.is_own else 0.5,
            max_attempts=config.cluster.max_attempts,
        )
    )
    try:
        with context.progress.bar("lengths", total=sum(s.rows for s in manifest.shards)) as bar:
            bar.advance(sum(manifest.shards[number].rows for number in measured))
            for key, lengths in pool.map(units, "measure"):
                measured[key] = lengths
                bar.advance(units[key][0].rows)
    finally:
        context.cluster.close_pool(POOL)
