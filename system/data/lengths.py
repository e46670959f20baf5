"""Measures the length of every row in tokens, and leaves out rows without a response to learn.

    shard ── encode ──> lengths/<split>-<sha>.parquet      one line for each row of the shard

The last part of stage `tag`; `actors.token_counter` measures the shards in parallel.

A row whose response begins after `model.max_length` tokens trains nothing.  In the corpus it would
count as supply and could be selected, but the training would skip it: two mixes with equal counts
would then train on different numbers of examples.  So these rows leave the corpus before anything
counts them, and the exact number of tokens is known for the other rows.

The shards are not rewritten.  A shard with such rows names its lengths table in the manifest, and
`Corpus.read_shard` leaves the rows out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from system import storage
from system.data.corpus import (
    Corpus,
    Manifest,
    Shard,
    make_manifest,
    resolve_path,
    seeded_rank,
)
from system.data.rows.conversation import SPLITS
from system.models.chat import encode_rows
from system.schema import LENGTHS, check_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLengths:
    """Rows and tokens of one shard."""

    path: str
    """Of the LENGTHS table, relative to the manifest's directory."""
    rows: int
    """Rows with a response to learn."""
    tokens: int
    """Of those rows, prompts included, truncated to `model.max_length`."""
    response_tokens: int
    dropped: dict[str, int]
    """Rows without a response, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnLengths:
    """Ids and lengths of the rows in a seeded sample.  N = rows."""

    ids: list[str]
    """N ids; empty if only the number of rows is known."""
    tokens: np.ndarray
    """[N] tokens of each row, prompt included; the mean length if the rows are unknown."""
    response: np.ndarray
    """[N] tokens of each response."""


RowLengths = Callable[[str, str, int, int], DrawnLengths]
"""(split, category, largest number of rows, seed) -> lengths of what `Corpus.sample` draws."""


def measure_shard(
    corpus: Corpus,
    shard: Shard,
    attempt_uri: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> ShardLengths:
    """Encodes the rows of a shard and writes their lengths, unless they are already written.

    Raises:
        ModelError: the chat template cannot be trained on.
    """
    earlier = read_lengths(shard, attempt_uri)
    if earlier is not None:
        return earlier
    table = corpus.read_shard(shard, ["messages"])
    batches = [
        _measure(table.slice(start, _BATCH_ROWS), tokenizer, max_length)
        for start in range(0, table.num_rows, _BATCH_ROWS)
    ]
    whole = pa.concat_tables(batches)
    storage.write_table(storage.join(attempt_uri, lengths_path(shard)), whole)
    return _totals(lengths_path(shard), whole)


def read_lengths(shard: Shard, attempt_uri: str) -> ShardLengths | None:
    """The totals of a shard whose lengths are written; None if they are not."""
    uri = storage.join(attempt_uri, lengths_path(shard))
    if not storage.is_whole(uri):
        return None
    return _totals(lengths_path(shard), check_table(storage.read_table(uri), LENGTHS, uri))


def copy_lengths(shard: Shard, from_uri: str, to_uri: str) -> ShardLengths | None:
    """Copies the lengths of a shard from one directory to another, unless they are there.

    Returns:
        The totals of the shard; None if the first directory does not have its lengths.
    """
    path = lengths_path(shard)
    if not storage.is_whole(storage.join(from_uri, path)):
        return None
    if not storage.is_whole(storage.join(to_uri, path)):
        table = check_table(storage.read_table(storage.join(from_uri, path)), LENGTHS, path)
        storage.write_table(storage.join(to_uri, path), table)
    return read_lengths(shard, to_uri)


def lengths_path(shard: Shard) -> str:
    """Path of a shard's lengths; the name follows from the content of the shard."""
    return f"lengths/{shard.split}-{shard.sha256[:24]}.parquet"


