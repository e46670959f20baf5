"""Keeps the best rows of a stream in bounded memory.

Rows are ordered by priority, highest first, then by `sha256(seed:id)`, so the order does not depend
on shards.  `system.selection.choose` streams the rows of a category through `Candidates`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

_PRUNE_SLACK = 1 << 16
"""Rows beyond 2 K that may wait before the rest is sorted out; sorting at each call costs more."""

Key = tuple[float, int, int]
"""Sort key of a row: its priority and the two halves of its digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a category, as columns: where they are and how they sort."""

    ids: np.ndarray
    """[K, 16] uint8: content ids."""
    digest: np.ndarray
    """[K, 2] uint64."""
    priority: np.ndarray
    """[K] float64."""
    shard: np.ndarray
    """[K] int32: place in `Corpus.shards("train", category)`."""
    row: np.ndarray
    """[K] int32: row within the shard."""

    def take(self, places: np.ndarray) -> Rows:
        """The rows at these places."""
        return Rows(**{item.name: getattr(self, item.name)[places] for item in fields(self)})

    def key(self, place: int) -> Key:
        """The sort key of one row."""
        high, low = self.digest[place].tolist()
        return float(self.priority[place]), high, low

    def hex_ids(self, places: np.ndarray) -> list[str]:
        """The content ids of some rows, as hexadecimal text."""
        text = self.ids[places].tobytes().hex()
        return [text[start : start + 32] for start in range(0, len(text), 32)]

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """The concatenation of the parts."""
        if not parts:
            return Rows(
                ids=np.zeros((0, 16), np.uint8),
                digest=np.zeros((0, 2), np.uint64),
                priority=np.zeros(0),
                shard=np.zeros(0, np.int32),
                row=np.zeros(0, np.int32),
            )
        return Rows(
            **{
                item.name: np.concatenate([getattr(part, item.name) for part in parts])
                for item in fields(Rows)
            }
        )


def digests(prefix: str, ids: Sequence[str], suffix: str = "") -> np.ndarray:
    """[N, 2] uint64: sort keys, the first 128 bits of `sha256(prefix + id + suffix)`."""
    head = hashlib.sha256(prefix.encode())
    parts = []
    for row_id in ids:
        digest = head.copy()
        digest.update((row_id + suffix).encode())
        parts.append(digest.digest()[:16])
    return np.frombuffer(b"".join(parts), ">u8").reshape(-1, 2).astype(np.uint64)


class Candidates:
    """The best rows so far: at most 2 K + 65,536 of them, 48 bytes each.

    Args:
        num_rows: K, the number of rows to keep.
        seed: seed of the order among rows of equal priority.
        after: keep only rows that come after this key; None: all.
    """

    def __init__(self, num_rows: int, seed: int, after: Key | None = None) -> None:
        self._num_rows = num_rows
        self._prefix = f"{seed}:"
        self._after = after
        self._last: Key | None = None
        self._parts: list[Rows] = []
        self._num_kept = 0

    def add(self, ids: pa.ChunkedArray, priority: np.ndarray, rows: np.ndarray, shard: int) -> None:
        """Offers some rows of a shard.

        Args:
            ids: ids of all rows of the shard.
            priority: [N] float64: priorities of the offered rows.
            rows: [N] int32: numbers of the offered rows in the shard.
            shard: place of the shard in the category.
        """
        # Digests take most of the time, and the priority alone rules out most rows.
        keep = np.ones(len(priority), bool)
        if self._last is not None:
            keep &= priority >= self._last[0]
        if self._after is not None:
            keep &= priority <= self._after[0]
        rows, priority = rows[keep], priority[keep]
        names = (ids if len(rows) == len(ids) else ids.take(pa.array(rows))).to_pylist()
        self.add_ids(names, priority, np.full(len(rows), shard, np.int32), rows)

    def add_ids(
        self, names: list[str], priority: np.ndarray, shard: np.ndarray, row: np.ndarray
    ) -> None:
        """Offers rows by their ids."""
        digest = digests(self._prefix, names)
        keep = np.ones(len(names), bool)
        if self._last is not None:
            keep &= ~_is_behind(priority, digest, self._last)
        if self._after is not None:
            keep &= _is_behind(priority, digest, self._after)
        kept_names = names if keep.all() else [names[place] for place in np.flatnonzero(keep)]
        ids = np.frombuffer(bytes.fromhex("".join(kept_names)), np.uint8).reshape(-1, 16)
        self._parts.append(
            Rows(
                ids=ids,
                digest=digest[keep],
                priority=priority[keep],
                shard=shard[keep],
                row=row[keep],
            )
        )
        self._num_kept += len(ids)
        if self._num_kept > 2 * self._num_rows + _PRUNE_SLACK:
            self._prune()

    def _prune(self) -> None:
        rows = Rows.joined(self._parts)
        order = np.lexsort((rows.digest[:, 1], rows.digest[:, 0], -rows.priority))[: self._num_rows]
        rows = rows.take(order)
        self._parts, self._num_kept = [rows], len(order)
        if self._num_kept == self._num_rows and self._num_rows:
            self._last = rows.key(-1)

    def best(self) -> Rows:
        """The K best rows, best first; all rows when there are fewer."""
        self._prune()
        return self._parts[0]


def _is_behind(priority: np.ndarray, digest: np.ndarray, key: Key) -> np.ndarray:
    """[N] bool: which rows come after this key."""
    key_priority, high, low = key[0], np.uint64(key[1]), np.uint64(key[2])
    later = (digest[:, 0] > high) | ((digest[:, 0] == high) & (digest[:, 1] > low))
    return (priority < key_priority) | ((priority == key_priority) & later)
