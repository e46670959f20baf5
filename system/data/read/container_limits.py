"""Says before a table is read how much memory its compressed parts will take.

The library trusts what a part says about its own size, and a few kilobytes can claim gigabytes.  So
the sizes are read first: from the messages of an Arrow file, and from the headers of the pages of a
Parquet file (the sizes in its footer may be wrong).  Only the few fields that are needed are
decoded.  Source: Apache Arrow, Message.fbs and File.fbs; Apache Parquet, parquet.thrift.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

MAX_BLOCK_BYTES = 2**30
"""Most bytes that are decompressed at once: a record batch of an Arrow file, or one page of each
column of a Parquet file."""
MAX_PAGE_VALUES = 2**26
_HEADER_BYTES = 2**13
_MAX_HEADER_BYTES = 2**24
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_DICTIONARY_PAGE = 2
_DICTIONARY_ENCODINGS = (2, 8)
_BYTE_ARRAY = 6
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


def _too_large(what: str, size: int) -> pa.ArrowInvalid:
    return pa.ArrowInvalid(
        f"{what} takes {size:,} bytes when it is decompressed, more than the {MAX_BLOCK_BYTES:,} "
        "that are allowed. If the file is yours, write it with fewer rows at once"
    )


class _Table:
    """A table of a flatbuffer: its fields by their number."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self._place = data, place
        self._fields = place - struct.unpack_from("<i", data, place)[0]
        self._size = struct.unpack_from("<H", data, self._fields)[0]

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data, 0)[0])

    def _at(self, number: int) -> int | None:
        entry = 4 + 2 * number
        if entry >= self._size:
            return None
        offset = struct.unpack_from("<H", self._data, self._fields + entry)[0]
        return self._place + offset if offset else None

    def number(self, field: int, form: str) -> int:
        place = self._at(field)
        return 0 if place is None else struct.unpack_from(form, self._data, place)[0]

    def table(self, field: int) -> _Table | None:
        place = self._at(field)
        if place is None:
            return None
        return _Table(self._data, place + struct.unpack_from("<I", self._data, place)[0])

    def structs(self, field: int, form: str) -> Iterator[tuple[Any, ...]]:
        place = self._at(field)
        if place is None:
            return
        place += struct.unpack_from("<I", self._data, place)[0]
        for k in range(struct.unpack_from("<I", self._data, place)[0]):
            yield struct.unpack_from(form, self._data, place + 4 + k * struct.calcsize(form))


def check_arrow_sizes(
    source: pa.NativeFile, is_file: bool, start: int = 0, end: int | None = None
) -> None:
    """Makes sure that no batch of an Arrow file or stream decompresses to too much.

    Args:
        source: open.
        is_file: whether it has the file format, else it is a stream.
        start: first record batch that will be read from a file.
        end: where reading will end (excluded); None: all are read.

    Raises:
        pa.ArrowInvalid: one does, or the file is damaged.
    """
    size = source.size()
    try:
        places = (
            _file_messages(source, size, start, end) if is_file else _stream_messages(source, size)
        )
        dictionary_bytes = 0
        for metadata, body in places:
            message = _Table.root(metadata)
            kind, header = message.number(1, "<B"), message.table(2)
            if kind == _DICTIONARY_BATCH and header is not None:
                header = header.table(1)
            if header is None or kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
                continue
            batch_bytes = _batch_bytes(source, header, body)
            if kind == _DICTIONARY_BATCH:
                dictionary_bytes += batch_bytes
            largest = max(batch_bytes, dictionary_bytes)
            if largest > MAX_BLOCK_BYTES:
                raise _too_large("a batch", largest)
    except (struct.error, OverflowError) as error:
        raise pa.ArrowInvalid(f"its messages are damaged: {error}") from None
    source.seek(0)


def _file_messages(
    source: pa.NativeFile, size: int, start: int, end: int | None
) -> Iterator[tuple[bytes, int]]:
    """Metadata and place of the body of the batches that the footer lists, dictionaries first."""
    source.seek(max(size - 10, 0))
    (length,) = struct.unpack_from("<i", source.read(4))
    source.seek(max(size - 10 - length, 0))
    footer = _Table.root(source.read(max(length, 0)))
    records = itertools.islice(footer.structs(3, "<qiiq"), start, end)
    for place, metadata_bytes, _, _ in itertools.chain(footer.structs(2, "<qiiq"), records):
        source.seek(min(max(place, 0), size))
        data = source.read(max(metadata_bytes, 0))
        skipped = 8 if data[:4] == b"\xff\xff\xff\xff" else 4
        yield data[skipped:], place + metadata_bytes


def _stream_messages(source: pa.NativeFile, size: int) -> Iterator[tuple[bytes, int]]:
    place = 0
    while place < size:
        source.seek(place)
        head = source.read(8)
        if len(head) < 8:
            return
        is_new = head[:4] == b"\xff\xff\xff\xff"
        (length,) = struct.unpack_from("<i", head, 4 if is_new else 0)
        if length <= 0:
            return
        place += 8 if is_new else 4
        source.seek(place)
        metadata = source.read(min(length, size))
        place += length
        yield metadata, place
        place += max(_Table.root(metadata).number(3, "<q"), 0)


def _batch_bytes(source: pa.NativeFile, batch: _Table, body: int) -> int:
    """What the buffers of a batch take when they are decompressed; 0 if they are not compressed."""
    if batch.table(3) is None:
        return 0
    total = 0
    for offset, length in batch.structs(2, "<qq"):
        if length >= 8:
            source.seek(body + offset)
            (size,) = struct.unpack("<q", source.read(8))
            total += length if size < 0 else size
    return total


