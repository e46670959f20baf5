"""`facility-location`: ranks rows so that the first ones represent all others best.

    f(S) = sum over rows i of max over j in S of s(i, j);    s: cosine, at least 0, by 2^-15

A category is cut into blocks by ranges of its content ids.  Ids are hashes of the content, so a
block is a random part of the category; the cut follows from the number of rows alone, never from
shards.  Within a block rows are ranked greedily; rank r (from 0) of a block with n rows has the key
(r + 1/2) / n, and the category's order is by key.  So a block gives its share of any quota
(Sainte-Laguë rounding), and a smaller quota takes a part of the larger one's rows.

What is guaranteed, with K_b of n_b rows taken from block b:

- in every block f_b(S_b) >= (1 - 1/e) f_b(T) for every T of K_b rows of the block (Nemhauser,
  Wolsey & Fisher 1978; the greedy is exact, made fast by lazy evaluation, Minoux 1978);
- so for the category f(S) >= (1 - 1/e) sum over b of max f_b, because rows chosen elsewhere only
  add; with one block (`select.block_rows` at or above the category's rows) that is the optimum's
  share itself;
- memory is one block's similarities, 2 bytes each, time is linear in rows.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from system import storage
from system.data.corpus import Corpus
from system.selection.embed import dimensions_differ, read_vectors
from system.selection.vectors import cosines

UNIT_ROWS = 65536
"""Approximate number of rows of one work unit."""

_SCALE = 32767.0
_CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverUnit:
    """A work unit: some neighbouring blocks of a category."""

    category: str
    first: int
    end: int
    num_blocks: int
    """Number of blocks of the whole category."""
    quota: int
    """Number of rows to choose from the whole category."""
    available: int
    """Number of rows of the whole category that have a vector."""

    @property
    def path(self) -> str:
        """Path of its ranks, below the attempt."""
        name = hashlib.sha256(self.category.encode()).hexdigest()[:16]
        return f"work/cover/{name}-{self.first:06d}-{self.end:06d}.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The first rows of each block in greedy order, at least as many as the quota can take."""

    ids: np.ndarray
    """[K, 16] uint8."""
    key: np.ndarray
    """[K] float64: sort key in the category's order."""
    shard: np.ndarray
    """[K] int32: place in `Corpus.shards("train", category)`."""
    row: np.ndarray
    """[K] int32."""


