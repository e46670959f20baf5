"""Best-fit packing: short rows share a sequence, so that no rank idles on padding.

Packing only decides which rows travel together; attention never crosses rows and positions start
again at each (`system.training.attention`), so a packed training equals an unpacked one.
"""

from __future__ import annotations

import bisect

import numpy as np

from system.errors import DataError


def pack_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The sequence that each row goes into: best fit, longest rows first.

    The fullest sequence that still has room takes the row (ties: the lowest number), which never
    needs more than 11/9 of the optimum plus one sequence.  Source: Johnson 1973, best-fit
    decreasing.  Sequences are numbered by their fullest first row, so number 0 is never empty.

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
            f"row {worst} has {lengths[worst]} tokens, a sequence holds {capacity}: raise "
            "model.max_length or encode with the max_length that the plan is made for"
        )
    sequences = np.zeros(len(lengths), dtype=np.int32)
    free: list[tuple[int, int]] = []
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
    """Rows of one rank's share of a step, cut into forward passes of bounded size.

    Args:
        lengths: [rows] int64, tokens of each row.
        max_tokens: tokens of one pass; a longer row gets a pass of its own.
        is_padded: rows of a pass are padded to the longest, so rows of similar length go together
            and the padding counts; otherwise rows lie end to end.

    Returns:
        Row numbers of each pass, longest rows first.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[np.ndarray] = []
    current: list[int] = []
    tokens = 0
    for row in order:
        length = int(lengths[row])
        grown = (
            int(lengths[current[0]]) * (len(current) + 1)
            if is_padded and current
            else (tokens + length)
        )
        if current and grown > max_tokens:
            groups.append(np.array(current))
            current, tokens = [], 0
        current.append(int(row))
        tokens += length
    if current:
        groups.append(np.array(current))
    return groups
