"""How long every row is in tokens, and which rows have no response left to learn.

    shard ── encode ──> lengths/<split>-<sha>.arrow      one line per row of the shard, committed

A row whose response lies wholly behind `model.max_length` trains nothing.  Left in the corpus it
would count as supply, be chosen, and be missing from the training: two mixes of equal counts would
not train on equal numbers of examples.  So such rows leave the corpus before anything counts them,
and what is left has its exact number of tokens.

The shards stay as they are: a shard that holds such rows names its lengths in the manifest, and
`Corpus.read_shard` leaves them out.
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

_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLengths:
    """What was found in a shard."""

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
    """Rows that a seeded draw takes, without their content.  N = rows."""

    ids: list[str]
    """N; empty where only their number is known."""
    tokens: np.ndarray
    """[N] tokens of each row, prompt included; means where the rows are not known."""
    response: np.ndarray
    """[N] those of the response."""


RowLengths = Callable[[str, str, int, int], DrawnLengths]
"""(split, category, at most so many rows, seed) -> what `Corpus.sample` would draw."""


def measure_shard(
    corpus: Corpus,
    shard: Shard,
    attempt_uri: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> ShardLengths:
    """Encodes the rows of a shard and writes their lengths; a shard measured before is not.

    Raises:
        ModelError: the chat template cannot be trained on.
    """
    known = read_lengths(shard, attempt_uri)
    if known is not None:
        return known
    table = corpus.read_shard(shard, ["messages"])
    blocks = [
        _measure(table.slice(start, _BLOCK_ROWS), tokenizer, max_length)
        for start in range(0, table.num_rows, _BLOCK_ROWS)
    ]
    whole = pa.concat_tables(blocks)
    storage.write_table(storage.join(attempt_uri, lengths_path(shard)), whole)
    return _totals(lengths_path(shard), whole)


def read_lengths(shard: Shard, attempt_uri: str) -> ShardLengths | None:
    """What was found in a shard that is measured already; None where it is not."""
    uri = storage.join(attempt_uri, lengths_path(shard))
    if not storage.exists(uri):
        return None
    return _totals(lengths_path(shard), check_table(storage.read_table(uri), LENGTHS, uri))


def copy_lengths(shard: Shard, from_uri: str, to_uri: str) -> ShardLengths | None:
    """Copies the lengths of a shard where they are in one directory and not in the other.

    Returns:
        What was found in the shard; None where the first directory knows nothing of it.
    """
    path = lengths_path(shard)
    if not storage.exists(storage.join(from_uri, path)):
        return None
    if not storage.exists(storage.join(to_uri, path)):
        table = check_table(storage.read_table(storage.join(from_uri, path)), LENGTHS, path)
        storage.write_table(storage.join(to_uri, path), table)
    return read_lengths(shard, to_uri)


def lengths_path(shard: Shard) -> str:
    """Where the lengths of a shard lie; named by the shard's content."""
    return f"lengths/{shard.split}-{shard.sha256[:24]}.parquet"


def without_unusable(manifest: Manifest, measured: Iterable[ShardLengths]) -> Manifest:
    """The manifest of the rows that can be learnt, with the tokens they have.

    Args:
        manifest: as the tag stage made it.
        measured: one for each of its shards, in their order.
    """
    shards: list[Shard] = []
    dropped: Counter[str] = Counter()
    sums: dict[str, dict[str, Counter[str]]] = {
        kind: {split: Counter() for split in SPLITS} for kind in ("tokens", "response_tokens")
    }
    for shard, found in zip(manifest.shards, measured, strict=True):
        dropped.update(found.dropped)
        if not found.rows:
            continue
        lengths = found.path if found.dropped else None
        shards.append(replace(shard, rows=found.rows, lengths=lengths))
        name = str(shard.category)
        sums["tokens"][shard.split][name] += found.tokens
        sums["response_tokens"][shard.split][name] += found.response_tokens
    lost = sum(dropped.values())
    details: dict[str, Any] = {
        kind: {split: dict(sorted(counts.items())) for split, counts in by_split.items()}
        for kind, by_split in sums.items()
    }
    return make_manifest(
        shards,
        read=manifest.read,
        kept=manifest.kept - lost,
        duplicates=manifest.duplicates,
        rejected={**manifest.rejected, **dict(sorted(dropped.items()))},
        sources=manifest.sources,
        details={**manifest.details, **details},
    )


def mean_response_tokens(corpus: Corpus, split: str = "train") -> dict[str, float]:
    """Response tokens of an example of each category, mean over all its rows."""
    sums = corpus.manifest.details["response_tokens"][split]
    return {name: sums[name] / rows for name, rows in corpus.counts(split).items() if rows}


class SeededLengths:
    """The lengths of what is drawn from a tagged corpus, without reading or encoding a row.

    Args:
        corpus: of the tag stage, whose lengths lie beside its manifest.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._read: dict[tuple[str, str], tuple[list[str], np.ndarray, np.ndarray]] = {}

    def __call__(self, split: str, category: str, wanted: int, seed: int) -> DrawnLengths:
        """The rows whose `sha256(f"{seed}:{id}")` is smallest, in the order of that hash."""
        if (split, category) not in self._read:
            self._read[split, category] = self._all(split, category)
        ids, tokens, response = self._read[split, category]
        ranks = ((seeded_rank(seed, name), row) for row, name in enumerate(ids))
        rows = [row for _, row in heapq.nsmallest(wanted, ranks)]
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
            found = np.asarray(lengths["response_tokens"])
            tokens.append(np.asarray(lengths["tokens"])[found > 0])
            response.append(found[found > 0])
        return ids, np.concatenate(tokens), np.concatenate(response)


def _measure(table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.Table:
    encoded, kept, lost = encode_rows(table, tokenizer, max_length)
    tokens = np.zeros(table.num_rows, np.int32)
    response = np.zeros(table.num_rows, np.int32)
    reasons: list[str | None] = [None] * table.num_rows
    for row, reason in lost.items():
        reasons[row] = reason
    for place, row in zip(kept, encoded, strict=True):
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
