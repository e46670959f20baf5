"""Which rows with a common band are near-duplicates, in groups of any size.

In a group of up to FULL_GROUP_ROWS rows each row is compared with each.  A larger one has a long
text in common (a template) that makes a band alike, or is one text in many copies; there a row is
compared with at most NUM_LEADERS + 2 * NUM_NEIGHBOURS others, so that the work grows with the rows
and not with their square.  Copies of one text all find its first row.  Which rows are compared
follows from the group's rows alone.

Shapes: R rows, K bins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from system.data.duplicates.shingles import NUM_BINS

FULL_GROUP_ROWS = 512
NUM_LEADERS = 256
NUM_NEIGHBOURS = 64

Pairs = tuple[np.ndarray, np.ndarray]
"""Places of the later and of the earlier row of each pair."""

_CANDIDATES = 2**18
_COMPARED_AT_ONCE = 8192
_NONE: Pairs = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def near_pairs(
    signatures_RK: np.ndarray, keys: np.ndarray, is_wanted: np.ndarray, least: int
) -> Pairs:
    """(later, earlier) places of near-duplicates within the groups, in that order.

    Args:
        signatures_RK: of the rows, group by group, in a group the earliest first.
        keys: [R] of the groups.
        is_wanted: whether pairs are asked for of which the row is the later one.
        least: bins that have to agree.
    """
    _, starts = np.unique(keys, return_index=True)
    sizes = np.diff([*starts.tolist(), len(signatures_RK)])
    found = [_NONE]
    for later, earlier in _small_groups(starts, sizes):
        asked = is_wanted[later]
        found.append(_hits(signatures_RK, later[asked], earlier[asked], least))
    for group in np.flatnonzero(sizes > FULL_GROUP_ROWS).tolist():
        rows = slice(starts[group], starts[group] + sizes[group])
        for later, earlier in _large_group(signatures_RK[rows], int(keys[rows.start]), least):
            asked = is_wanted[rows][later]
            found.append((later[asked] + rows.start, earlier[asked] + rows.start))
    later, earlier = (np.concatenate(places) for places in zip(*found, strict=True))
    order = np.lexsort([earlier, later])
    return later[order], earlier[order]


def _small_groups(starts: np.ndarray, sizes: np.ndarray) -> Iterator[Pairs]:
    """All pairs within the groups that are not large, some at a time."""
    for size in np.unique(sizes[(sizes > 1) & (sizes <= FULL_GROUP_ROWS)]).tolist():
        own = starts[sizes == size]
        for distance in range(1, size):
            first = np.arange(size - distance)
            step = max(1, _CANDIDATES // len(first))
            for k in range(0, len(own), step):
                earlier = (own[k : k + step, None] + first).ravel()
                yield earlier + distance, earlier


def _large_group(signatures_RK: np.ndarray, key: int, least: int) -> Iterator[Pairs]:
    """Near-duplicates in one group, the earliest row first: what a bounded search finds.

    First the rows before which no near one was found are compared with all rows that are still
    without one, the first NUM_LEADERS of them.  Then each row is compared with its neighbours in
    the order of the signatures: rows that agree in much more than the band stand beside each other.
    """
    left = np.arange(len(signatures_RK))
    for _ in range(NUM_LEADERS):
        if len(left) < 2:
            break
        leader, left = left[0], left[1:]
        leaders = np.full(len(left), leader)
        is_near = _agreement(signatures_RK, left, leaders) >= least
        yield left[is_near], leaders[is_near]
        left = left[~is_near]
    order = _signature_order(signatures_RK, key % NUM_BINS)
    for distance in range(1, NUM_NEIGHBOURS + 1):
        one, two = order[:-distance], order[distance:]
        yield _hits(signatures_RK, np.maximum(one, two), np.minimum(one, two), least)


def _signature_order(signatures_RK: np.ndarray, first_bin: int) -> np.ndarray:
    """The rows by their signatures, read from a bin on that differs from band to band."""
    turned = np.ascontiguousarray(np.roll(signatures_RK, -first_bin, axis=1))
    return np.argsort(turned.view(f"S{NUM_BINS}").ravel(), kind="stable")


def _hits(signatures_RK: np.ndarray, later: np.ndarray, earlier: np.ndarray, least: int) -> Pairs:
    is_near = _agreement(signatures_RK, later, earlier) >= least
    return later[is_near], earlier[is_near]


def _agreement(signatures_RK: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """[len(one)] in how many bins the signatures of each pair of rows agree."""
    agree = np.empty(len(one), np.int64)
    for k in range(0, len(one), _COMPARED_AT_ONCE):
        part = slice(k, k + _COMPARED_AT_ONCE)
        same = signatures_RK[one[part]] == signatures_RK[two[part]]
        agree[part] = np.count_nonzero(same, axis=1)
    return agree
