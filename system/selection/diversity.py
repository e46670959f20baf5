"""`quality+diversity`: takes rows best score first, but none that is too similar to a better one.

Score-first selection with a limit on similarity.  Source: Liu et al. 2023 (DEITA, arXiv
2312.15685), section 2.4.  Rows come in the order of their scores, in windows of bounded size.  A
row is taken if its cosine with every row taken so far is at most the limit.  Windows only bound
the memory: the outcome is that of one pass over the whole category in order, whatever the shards.
"""

from __future__ import annotations

import numpy as np

from system.selection.embed import dimensions_differ
from system.selection.vectors import cosines

_BLOCK_ROWS = 512
_CHUNK_ROWS = 2048


class DiverseRows:
    """Holds the vectors of the rows taken so far: D bytes for each."""

    def __init__(self, num_rows: int, max_similarity: float) -> None:
        self._num_rows = num_rows
        self._limit = max_similarity
        self._vectors = np.zeros((0, 0), np.int8)
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether the requested number of rows is taken."""
        return self._count >= self._num_rows

    def offer(self, vectors_ND: np.ndarray) -> tuple[np.ndarray, int]:
        """Takes the rows that are different enough, best first, until it is full.

        Returns:
            Places of the rows taken, and the number of rows that were compared until it was full.

        Raises:
            DataError: the vectors have another length than earlier ones.
        """
        self._make_room(vectors_ND.shape[1])
        taken: list[int] = []
        for start in range(0, len(vectors_ND), _BLOCK_ROWS):
            block = vectors_ND[start : start + _BLOCK_ROWS]
            taken += [start + place for place in self._offer_block(block)]
            if self.is_full:
                return np.array(taken, np.int64), taken[-1] + 1 if taken else 0
        return np.array(taken, np.int64), len(vectors_ND)

    def _offer_block(self, block_BD: np.ndarray) -> list[int]:
        is_apart = np.ones(len(block_BD), bool)
        for start in range(0, self._count, _CHUNK_ROWS):
            earlier = self._vectors[start : min(start + _CHUNK_ROWS, self._count)]
            is_apart &= (cosines(block_BD, earlier) <= self._limit).all(axis=1)
        # Within the block the order matters: a row is compared with the better ones taken from it.
        is_similar_BB = cosines(block_BD, block_BD) > self._limit
        taken = np.zeros(len(block_BD), bool)
        for place in np.flatnonzero(is_apart).tolist():
            if self._count >= self._num_rows:
                break
            if not (is_similar_BB[place] & taken).any():
                taken[place] = True
                self._vectors[self._count] = block_BD[place]
                self._count += 1
        return np.flatnonzero(taken).tolist()

    def _make_room(self, dimensions: int) -> None:
        if not self._vectors.size:
            self._vectors = np.zeros((self._num_rows, dimensions), np.int8)
        elif dimensions != self._vectors.shape[1]:
            raise dimensions_differ("offered", self._vectors.shape[1], dimensions)
