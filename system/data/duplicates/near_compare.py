"""Compares rows that share a band and returns the near-duplicates; called by `near`.

A group holds the rows with one key.  In a group of up to FULL_GROUP_ROWS rows each row is compared
with each other row.  In a larger group the rows share a long text (a template), or they are copies
of one text.  There a row is compared with at most NUM_LEADERS + 2 * NUM_NEIGHBOURS others, so the
work grows with the number of rows and not with its square.  All copies of one text find its first
row.  The rows of the group alone decide which rows are compared.

Shapes: R rows, K bins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from system.data.duplicates.shingles import NUM_BINS

FULL_GROUP_ROWS = 512
"""Largest group in which each row is compared with each other row."""
NUM_LEADERS = 256
"""Rows of a larger group that are compared with all rows without a near-duplicate so far."""
NUM_NEIGHBOURS = 64
"""Neighbours on each side, in the order of the signatures, that a row is compared with."""

Pairs = tuple[np.ndarray, np.ndarray]
"""Index of the later and of the earlier row of each pair."""

_PAIRS_AT_ONCE = 2**18
_COMPARED_AT_ONCE = 8192
_NO_PAIRS: Pairs = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def near_pairs(
    signatures_RK: np.ndarray, keys: np.ndarray, is_searched: np.ndarray, min_bins: int
) -> Pairs:
    """Pairs of near-duplicates within the groups, sorted by later row, then by earlier row.

    Args:
        signatures_RK: of the rows, group by group, the earliest row of each group first.
        keys: [R] key of each row's group, ascending.
        is_searched: [R] whether to return the pairs in which the row is the later one.
        min_bins: number of bins that have to agree.
    """
    _, starts = np.unique(keys, return_index=True)
    sizes = np.diff([*starts.tolist(), len(signatures_RK)])
    pairs = [_NO_PAIRS]
    for later, earlier in _small_groups(starts, sizes):
        searched = is_searched[later]
        pairs.append(_near(signatures_RK, later[searched], earlier[searched], min_bins))
    for group in np.flatnonzero(sizes > FULL_GROUP_ROWS).tolist():
        rows = slice(starts[group], starts[group] + sizes[group])
        for later, earlier in _large_group(signatures_RK[rows], int(keys[rows.start]), min_bins):
            searched = is_searched[rows][later]
            pairs.append((later[searched] + rows.start, earlier[searched] + rows.start))
    later, earlier = (np.concatenate(places) for places in zip(*pairs, strict=True))
    order = np.lexsort([earlier, later])
    return later[order], earlier[order]


def _small_groups(starts: np.ndarray, sizes: np.ndarray) -> Iterator[Pairs]:
    """All pairs within the groups that are not large, at most about _PAIRS_AT_ONCE at a time."""
    # All groups of one size, and all pairs of one distance, are made in one numpy operation.
    for size in np.unique(sizes[(sizes > 1) & (sizes <= FULL_GROUP_ROWS)]).tolist():
        group_starts = starts[sizes == size]
        for distance in range(1, size):
            first = np.arange(size - distance)
            step = max(1, _PAIRS_AT_ONCE // len(first))
            for k in range(0, len(group_starts), step):
                earlier = (group_starts[k : k + step, None] + first).ravel()
                yield earlier + distance, earlier


def _large_group(signatures_RK: np.ndarray, key: int, min_bins: int) -> Iterator[Pairs]:
    """Near-duplicates that a bounded search finds in one large group.

    The first pass takes up to NUM_LEADERS leaders.  A leader is the earliest row that is not yet
    near to another one; it is compared with all later rows of this kind.  The second pass compares
    each row with its neighbours in the order of the signatures, where rows that agree in many more
    bins than the band stand close together.
    """
    unmatched = np.arange(len(signatures_RK))
    for _ in range(NUM_LEADERS):
        if len(unmatched) < 2:
            break
        leader, unmatched = unmatched[0], unmatched[1:]
        leaders = np.full(len(unmatched), leader)
        is_near = _agreement(signatures_RK, unmatched, leaders) >= min_bins
        yield unmatched[is_near], leaders[is_near]
        unmatched = unmatched[~is_near]
    order = _signature_order(signatures_RK, key % NUM_BINS)
    for distance in range(1, NUM_NEIGHBOURS + 1):
        one, two = order[:-distance], order[distance:]
        yield _near(signatures_RK, np.maximum(one, two), np.minimum(one, two), min_bins)


def _signature_order(signatures_RK: np.ndarray, first_bin: int) -> np.ndarray:
    """The rows sorted by their signatures, which are read from `first_bin` on.

    The first bin differs from band to band, so a pair that one order keeps apart may stand together
    in another.
    """
    turned = np.ascontiguousarray(np.roll(signatures_RK, -first_bin, axis=1))
    return np.argsort(turned.view(f"S{NUM_BINS}").ravel(), kind="stable")


def _near(
    signatures_RK: np.ndarray, later: np.ndarray, earlier: np.ndarray, min_bins: int
) -> Pairs:
    is_near = _agreement(signatures_RK, later, earlier) >= min_bins
    return later[is_near], earlier[is_near]


def _agreement(signatures_RK: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """[len(one)] the number of bins in which the two signatures of each pair agree."""
    agree = np.empty(len(one), np.int64)
    for k in range(0, len(one), _COMPARED_AT_ONCE):
        part = slice(k, k + _COMPARED_AT_ONCE)
        same = signatures_RK[one[part]] == signatures_RK[two[part]]
        agree[part] = np.count_nonzero(same, axis=1)
    return agree
