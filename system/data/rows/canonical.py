"""Arrow tables whose bytes depend on their rows alone."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def canonical_table(table: pa.Table) -> pa.Table:
    """The same rows in buffers that depend on nothing but the rows.

    Offsets start at 0, a validity bitmap exists only where there are nulls, and what lies under a
    null is zero.
    """
    columns = [_canonical_array(table.column(name).combine_chunks()) for name in table.column_names]
    return pa.table(columns, schema=table.schema)


def _canonical_array(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    mask = array.is_null() if array.null_count else None
    kind = array.type
    if pa.types.is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths))]).astype(np.int32)
        values = _canonical_array(array.flatten())
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=mask)
    if pa.types.is_struct(kind):
        children = [_canonical_array(child) for child in array.flatten()]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if mask is None:
        if array.offset == 0 and array.buffers()[0] is None and _starts_at_zero(array):
            return array
        if pa.types.is_string(kind) and len(array):
            return _rebased(array)
        return pc.take(array, pa.array(np.arange(len(array))))
    zero = "" if pa.types.is_string(kind) else False if pa.types.is_boolean(kind) else 0
    filled = pc.fill_null(array, pa.scalar(zero, kind))
    return pc.if_else(mask, pa.scalar(None, kind), filled)


def _rebased(strings: pa.Array) -> pa.Array:
    """Strings without nulls with offsets of their own; their bytes are not copied."""
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    own = data.slice(int(ends[0]), int(ends[-1] - ends[0])) if data is not None else None
    return pa.StringArray.from_buffers(len(strings), pa.py_buffer(ends - ends[0]), own)


def _starts_at_zero(array: pa.Array) -> bool:
    if not pa.types.is_string(array.type) or not len(array):
        return not pa.types.is_string(array.type)
    return int(np.frombuffer(array.buffers()[1], np.int32, 1)[0]) == 0