def read_row_groups(file: Any) -> list[dict[int, Any]]:
    """The row groups in the footer of a Parquet file, for `check_parquet_sizes`.

    Read here, because a damaged one ends the process when the library describes its columns.

    Raises:
        pa.ArrowInvalid: the file is damaged.
    """
    end = file.seek(0, 2)
    file.seek(max(end - 8, 0))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(end - 8 - length, 0))
    try:
        footer, _ = _struct(file.read(length), 0)
        groups = footer[4]
        if not all(type(column[3][7]) is int for group in groups for column in group[1]):
            raise TypeError("the size of a column is no number")
    except (LookupError, TypeError, RecursionError) as error:
        raise pa.ArrowInvalid(f"its footer is damaged: {error!r}") from None
    return groups


def check_parquet_sizes(file: Any, group: dict[int, Any]) -> list[str]:
    """Makes sure that no page of a row group decompresses to too much.

    Args:
        file: open, of bytes.
        group: one of `read_row_groups`.

    Returns:
        Paths of the columns to read as dictionaries: their rows may share texts so that writing
        each out could take too much.

    Raises:
        pa.ArrowInvalid: a page does, or the file is damaged.
    """
    try:
        return _check_pages(file, group)
    except pa.ArrowException:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise pa.ArrowInvalid(f"the header of a page is damaged: {error!r}") from None


def _check_pages(file: Any, group: dict[int, Any]) -> list[str]:
    total, shared = 0, []
    for column in (chunk[3] for chunk in group[1]):
        largest = dictionary = longest = values = 0
        for page, place in _pages(file, column):
            size, count = page[2], _about_values(page, 1)
            if count > MAX_PAGE_VALUES:
                raise pa.ArrowInvalid(f"a page claims to hold {count:,} values")
            if page[1] == _DICTIONARY_PAGE:
                dictionary = max(dictionary, size)
                if size <= MAX_BLOCK_BYTES and column.get(1) == _BYTE_ARRAY:
                    file.seek(place)
                    longest = _longest_value(file.read(page[3]), size, column.get(4))
            else:
                largest = max(largest, size)
                values += count if _about_values(page, 2) in _DICTIONARY_ENCODINGS else 0
        total += largest + dictionary
        if total > MAX_BLOCK_BYTES:
            raise _too_large("a row group", total)
        if longest * values > MAX_BLOCK_BYTES:
            shared.append(".".join(part.decode() for part in column[3]))
    return shared


def _longest_value(data: bytes, size: int, codec: int | None) -> int:
    """Bytes of the longest text on a dictionary page; of the page, if it cannot be read here."""
    try:
        if codec:
            data = pa.Codec(_CODECS[codec]).decompress(data, size, asbytes=True)
    except (pa.ArrowException, ValueError, OSError, KeyError):
        return size
    longest = place = 0
    while place + 4 <= len(data):
        length = int.from_bytes(data[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return min(longest, size)


def _pages(file: Any, column: Any) -> Iterator[tuple[dict[int, Any], int]]:
    """The header of each page of a column in a row group, and where the page begins after it."""
    place = min(start for start in (column.get(11), column[9]) if start)
    end = place + column[7]
    while place < end:
        header, length = _page_header(file, place)
        yield header, place + length
        place += length + header[3]


def _page_header(file: Any, place: int) -> tuple[dict[int, Any], int]:
    num_bytes = _HEADER_BYTES
    while True:
        file.seek(place)
        data = file.read(num_bytes)
        try:
            header, length = _struct(data, 0)
            if not {1, 2, 3} <= header.keys() or min(header[2], header[3]) < 0:
                raise pa.ArrowInvalid("the header of a page is damaged")
            return header, length
        except (IndexError, RecursionError):
            # The statistics in a header may be long texts.
            if len(data) < num_bytes or num_bytes >= _MAX_HEADER_BYTES:
                raise pa.ArrowInvalid("the header of a page is damaged") from None
            num_bytes *= 8


def _about_values(header: dict[int, Any], field: int) -> int:
    """Number (field 1) or encoding (field 2) of the values of a page of any kind."""
    for kind in (5, 7, 8):
        part = header.get(kind)
        if isinstance(part, dict):
            # A data page of version 2 counts nulls and rows before it names the encoding.
            return part.get(4 if kind == 8 and field == 2 else field) or 0
    return 0


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct of Thrift's compact protocol, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[place]:
        place += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, place = _signed(data, place)
        fields[number], place = _value(data, place, kind & 15)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        return _signed(data, place)
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = _varint(data, place)
        return data[place : place + length], place + length
    if kind in (9, 10):
        return _list(data, place)
    if kind == 12:
        return _struct(data, place)
    raise pa.ArrowInvalid(f"it holds a value of the unknown kind {kind}")


def _list(data: bytes, place: int) -> tuple[list[Any], int]:
    kind, count, place = data[place] & 15, data[place] >> 4, place + 1
    if count == 15:
        count, place = _varint(data, place)
    values = []
    for _ in range(count):
        # A truth value takes a byte in a list.
        value, place = _value(data, place, 3 if kind in (1, 2) else kind)
        values.append(value)
    return values, place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise pa.ArrowInvalid("it holds a number that is too long")


def _signed(data: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place
