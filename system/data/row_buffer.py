"""Collects normalised rows, column by column, until a chunk has enough of them to spill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from system.data.ingest.plan import SPILL, bucket_of_heads
from system.data.rows.conversation import Marks
from system.data.rows.labels import LabelColumns
from system.data.rows.normal_batch import ROLES, NormalBatch
from system.schema import EMBEDDING, MESSAGES


class RowBuffer:
    """Rows of one source that wait to become a SPILL table."""

    def __init__(self, source: str, num_buckets: int) -> None:
        self._source = source
        self._num_buckets = num_buckets
        self._clear()

    def _clear(self) -> None:
        # A few long values for each batch, not an object for each row: an object would have left
        # the processor's cache by the time `take` reads it again.
        self.num_rows = 0
        """Rows in the buffer."""
        self.num_bytes = 0
        self._ids: list[bytes] = []
        self._num_turns: list[int] = []
        self._roles = bytearray()
        self._texts: list[bytes] = []
        self._lengths: list[np.ndarray] = []
        self._marks: dict[int, Marks] = {}
        self._labels = LabelColumns([], [], [], [], [])
        self._places: list[np.ndarray] = []

    def add(self, batch: NormalBatch, labels: LabelColumns, places: np.ndarray) -> None:
        """Adds the rows of a batch.

        Args:
            batch: its accepted rows; `rejected` is ignored.
            labels: of the same rows.
            places: [rows, 4] int64: split, file, start of the file range, row within it.
        """
        self.num_rows += len(batch.ids)
        self._ids.append(b"".join(batch.ids))
        self._num_turns += batch.num_turns
        first = len(self._roles)
        self._marks |= {first + turn: mark for turn, mark in batch.marks.items()}
        self._roles += batch.roles
        self._texts.append(b"".join(batch.texts))
        self._lengths.append(np.fromiter(map(len, batch.texts), np.int64, len(batch.texts)))
        column: list[Any]
        for column, values in zip(self._labels, labels, strict=True):
            column.extend(values)
        self._places.append(places)
        self.num_bytes += batch.num_bytes
        self.num_bytes += 4 * sum(len(vector) for vector in labels.embedding if vector)

    def take(self) -> tuple[pa.Table, np.ndarray]:
        """Empties the buffer: a SPILL table of all rows, and the bucket of each row."""
        if not self.num_rows:
            return SPILL.empty_table(), np.zeros(0, np.int64)
        digests = np.frombuffer(b"".join(self._ids), np.uint8).reshape(-1, 16)
        heads = np.ascontiguousarray(digests[:, :4]).view(">u4")[:, 0]
        buckets = bucket_of_heads(heads, self._num_buckets)
        places = np.concatenate(self._places)
        labels = self._labels
        columns = {
            "id": _hex_strings(digests),
            "category": pa.array(labels.category, pa.string()),
            "source": pa.repeat(pa.scalar(self._source, pa.string()), len(digests)),
            "messages": self._messages(),
            "answer": pa.array(labels.answer, pa.string()),
            "answer_pattern": pa.array(labels.answer_pattern, pa.string()),
            "score": pa.array(labels.score, pa.float64()),
            "embedding": pa.array(labels.embedding, EMBEDDING),
            "split": pa.array(places[:, 0].astype(np.int8)),
            "file": pa.array(places[:, 1].astype(np.int32)),
            "start": pa.array(np.ascontiguousarray(places[:, 2])),
            "place": pa.array(np.ascontiguousarray(places[:, 3])),
        }
        self._clear()
        return pa.table(columns, schema=SPILL), buckets

    def _messages(self) -> pa.Array:
        codes = pa.array(np.frombuffer(self._roles, np.uint8).astype(np.int32))
        roles = pa.array(ROLES, pa.string()).take(codes)
        contents = _strings(b"".join(self._texts), np.concatenate(self._lengths))
        marks = [self._mark_column(name, len(roles)) for name in Marks._fields]
        fields = list(MESSAGES.value_type)
        turns = pa.StructArray.from_arrays([roles, contents, *marks], fields=fields)
        ends = np.cumsum([0, *self._num_turns]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), turns, type=MESSAGES)

    def _mark_column(self, name: str, num_turns: int) -> pa.Array:
        kind = MESSAGES.value_type.field(name).type
        if not self._marks:
            return pa.nulls(num_turns, kind)
        values: list[Any] = [None] * num_turns
        for turn, mark in self._marks.items():
            values[turn] = getattr(mark, name)
        return pa.array(values, kind)


def _strings(joined: bytes, lengths: np.ndarray) -> pa.Array:
    """Splits the joined texts at these lengths.  They are valid UTF-8, so nothing checks it."""
    assert len(joined) < 2**31, "the rows must be spilled before they need more than 32-bit offsets"
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(joined))


def _hex_strings(digests: np.ndarray) -> pa.Array:
    """[rows, 16] uint8 as 32 hex digits each."""
    text = digests.tobytes().hex().encode()
    ends = np.arange(0, len(text) + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(len(digests), pa.py_buffer(ends), pa.py_buffer(text))
