"""Exact duplicates within one bucket: the order of its rows, repeated ids, groups by category.

Called by `system.data.ingest.bucket`, which decides on near-duplicates as well.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from system.data.rows.conversation import SPLITS

DUPLICATES = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # 0-based, in file order
        pa.field("id", pa.string(), nullable=False),  # of the row that is kept
        pa.field("kind", pa.string(), nullable=False),  # exact | near
    ]
)
"""A removed duplicate, with the id of the row that is kept for it."""


KEYS = ("id", "category", "split", "file", "start", "place")


def in_order(table: pa.Table) -> pa.Table:
    """The key columns of the rows, sorted by id, equal ids in the order of the input.

    Column `at` is the row's index in the table, so that the long texts need not be sorted.
    """
    keys = table.select(list(KEYS)).append_column("at", pa.array(np.arange(table.num_rows)))
    return _by_id(keys)


def _by_id(keys: pa.Table) -> pa.Table:
    order = [(name, "ascending") for name in ("id", "file", "start", "place")]
    return keys.take(pc.sort_indices(keys, sort_keys=order))


def is_repeat(table: pa.Table) -> np.ndarray:
    """[rows] bool: whether the row before has the same id; the rows must be `in_order`."""
    ids = table["id"].combine_chunks()
    same = np.zeros(table.num_rows, bool)
    if table.num_rows > 1:
        same[1:] = np.asarray(pc.equal(ids[1:], ids[:-1]))
    return same


def number_repeats(table: pa.Table) -> pa.Table:
    """Gives equal rows different ids, for `deduplicate: none`, where all of them are kept.

    The id of the k-th repeat is made from the id and k.  It keeps the first 8 digits, which decide
    the bucket, so the row stays in its bucket.
    """
    ids = table["id"].to_pylist()
    numbered: list[str] = []
    count = 0
    for k, repeats in enumerate(is_repeat(table)):
        count = count + 1 if repeats else 0
        digest = hashlib.sha256(f"{ids[k]}:{count}".encode()).hexdigest()
        numbered.append(ids[k][:8] + digest[:24] if count else ids[k])
    place = table.schema.get_field_index("id")
    table = table.set_column(place, table.schema.field("id"), pa.array(numbered, pa.string()))
    return _by_id(table)


def split_by_category(table: pa.Table) -> Iterator[tuple[str, str | None, pa.Table]]:
    """(split, category, rows) for each pair of split and category; the rows keep their order."""
    if not table.num_rows:
        return
    names = pc.unique(table["category"]).to_pylist()
    names = sorted(name for name in names if name is not None)
    codes = pc.index_in(table["category"], value_set=pa.array(names, pa.string()))
    codes = np.asarray(pc.fill_null(codes, len(names)).combine_chunks())
    keys = np.asarray(table["split"]).astype(np.int64) * (len(names) + 1) + codes
    order = np.argsort(keys, kind="stable")
    present, starts = np.unique(keys[order], return_index=True)
    ends = [*starts[1:].tolist(), len(keys)]
    for key, start, end in zip(present.tolist(), starts.tolist(), ends, strict=True):
        split, code = divmod(key, len(names) + 1)
        category = names[code] if code < len(names) else None
        yield SPLITS[split], category, table.take(pa.array(order[start:end]))