def without_unusable(manifest: Manifest, measured: Iterable[ShardLengths]) -> Manifest:
    """The manifest of the rows that have a response to learn, with their numbers of tokens.

    Args:
        manifest: of the tagged corpus.
        measured: one for each shard of the manifest, in the same order.
    """
    shards: list[Shard] = []
    dropped: Counter[str] = Counter()
    sums: dict[str, dict[str, Counter[str]]] = {
        kind: {split: Counter() for split in SPLITS} for kind in ("tokens", "response_tokens")
    }
    for shard, lengths in zip(manifest.shards, measured, strict=True):
        dropped.update(lengths.dropped)
        # Listing the shard would keep its category in the manifest, even with no row left.
        if not lengths.rows:
            continue
        path = lengths.path if lengths.dropped else None
        shards.append(replace(shard, rows=lengths.rows, lengths=path))
        name = str(shard.category)
        sums["tokens"][shard.split][name] += lengths.tokens
        sums["response_tokens"][shard.split][name] += lengths.response_tokens
    num_dropped = sum(dropped.values())
    details: dict[str, Any] = {
        kind: {split: dict(sorted(counts.items())) for split, counts in by_split.items()}
        for kind, by_split in sums.items()
    }
    return make_manifest(
        shards,
        read=manifest.read,
        kept=manifest.kept - num_dropped,
        duplicates=manifest.duplicates,
        rejected={**manifest.rejected, **dict(sorted(dropped.items()))},
        sources=manifest.sources,
        details={**manifest.details, **details},
    )


def mean_response_tokens(corpus: Corpus, split: str = "train") -> dict[str, float]:
    """Mean number of response tokens of an example, by category."""
    sums = corpus.manifest.details["response_tokens"][split]
    return {name: sums[name] / rows for name, rows in corpus.counts(split).items() if rows}


class SeededLengths:
    """The lengths of seeded samples of a tagged corpus, without reading texts or encoding them.

    Args:
        corpus: of stage `tag`, whose lengths lie beside its manifest.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._read: dict[tuple[str, str], tuple[list[str], np.ndarray, np.ndarray]] = {}

    def __call__(self, split: str, category: str, num_rows: int, seed: int) -> DrawnLengths:
        """The rows with the smallest `sha256(f"{seed}:{id}")`, in the order of that hash."""
        if (split, category) not in self._read:
            self._read[split, category] = self._all(split, category)
        ids, tokens, response = self._read[split, category]
        ranks = ((seeded_rank(seed, name), row) for row, name in enumerate(ids))
        rows = [row for _, row in heapq.nsmallest(num_rows, ranks)]
        return DrawnLengths(
            ids=[ids[row] for row in rows], tokens=tokens[rows], response=response[rows]
        )

    def _all(self, split: str, category: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        ids: list[str] = []
        tokens, response = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for shard in self._corpus.shards(split, category):
            ids += self._corpus.read_shard(shard, ["id"])["id"].to_pylist()
            uri = resolve_path(self._corpus.base, lengths_path(shard))
            lengths = storage.read_table(uri)
            # A row without response tokens is not in the corpus, so its id was not read above.
            shard_response = np.asarray(lengths["response_tokens"])
            tokens.append(np.asarray(lengths["tokens"])[shard_response > 0])
            response.append(shard_response[shard_response > 0])
        return ids, np.concatenate(tokens), np.concatenate(response)


def _measure(table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.Table:
    encoded, kept_rows, reason_of = encode_rows(table, tokenizer, max_length)
    tokens = np.zeros(table.num_rows, np.int32)
    response = np.zeros(table.num_rows, np.int32)
    reasons: list[str | None] = [None] * table.num_rows
    for row, reason in reason_of.items():
        reasons[row] = reason
    for place, row in zip(kept_rows, encoded, strict=True):
        tokens[place] = len(row.input_ids)
        response[place] = np.count_nonzero(row.response_mask)
    return pa.table(
        [pa.array(tokens), pa.array(response), pa.array(reasons, pa.string())], schema=LENGTHS
    )


def _totals(path: str, table: pa.Table) -> ShardLengths:
    response = np.asarray(table["response_tokens"])
    usable = response > 0
    reasons = Counter(reason for reason in table["left_out"].to_pylist() if reason is not None)
    return ShardLengths(
        path=path,
        rows=int(usable.sum()),
        tokens=int(np.asarray(table["tokens"])[usable].sum()),
        response_tokens=int(response.sum()),
        dropped=dict(reasons),
    )
