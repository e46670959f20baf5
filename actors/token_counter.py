"""Lengths of all rows in tokens, the last part of stage `tag`, measured shard by shard.

The driver sends the shards of the tagged manifest to actors; each writes `lengths/*.parquet` and
answers with totals, of which the manifest without unusable rows is made.
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
    """Holds a tokenizer; every call can be repeated."""

    def __init__(
        self, corpus: Corpus, attempt: str, model_uri: str, trust_remote_code: bool, max_length: int
    ) -> None:
        self._corpus = corpus
        self._attempt = attempt
        self._tokenizer = load_tokenizer(model_uri, trust_remote_code=trust_remote_code)
        self._max_length = max_length

    def measure(self, shard: Shard) -> ShardLengths:
        """The lengths of a shard's rows."""
        return measure_shard(self._corpus, shard, self._attempt, self._tokenizer, self._max_length)


def measured_manifest(context: StageContext, manifest: Manifest) -> Manifest:
    """The manifest of the rows that can be learnt.

    Args:
        context: of stage `tag`.
        manifest: of the tagged corpus, with paths relative to the attempt.
    """
    # A shard is named by its content: an attempt that measured it for this model is as good.
    shared = storage.join(context.shared_uri, fingerprint(context.model_identity))
    found: dict[Any, ShardLengths] = {
        number: lengths
        for number, shard in enumerate(manifest.shards)
        if (lengths := read_lengths(shard, context.attempt)) is not None
        or (lengths := copy_lengths(shard, shared, context.attempt)) is not None
    }
    units: dict[Hashable, tuple[Shard]] = {
        number: (shard,) for number, shard in enumerate(manifest.shards) if number not in found
    }
    if units:
        _measure(context, manifest, units, found)
    for shard in manifest.shards:
        copy_lengths(shard, context.attempt, shared)
    return without_unusable(manifest, [found[number] for number in range(len(manifest.shards))])


def _measure(
    context: StageContext,
    manifest: Manifest,
    units: dict[Hashable, tuple[Shard]],
    found: dict[Any, ShardLengths],
) -> None:
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
            # On one machine the scorers hold its CPUs still, and idle: measuring takes their turn.
            num_cpus=0.0 if context.cluster.is_own else 0.5,
            max_attempts=config.cluster.max_attempts,
        )
    )
    try:
        with context.progress.bar("lengths", total=sum(s.rows for s in manifest.shards)) as bar:
            bar.advance(sum(manifest.shards[number].rows for number in found))
            for key, lengths in pool.map(units, "measure"):
                found[key] = lengths
                bar.advance(units[key][0].rows)
    finally:
        context.cluster.close_pool(POOL)
