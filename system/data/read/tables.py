"""Reads the rows of Parquet and Arrow files in batches of limited rows and bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from system import storage
from system.data.read import blocks
from system.data.read.container_limits import (
    check_arrow_sizes,
    check_parquet_sizes,
    read_row_groups,
)
from system.data.read.raw_rows import TOO_LONG, Defect, RawRow, bad_utf8
from system.errors import DataError
from system.foreign_tables import checked, class_labels, expanded_bytes, python_rows

BATCH_ROWS = 1024
"""Most rows in a batch."""
BATCH_BYTES = 16 * 2**20
"""About the most bytes in a batch, where rows are large."""

_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def parquet_batches(uri: str, start: int, end: int | None) -> Iterator[pa.RecordBatch]:
    """The rows of the row groups from `start` up to `end` (excluded)."""
    with storage.open_input(uri) as file:
        metadata = pq.read_metadata(file)
        groups = read_row_groups(file)
        for group in range(start, metadata.num_row_groups if end is None else end):
            shared = check_parquet_sizes(file, groups[group])
            file.seek(0)
            parquet = pq.ParquetFile(file, metadata=metadata, read_dictionary=shared)
            rows = _rows_at_once(metadata, [group])
            yield from parquet.iter_batches(batch_size=rows, row_groups=[group])


def _rows_at_once(metadata: Any, groups: list[int]) -> int:
    metas = [metadata.row_group(group) for group in groups]
    row_bytes = max((meta.total_byte_size // max(meta.num_rows, 1) for meta in metas), default=0)
    return min(BATCH_ROWS, max(1, BATCH_BYTES // max(row_bytes, 1)))


def arrow_batches(uri: str, start: int = 0, end: int | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of the record batches from `start` up to `end` (excluded), or of a whole stream.

    Raises:
        DataError: a stream ends without its end mark, so rows may be missing.
    """
    with _open_arrow(uri) as (source, is_file):
        check_arrow_sizes(source, is_file, start, end)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            last = reader.num_record_batches if end is None else end
            batches = (reader.get_batch(k) for k in range(start, last))
        else:
            batches = _stream_batches(source, uri)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def count_arrow_batches(uri: str) -> int | None:
    """Number of record batches in an Arrow file; None for a stream, which has no list of them.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with _open_arrow(uri) as (source, is_file):
            return pyarrow.ipc.open_file(source).num_record_batches if is_file else None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: expected an Arrow file; it cannot be read: {error}") from error


@contextlib.contextmanager
def _open_arrow(uri: str) -> Iterator[tuple[pa.NativeFile, bool]]:
    """The open file, and whether it has the Arrow file format (else the stream format)."""
    path = storage.local_path(uri)
    source = (
        pa.memory_map(str(path))
        if path is not None
        else pa.PythonFile(storage.open_input(uri), mode="r")
    )
    with source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        yield source, is_file


def _stream_batches(source: pa.NativeFile, uri: str) -> Iterator[pa.RecordBatch]:
    reader = pyarrow.ipc.open_stream(source)
    while True:
        place = source.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            break
        yield batch
    # The library treats the end of the file as the end of the stream, so look for the mark here.
    source.seek(place)
    if source.read(len(_STREAM_END)) != _STREAM_END:
        raise DataError(
            f"{uri}: expected the end mark of an Arrow stream, found the end of the file after a "
            "batch. The file is cut off, or its writer was not closed; download or write it again."
        )


def rows_of_batches(batches: Iterator[pa.RecordBatch], where: str) -> Iterator[list[RawRow]]:
    """The rows of the batches as dicts.

    Raises:
        DataError: the file is damaged, or has columns of a type that cannot be read.
    """
    number = 0
    while True:
        try:
            batch = next(batches, None)
            batch = None if batch is None else checked(batch)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{where}: expected a whole Parquet or Arrow file; row {number} and what follows "
                f"cannot be read: {error}"
            ) from error
        if batch is None:
            return
        labels = class_labels(batch.schema)
        for part in _small_parts(batch):
            yield _values_of_batch(part, labels)
        number += batch.num_rows


def _small_parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Halves the batch until each part has one row or at most BATCH_BYTES."""
    if batch.num_rows <= 1 or expanded_bytes(batch, BATCH_BYTES) <= BATCH_BYTES:
        yield batch
        return
    middle = batch.num_rows // 2
    yield from _small_parts(batch.slice(0, middle))
    yield from _small_parts(batch.slice(middle))


def _values_of_batch(batch: pa.RecordBatch, labels: dict[str, list[str]]) -> list[RawRow]:
    limit = blocks.MAX_ROW_BYTES
    if batch.num_rows == 1 and expanded_bytes(batch, limit) > limit:
        return [TOO_LONG]
    # One bad value makes the whole conversion fail; then each row is converted alone.
    try:
        rows: list[Any] = python_rows(batch, labels)
        return rows
    except (ValueError, OverflowError, KeyError) as error:
        if batch.num_rows == 1:
            return [_defect(error)]
        single = (batch.slice(k, 1) for k in range(batch.num_rows))
        return [row for part in single for row in _values_of_batch(part, labels)]


def _defect(error: Exception) -> Defect:
    if isinstance(error, UnicodeDecodeError):
        return bad_utf8(error.object[error.start])
    reason = "bad-json" if isinstance(error, json.JSONDecodeError) else "bad-value"
    return Defect(reason, str(error))