def plan_cover(
    category: str, supply: int, available: int, quota: int, block_rows: int
) -> list[CoverUnit]:
    """Cuts a category into work units.

    Args:
        category: its name.
        supply: number of its train rows.
        available: number of its train rows with a vector.
        quota: number of rows to choose.
        block_rows: approximate number of rows of a block.
    """
    num_blocks = max(1, -(-supply // block_rows))
    step = max(1, UNIT_ROWS // block_rows)
    return [
        CoverUnit(
            category=category,
            first=first,
            end=min(first + step, num_blocks),
            num_blocks=num_blocks,
            quota=quota,
            available=available,
        )
        for first in range(0, num_blocks, step)
    ]


def is_ranked(attempt: str, unit: CoverUnit) -> bool:
    """Whether the unit's ranks are committed."""
    return storage.is_whole(storage.join(attempt, unit.path))


def write_ranked(attempt: str, unit: CoverUnit, ranked: Ranked) -> None:
    """Writes the unit's ranks; this commits the unit."""
    with storage.atomic_output(storage.join(attempt, unit.path)) as file:
        np.savez(file, ids=ranked.ids, key=ranked.key, shard=ranked.shard, row=ranked.row)


def read_ranked(attempt: str, unit: CoverUnit) -> Ranked:
    """Reads the ranks of a committed unit."""
    with storage.open_input(storage.join(attempt, unit.path)) as file, np.load(file) as arrays:
        return Ranked(**{name: arrays[name] for name in ("ids", "key", "shard", "row")})


def rank_unit(corpus: Corpus, unit: CoverUnit, attempt: str) -> Ranked:
    """Ranks the rows of each block of a unit.

    Raises:
        DataError: vectors are missing or of different lengths.
    """
    ids, vectors, shard, row = _rows_of(corpus, unit, attempt)
    blocks = _block_of(ids, unit.num_blocks)
    picked, keys = [], []
    for block in range(unit.first, unit.end):
        start, end = np.searchsorted(blocks, [block, block + 1]).tolist()
        size = end - start
        if not size:
            continue
        order = rank_greedily(vectors[start:end], num_ranked(unit, size))
        picked.append(start + order)
        keys.append((np.arange(len(order)) + 0.5) / size)
    place = np.concatenate([np.zeros(0, np.int64), *picked])
    return Ranked(
        ids=ids[place],
        key=np.concatenate([np.zeros(0), *keys]),
        shard=shard[place],
        row=row[place],
    )


def num_ranked(unit: CoverUnit, size: int) -> int:
    """The largest number of rows that the quota can take from a block of `size` rows.

    If t is the largest key taken, every block gives at least t n_b - 1/2 rows, so K is at least
    t N - m / 2 over m blocks; and a block gives at most t n_b + 1/2.
    """
    largest = (unit.quota + unit.num_blocks / 2.0) / max(unit.available, 1)
    return min(size, int(np.floor(largest * size + 0.5)) + 1)


def _block_of(ids: np.ndarray, num_blocks: int) -> np.ndarray:
    """[N] int64: the block of each id, a range of its first 32 bits."""
    heads = np.ascontiguousarray(ids[:, :4]).view(">u4").ravel().astype(np.int64)
    return (heads * num_blocks) >> 32


def _rows_of(
    corpus: Corpus, unit: CoverUnit, attempt: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, vectors and places of the unit's rows that have a vector, ordered by id."""
    parts: list[tuple[np.ndarray, ...]] = []
    sizes: set[int] = set()
    for number, shard in enumerate(corpus.shards("train", unit.category)):
        # Shards are ordered by id, so the first and the last id tell which blocks a shard touches.
        ends = np.frombuffer(bytes.fromhex(shard.first_id + shard.last_id), np.uint8)
        low, high = _block_of(ends.reshape(2, 16), unit.num_blocks).tolist()
        if high < unit.first or low >= unit.end:
            continue
        text = "".join(corpus.read_shard(shard, ["id"])["id"].to_pylist())
        ids = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 16)
        vectors, has_vector = read_vectors(attempt, shard)
        blocks = _block_of(ids, unit.num_blocks)
        rows = np.flatnonzero(has_vector & (blocks >= unit.first) & (blocks < unit.end))
        if len(rows):
            sizes.add(vectors.shape[1])
            places = np.full(len(rows), number, np.int32)
            parts.append((ids[rows], vectors[rows], places, rows.astype(np.int32)))
    if len(sizes) > 1:
        raise dimensions_differ(unit.category, min(sizes), max(sizes))
    if not parts:
        empty = np.zeros(0, np.int32)
        return np.zeros((0, 16), np.uint8), np.zeros((0, 1), np.int8), empty, empty
    ids, vectors, shards, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    halves = np.ascontiguousarray(ids).view(">u8").astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return ids[order], vectors[order], shards[order], rows[order]


def similarities(vectors_ND: np.ndarray) -> np.ndarray:
    """[N, N] int16: cosines of int8 rows, scaled to 0 ... 32767; negative ones are 0.

    The diagonal is 32767, also for zero rows.
    """
    size = len(vectors_ND)
    scaled = np.empty((size, size), np.int16)
    for start in range(0, size, _CHUNK_ROWS):
        part = cosines(vectors_ND[start : start + _CHUNK_ROWS], vectors_ND)
        scaled[start : start + _CHUNK_ROWS] = np.rint(np.clip(part, 0.0, 1.0) * _SCALE)
    np.fill_diagonal(scaled, int(_SCALE))
    return scaled


def rank_greedily(vectors_ND: np.ndarray, count: int) -> np.ndarray:
    """[count] places in greedy order: each adds most to f; among equals the first place wins."""
    similarity_NN = similarities(vectors_ND)
    covered = np.zeros(len(similarity_NN), np.int16)
    total = 0
    gains = similarity_NN.sum(axis=1, dtype=np.int64)
    heap = [(-gain, place) for place, gain in enumerate(gains.tolist())]
    heapq.heapify(heap)
    order = np.empty(count, np.int64)
    for rank in range(count):
        while True:
            _, place = heapq.heappop(heap)
            after = np.maximum(similarity_NN[place], covered)
            gain = int(after.sum(dtype=np.int64)) - total
            # Gains only shrink, so the old ones in the heap are upper bounds: a new gain that is
            # at least as large as all of them is the largest (lazy evaluation).
            if not heap or (-gain, place) <= heap[0]:
                break
            heapq.heappush(heap, (-gain, place))
        order[rank] = place
        covered, total = after, total + gain
    return order


def coverage(vectors_ND: np.ndarray, chosen: Sequence[int] | np.ndarray) -> int:
    """How well the rows at these places represent all rows: f, in steps of 2^-15."""
    if not len(chosen):
        return 0
    return int(similarities(vectors_ND)[np.asarray(chosen)].max(axis=0).sum(dtype=np.int64))
