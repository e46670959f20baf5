"""Which rows of a bucket stay, and in what order."""

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
        pa.field("id", pa.string(), nullable=False),  # of the row that stays
        pa.field("kind", pa.string(), nullable=False),  # exact | near
    ]
)
"""A row that another row stands for."""


KEYS = ("id", "category", "split", "file", "start", "place")


def in_order(table: pa.Table) -> pa.Table:
    """The keys of the rows by id, equal ids in the order of the input.

    Column `at` tells where the row stands in the table, whose bodies are not touched.
    """
    keys = table.select(list(KEYS)).append_column("at", pa.array(np.arange(table.num_rows)))
    return _by_id(keys)


def _by_id(keys: pa.Table) -> pa.Table:
    order = [(name, "ascending") for name in ("id", "file", "start", "place")]
    return keys.take(pc.sort_indices(keys, sort_keys=order))


def is_repeat(table: pa.Table) -> np.ndarray:
    """[rows] bool: whether the row before has the same id; the rows are `in_order`."""
    ids = table["id"].combine_chunks()
    same = np.zeros(table.num_rows, bool)
    if table.num_rows > 1:
        same[1:] = np.asarray(pc.equal(ids[1:], ids[:-1]))
    return same


def number_repeats(table: pa.Table) -> pa.Table:
    """Equal rows that all stay get ids of their own: the k-th repeat's is made from id and k.

    The first 8 digits stay, so the row stays in its bucket.
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
    """Split, category and rows of each pair that occurs; the order of the rows is kept."""
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
