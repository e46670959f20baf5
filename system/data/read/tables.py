"""Rows of Parquet and Arrow files, some at a time: so many, or so many bytes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from system import storage
from system.data.read import blocks
from system.data.read.raw_rows import TOO_LONG, Defect, RawRow
from system.errors import DataError

BATCH_ROWS = 1024
"""Rows that are read at once where they are small."""
BATCH_BYTES = 16 * 2**20
"""About as many bytes where they are not."""

_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def parquet_batches(uri: str, start: int, end: int | None) -> Iterator[pa.RecordBatch]:
    """The rows of the row groups from `start` to before `end`."""
    with storage.open_input(uri) as file:
        parquet = pq.ParquetFile(file)
        end = parquet.num_row_groups if end is None else end
        groups = list(range(start, end))
        rows = _rows_at_once(parquet.metadata, groups)
        yield from parquet.iter_batches(batch_size=rows, row_groups=groups)


def _rows_at_once(metadata: Any, groups: list[int]) -> int:
    found = [metadata.row_group(group) for group in groups]
    row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in found), default=0)
    return min(BATCH_ROWS, max(1, BATCH_BYTES // max(row_bytes, 1)))


def arrow_batches(uri: str, start: int = 0, end: int | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of an Arrow file's record batches `start` to before `end`, or of a whole stream.

    Raises:
        DataError: a stream ends without its mark, so nobody knows what is missing.
    """
    with _open_arrow(uri) as (source, is_file):
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
    """Record batches of an Arrow file; None of a stream, which has no list of them.

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
    """The file, and whether it is one in the file format, not a stream."""
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
    # The library takes the end of the file for the end of the stream.
    source.seek(place)
    if source.read(len(_STREAM_END)) != _STREAM_END:
        raise DataError(
            f"{uri}: expected the mark with which an Arrow stream ends, found the end of the file "
            "at a batch's end. The file is cut off, or its writer was not closed; fetch or write "
            "it again."
        )


def rows_of_batches(batches: Iterator[pa.RecordBatch], where: str) -> Iterator[list[RawRow]]:
    """The rows of the batches as dicts.

    Raises:
        DataError: the file is damaged.
    """
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{where}: expected a whole Parquet or Arrow file; row {number} and what follows "
                f"cannot be read: {error}"
            ) from error
        if batch is None:
            return
        for part in _small_parts(batch):
            yield _values_of_batch(part)
        number += batch.num_rows


def _small_parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in parts of one row, or of few enough bytes."""
    if batch.num_rows <= 1 or batch.nbytes <= BATCH_BYTES:
        yield batch
        return
    middle = batch.num_rows // 2
    yield from _small_parts(batch.slice(0, middle))
    yield from _small_parts(batch.slice(middle))


def _values_of_batch(batch: pa.RecordBatch) -> list[RawRow]:
    if batch.num_rows == 1 and _row_bytes(batch) > blocks.MAX_ROW_BYTES:
        return [TOO_LONG]
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [_defect(error)]
        return [row for k in range(batch.num_rows) for row in _values_of_batch(batch.slice(k, 1))]


def _row_bytes(row: pa.RecordBatch) -> int:
    """Size of the only row, without the dictionary that its columns may share with others."""
    columns = [
        column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        for column in row.columns
    ]
    return sum(column.nbytes for column in columns)


def _defect(error: ValueError | OverflowError) -> Defect:
    if isinstance(error, UnicodeDecodeError):
        return Defect("bad-utf8", f"byte {error.object[error.start]:#04x} is not UTF-8")
    return Defect("bad-value", str(error))
