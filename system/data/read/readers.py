"""Reads a file of any kind as a stream of raw rows, in little memory.

`read_rows` yields `(number, value)`.  The number counts the rows of the file range from 0 (lines of
JSONL, elements of an array, records of CSV, rows of a table).  The value is a dict, or a `Defect`
for a row that cannot be read.  `read_batches` yields the values alone, in small batches; the ingest
uses it.  Every row of the file is yielded exactly once.  A file that ends too early (a truncated
archive, an array without its last bracket) is an error, never a short result.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from system import storage
from system.data.read.blocks import (
    COMPRESSION_ENDINGS,
    COMPRESSION_MAGIC,
    read_blocks,
    split_lines,
    split_runs,
    split_values,
    zip_member,
)
from system.data.read.csv_rows import read_csv
from system.data.read.hub import dataset_batches
from system.data.read.raw_rows import TOO_LONG, Defect, RawRow, bad_utf8
from system.data.read.tables import (
    BATCH_BYTES,
    BATCH_ROWS,
    arrow_batches,
    parquet_batches,
    rows_of_batches,
)
from system.errors import DataError
from system.foreign_tables import decode_json, without_nulls

HUB = "hub"
DATASET = "dataset"

_HEAD_BYTES = 1 << 20
_SNIFFED_BYTES = 512
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NEVER_EMPTY = (*COMPRESSION_ENDINGS, ".parquet", ".arrow", ".feather")
_FOREIGN = {
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"PK\x05\x06": "zip without files",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"SQLite format 3": "SQLite",
    b"\xd0\xcf\x11\xe0": "Excel (.xls)",
}
"""First bytes of files that are no text and that nothing here reads."""
_TAR_PLACE = 257
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order mark -> encoding; the mark of UTF-16 is the beginning of one of UTF-32."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NULL = b"null"
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """A file, or a part of it."""

    file: int
    """Number of the file in the order of the input."""
    uri: str
    stamp: str
    """Result of `system.data.read.sources.stat` when the run was planned."""
    start: int = 0
    end: int | None = None
    """Excluded; None: to the end.  The unit of both depends on the kind of file: bytes of JSONL,
    row groups of Parquet, record batches of an Arrow file, rows of a data set."""


class FileKind(NamedTuple):
    """How to read a file."""

    name: str
    """lines | values | array | csv | tsv | parquet | arrow | dataset | hub."""
    compression: str | None
    encoding: str | None = None
    """utf-16 | utf-32 of text that is to be turned into UTF-8."""


def file_kind(uri: str) -> FileKind:
    """Detects the kind of a file from its first bytes, and from its name where those do not decide.

    Raises:
        DataError: the kind of the file is unknown.
    """
    if uri.startswith("hf://"):
        return FileKind(HUB, None)
    path = storage.local_path(uri)
    if path is not None and path.is_dir():
        return FileKind(DATASET, None)
    try:
        with storage.open_input(uri) as file:
            head = file.read(_SNIFFED_BYTES)
    except OSError:
        # A directory of an object store cannot be opened.  It is tested only now, because a test
        # beforehand would cost one request for every file.
        if path is None and storage.list_names(uri):
            return FileKind(DATASET, None)
        raise
    # The content decides before the name does: a wrong name is a common mistake.
    if head.startswith(_LFS_POINTER):
        raise DataError(
            f"{uri}: expected data, found a Git LFS pointer: the file itself was never downloaded. "
            "Download it: git lfs pull"
        )
    if head.startswith(b"PAR1"):
        return FileKind("parquet", None)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return FileKind("arrow", None)
    compression = next(
        (name for name, magic in COMPRESSION_MAGIC.items() if head.startswith(magic)), None
    )
    name = uri.lower()
    if not head and name.endswith(_NEVER_EMPTY):
        raise DataError(
            f"{uri}: expected a file of the kind that its name says, found 0 bytes; even without "
            "rows such a file is not empty. It is damaged; download or write it again."
        )
    if compression is not None:
        head = _first_bytes(uri, compression, _SNIFFED_BYTES)
        name = zip_member(uri).lower() if compression == "zip" else name
    for ending in COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    if name.endswith((".parquet", ".arrow", ".feather")):
        found = f"one that starts with {head[:8]!r}. It is damaged; download or write it again."
        if compression is not None:
            found = f"one inside of a {compression} file. Decompress it: such files are compressed"
            found += " already."
        raise DataError(f"{uri}: expected a Parquet or Arrow file, as its name says, found {found}")
    encoding = _encoding(uri, head)
    if name.endswith((".csv", ".tsv")):
        return FileKind(name[-3:], compression, encoding)
    return FileKind(_json_kind(uri, compression, encoding), compression, encoding)


def _encoding(uri: str, head: bytes) -> str | None:
    """The encoding of a text file that says it; None: UTF-8.

    Raises:
        DataError: the file is no text, or text in an encoding that can only be guessed.
    """
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    found = next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)
    if head[_TAR_PLACE:].startswith(b"ustar"):
        found = "tar"
    if found:
        raise DataError(
            f"{uri}: expected JSON, JSONL, CSV, Parquet or Arrow, found a file of the kind "
            f"{found}, which cannot be read. Unpack or convert it."
        )
    # Rows begin with a character of ASCII, so every other byte is zero.
    zeros = [byte == 0 for byte in head[:4]]
    if zeros in ([False, True] * 2, [True, False] * 2):
        order = "LE" if zeros[1] else "BE"
        raise DataError(
            f"{uri}: expected UTF-8, found what looks like UTF-16 without a byte order mark. "
            f"Convert it: iconv -f UTF-16{order} -t UTF-8"
        )
    return None


def _first_bytes(
    uri: str, compression: str | None, num_bytes: int, encoding: str | None = None
) -> bytes:
    # A compressed file may yield blocks of any size, so collect enough of them.
    head = b""
    for block in read_blocks(uri, compression, encoding=encoding):
        head += block
        if len(head) >= num_bytes:
            break
    return head


def _json_kind(uri: str, compression: str | None, encoding: str | None) -> str:
    """`array`, `lines` (one object a line) or `values` (objects that span several lines)."""
    head = _first_bytes(uri, compression, _HEAD_BYTES, encoding)
    head = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return "array"
    if not head.startswith(b"{"):
        return "lines"
    # A first line that is just `{` opens an object that goes on in the next lines, unless some line
    # is a whole object.
    lines = head.split(b"\n")
    is_whole = len(lines) == 1 or any(
        line.startswith(b"{") and _is_object(line) for line in lines[:8]
    )
    return "lines" if is_whole or len(lines[0].strip()) > 1 else "values"


def _is_object(line: bytes) -> bool:
    value = decode_row(line)
    return not isinstance(value, Defect)


def decode_row(line: bytes) -> dict[str, Any] | Defect:
    """Decodes one JSON object; accepts NaN and Infinity, which some writers produce.

    Null keys of the objects inside of the row are left out: a table has them in every row.
    """
    try:
        value = _decode(line)
        if _NULL in line:
            value = _row_without_nulls(value)
    except UnicodeDecodeError as error:
        return bad_utf8(error.object[error.start])
    except RecursionError:
        return Defect("bad-json", "nested too deeply")
    except msgspec.DecodeError as strict:
        # The standard library is slower, but it reads NaN and Infinity.
        try:
            value = _row_without_nulls(decode_json(line))
        except UnicodeDecodeError as error:
            return bad_utf8(line[error.start])
        except (ValueError, RecursionError):
            return Defect("bad-json", f"{strict}: {_excerpt(line)}")
    if type(value) is not dict:
        return Defect("bad-json", f"expected an object, found a {type(value).__name__}")
    return value


def _row_without_nulls(row: Any) -> Any:
    """The row; of its columns none is left out, because a column of nulls is a column."""
    return {key: without_nulls(value) for key, value in row.items()} if type(row) is dict else row


def _excerpt(line: bytes) -> str:
    text = line[:80].decode("utf-8", "replace")
    return text + ("..." if len(line) > 80 else "")


def read_rows(file_range: FileRange) -> Iterator[tuple[int, dict[str, Any] | Defect]]:
    """All rows of a file range with their numbers, counted from 0.

    Raises:
        DataError: the file is damaged, cut off, or of no known kind.
    """
    for number, row in read_numbers(file_range):
        if row is not None:
            yield number, row


def read_numbers(file_range: FileRange) -> Iterator[tuple[int, RawRow]]:
    """As `read_rows`, but with an entry for every number: None is an empty line, not a row."""
    kind = file_kind(file_range.uri)
    if kind.name == "lines":
        return enumerate(map(_decode_line, _lines(file_range, kind)))
    if kind.name in _ONE_BY_ONE:
        data = read_blocks(file_range.uri, kind.compression, encoding=kind.encoding)
        return enumerate(_ONE_BY_ONE[kind.name](data, kind, file_range.uri))
    return enumerate(itertools.chain.from_iterable(_table_batches(file_range, kind)))


def read_batches(file_range: FileRange) -> Iterator[list[RawRow]]:
    """The values of `read_numbers` in batches, without their numbers: 0, 1, 2, ... in order.

    The rows before a damaged place are yielded before the error is raised.
    """
    kind = file_kind(file_range.uri)
    if kind.name == "lines":
        return _line_batches(file_range, kind)
    if kind.name in _ONE_BY_ONE:
        data = _CountedBlocks(read_blocks(file_range.uri, kind.compression, encoding=kind.encoding))
        return _batches(_ONE_BY_ONE[kind.name](data, kind, file_range.uri), data)
    return _table_batches(file_range, kind)


def _batches(values: Iterator[RawRow], data: _CountedBlocks) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    full = BATCH_BYTES
    try:
        for value in values:
            batch.append(value)
            if len(batch) == BATCH_ROWS or data.num_bytes > full:
                yield batch
                batch, full = [], data.num_bytes + BATCH_BYTES
    except DataError:
        yield batch
        raise
    yield batch


def _table_batches(file_range: FileRange, kind: FileKind) -> Iterator[list[RawRow]]:
    if kind.name == "parquet":
        batches = parquet_batches(file_range.uri, file_range.start, file_range.end)
        return rows_of_batches(batches, file_range.uri)
    if kind.name == "arrow":
        return rows_of_batches(
            arrow_batches(file_range.uri, file_range.start, file_range.end), file_range.uri
        )
    batches = dataset_batches(file_range.uri, kind.name == HUB, file_range.start, file_range.end)
    return rows_of_batches(batches, file_range.uri)


def _lines(file_range: FileRange, kind: FileKind) -> Iterator[bytes | None]:
    blocks = read_blocks(file_range.uri, kind.compression, file_range.start, kind.encoding)
    for number, line in enumerate(split_lines(blocks, file_range.start, file_range.end)):
        is_start = number == 0 and file_range.start == 0
        yield line.removeprefix(_BYTE_ORDER_MARK) if line and is_start else line


def _decode_line(line: bytes | None) -> RawRow:
    if line is None:
        return TOO_LONG
    return None if not line or line.isspace() else decode_row(line)


def _line_batches(file_range: FileRange, kind: FileKind) -> Iterator[list[RawRow]]:
    blocks = read_blocks(file_range.uri, kind.compression, file_range.start, kind.encoding)
    is_start = file_range.start == 0
    for run in split_runs(blocks, file_range.start, file_range.end):
        if run is None:
            yield [TOO_LONG]
        else:
            yield decode_lines(run.removeprefix(_BYTE_ORDER_MARK) if is_start else run)
        is_start = False


def decode_lines(run: bytes) -> list[RawRow]:
    """The value of each line: an object, a defect, or None for an empty line."""
    lines = run.split(b"\n")
    # Fast path: most runs hold whole objects only.  Any other line sends the run to the slow path.
    try:
        values = [_decode(line) for line in lines]
        if set(map(type, values)) == {dict}:
            return list(map(_row_without_nulls, values)) if _NULL in run else values
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return [_decode_line(line) for line in lines]


class _CountedBlocks:
    """Iterates over the blocks of a file and counts their bytes."""

    def __init__(self, data: Iterator[bytes]) -> None:
        self._data = data
        self.num_bytes = 0

    def __iter__(self) -> _CountedBlocks:
        return self

    def __next__(self) -> bytes:
        block = next(self._data)
        self.num_bytes += len(block)
        return block


def _read_values(data: Iterator[bytes], kind: FileKind, where: str) -> Iterator[RawRow]:
    for value in split_values(data, is_array=kind.name == "array", where=where):
        yield TOO_LONG if value is None else decode_row(value)


def _read_csv(data: Iterator[bytes], kind: FileKind, where: str) -> Iterator[RawRow]:
    return read_csv(data, "\t" if kind.name == "tsv" else ",", where)


_ONE_BY_ONE: dict[str, Callable[[Iterator[bytes], FileKind, str], Iterator[RawRow]]] = {
    "array": _read_values,
    "values": _read_values,
    "csv": _read_csv,
    "tsv": _read_csv,
}
