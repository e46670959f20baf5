"""Selecting rows of tables whose texts are large.

Arrow counts the bytes of a text column in 32 bits: a table may hold more than 2 GiB in many
batches, but one batch may not.  So only the selected rows are copied into one batch, never the
whole table.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

_SMALL_BYTES = 2**30
"""A table that is put into one batch as it is: moving all of it once is cheaper than searching."""


def text_bytes(table: pa.Table) -> np.ndarray:
    """[rows] int64: UTF-8 bytes of all turns of each row, reasoning included."""
    sizes = [np.zeros(0, np.int64)]
    for turns in table["messages"].chunks:
        if not len(turns):
            continue
        bounds = np.asarray(turns.offsets)
        ends = _byte_ends(turns.values.field("content"))
        ends += _byte_ends(turns.values.field("reasoning"))
        sizes.append(ends[bounds[1:]] - ends[bounds[:-1]])
    return np.concatenate(sizes)


def _byte_ends(texts: pa.StringArray) -> np.ndarray:
    """[texts + 1] int64: where each text begins in the joined bytes, and where the last ends."""
    ends = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset :]
    return ends[: len(texts) + 1].astype(np.int64)


def take_rows(table: pa.Table, places: np.ndarray) -> pa.Table:
    """The rows at these places, in this order, as one batch; together they stay below 2 GiB."""
    if table.nbytes < _SMALL_BYTES:
        return table.combine_chunks().take(pa.array(places))
    order = np.argsort(places, kind="stable")
    ascending = places[order]
    batches = table.to_batches()
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    cuts = np.searchsorted(ascending, starts)
    parts = [
        batch.take(pa.array(ascending[begin:end] - start))
        for batch, start, begin, end in zip(batches, starts, cuts, cuts[1:], strict=False)
        if end > begin
    ]
    taken = pa.Table.from_batches(parts, table.schema).combine_chunks()
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return taken.take(pa.array(back))


def cut_by_bytes(sizes: np.ndarray, most: int) -> Iterator[slice]:
    """Runs of rows of at most so many bytes; a row that alone has more is a run of its own."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(start, end)
        start = end
