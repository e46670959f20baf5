"""Best-fit packing: short rows share a sequence, so that little time is spent on padding.

Packing decides only which rows share a forward pass.  Attention stays within a row and positions
start at 0 in each row (`system.training.attention`), so packing does not change the training.
"""

from __future__ import annotations

import bisect

import numpy as np

from system.errors import DataError


def pack_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The sequence of each row: best fit, longest rows first.

    A row goes into the fullest sequence that has room for it (ties: the lowest number).  This needs
    at most 11/9 of the optimal number of sequences plus one.  Source: Johnson 1973, best-fit
    decreasing.  Sequences are numbered in the order in which they are opened.

    Args:
        lengths: [rows] int64, tokens of each row.
        capacity: tokens of a sequence.

    Returns:
        [rows] int32.

    Raises:
        DataError: a row is longer than a sequence.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        worst = int(lengths.argmax())
        raise DataError(
            f"row {worst} has {lengths[worst]} tokens, but a sequence holds at most {capacity}: "
            "raise model.max_length, or encode the rows with the max_length of the plan"
        )
    sequences = np.zeros(len(lengths), dtype=np.int32)
    free: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    count = 0
    for row in np.argsort(-lengths, kind="stable"):
        length = int(lengths[row])
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            room, sequence = capacity, count
            count += 1
        else:
            room, sequence = free.pop(place)
        sequences[row] = sequence
        bisect.insort(free, (room - length, sequence))
    return sequences


def group_by_tokens(lengths: np.ndarray, max_tokens: int, *, is_padded: bool) -> list[np.ndarray]:
    """Splits the rows of one rank in a step into forward passes of bounded size.

    Args:
        lengths: [rows] int64, tokens of each row.
        max_tokens: tokens of one pass; a longer row gets its own pass.
        is_padded: whether the rows of a pass are padded to the longest, so that padding counts;
            otherwise rows are concatenated.

    Returns:
        Row numbers of each pass, longest rows first.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[np.ndarray] = []
    current: list[int] = []
    tokens = 0
    for row in order:
        length = int(lengths[row])
        # With padding, every row of a pass costs as much as its longest, which is the first.
        new_size = (
            int(lengths[current[0]]) * (len(current) + 1)
            if is_padded and current
            else (tokens + length)
        )
        if current and new_size > max_tokens:
            groups.append(np.array(current))
            current, tokens = [], 0
        current.append(int(row))
        tokens += length
    if current:
        groups.append(np.array(current))
    return groups
