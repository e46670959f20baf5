"""The best rows of a stream, in bounded memory, in an order that no shard decides.

Rows are ordered by worth, highest first, then by `sha256(seed:id)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

_PRUNE_SLACK = 1 << 16

Key = tuple[float, int, int]
"""Worth and digest of a row: its place in the order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows by their place in a category."""

    ids: np.ndarray
    """[K, 16] uint8: content ids."""
    digest: np.ndarray
    """[K, 2] uint64."""
    worth: np.ndarray
    """[K] float64."""
    shard: np.ndarray
    """[K] int32: place in `Corpus.shards("train", category)`."""
    row: np.ndarray
    """[K] int32: row within the shard."""

    def take(self, places: np.ndarray) -> Rows:
        """These of the rows."""
        return Rows(**{item.name: getattr(self, item.name)[places] for item in fields(self)})

    def key(self, place: int) -> Key:
        """Where a row stands in the order."""
        high, low = self.digest[place].tolist()
        return float(self.worth[place]), high, low

    def hex_ids(self, places: np.ndarray) -> list[str]:
        """Content ids as text."""
        text = self.ids[places].tobytes().hex()
        return [text[start : start + 32] for start in range(0, len(text), 32)]

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All rows of the parts, in their order."""
        if not parts:
            return Rows(
                ids=np.zeros((0, 16), np.uint8),
                digest=np.zeros((0, 2), np.uint64),
                worth=np.zeros(0),
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
    """[N, 2] uint64: first 128 bits of `sha256(prefix + id + suffix)`, to sort by."""
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
        num_rows: K, how many are wanted.
        seed: of the order among rows of equal worth.
        after: only rows behind this place in the order; None: all.
    """

    def __init__(self, num_rows: int, seed: int, after: Key | None = None) -> None:
        self._num_rows = num_rows
        self._prefix = f"{seed}:"
        self._after = after
        self._last: Key | None = None
        self._parts: list[Rows] = []
        self._held = 0

    def add(self, ids: pa.ChunkedArray, worth: np.ndarray, rows: np.ndarray, shard: int) -> None:
        """Shows rows of a shard.

        Args:
            ids: of all rows of the shard.
            worth: [N] float64, of the rows shown.
            rows: [N] int32: which rows of the shard these are.
            shard: its place in the category.
        """
        # Digests are what costs; most rows are behind the last one already by their worth.
        keep = np.ones(len(worth), bool)
        if self._last is not None:
            keep &= worth >= self._last[0]
        if self._after is not None:
            keep &= worth <= self._after[0]
        rows, worth = rows[keep], worth[keep]
        names = (ids if len(rows) == len(ids) else ids.take(pa.array(rows))).to_pylist()
        self.add_ids(names, worth, np.full(len(rows), shard, np.int32), rows)

    def add_ids(
        self, names: list[str], worth: np.ndarray, shard: np.ndarray, row: np.ndarray
    ) -> None:
        """Shows rows by their ids."""
        digest = digests(self._prefix, names)
        keep = np.ones(len(names), bool)
        if self._last is not None:
            keep &= ~_is_behind(worth, digest, self._last)
        if self._after is not None:
            keep &= _is_behind(worth, digest, self._after)
        kept = names if keep.all() else [names[place] for place in np.flatnonzero(keep)]
        ids = np.frombuffer(bytes.fromhex("".join(kept)), np.uint8).reshape(-1, 16)
        self._parts.append(
            Rows(ids=ids, digest=digest[keep], worth=worth[keep], shard=shard[keep], row=row[keep])
        )
        self._held += len(ids)
        if self._held > 2 * self._num_rows + _PRUNE_SLACK:
            self._prune()

    def _prune(self) -> None:
        held = Rows.joined(self._parts)
        order = np.lexsort((held.digest[:, 1], held.digest[:, 0], -held.worth))[: self._num_rows]
        held = held.take(order)
        self._parts, self._held = [held], len(order)
        if self._held == self._num_rows and self._num_rows:
            self._last = held.key(-1)

    def best(self) -> Rows:
        """The first K rows, best first; all where there are no more."""
        self._prune()
        return self._parts[0]


def _is_behind(worth: np.ndarray, digest: np.ndarray, key: Key) -> np.ndarray:
    """[N] bool: rows that come after a place in the order."""
    least, high, low = key[0], np.uint64(key[1]), np.uint64(key[2])
    later = (digest[:, 0] > high) | ((digest[:, 0] == high) & (digest[:, 1] > low))
    return (worth < least) | ((worth == least) & later)
