"""Reads (compressed) files in blocks of bytes, and cuts the blocks into lines or JSON values.

The lowest layer of `readers`.  Memory stays small whatever the size of the file or of its rows: a
block is at most 1 MiB, however far a few bytes decompress, and a row of more than MAX_ROW_BYTES is
skipped.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import zstandard

from system import storage
from system.errors import DataError

COMPRESSION_MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zip": b"PK\x03\x04",
}
COMPRESSION_ENDINGS = (".gz", ".zst", ".bz2", ".xz", ".zip")
MAX_ROW_BYTES = 64 * 2**20
"""A longer row is rejected without being read, so one broken file cannot fill the memory."""

_BLOCK_BYTES = 1 << 20
_ZSTD_STEP_BYTES = 1 << 11
"""Input of one step of zstd: three bytes of it may stand for 128 KiB, so for 90 MB at most."""
_ZSTD_WINDOW_BYTES = 1 << 31
"""Window of `zstd --long=31`; reading a file needs as much memory as its writer's window."""
_XZ_MEMORY_BYTES = 1 << 30
"""Most memory for a dictionary of xz; its highest preset needs 65 MiB."""
_QUOTE = 0x22
_TOKEN = re.compile(rb'[{}\[\]]|"[^"\\]*(?:\\.[^"\\]*)*("?)', re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def read_blocks(
    uri: str, compression: str | None, start: int = 0, encoding: str | None = None
) -> Iterator[bytes]:
    """The (decompressed) bytes of a file.  A plain file is read from the byte before `start`.

    Args:
        uri: the file.
        compression: a key of COMPRESSION_MAGIC.
        start: first byte of a range; 0 where the file is compressed or has an encoding.
        encoding: `utf-16` or `utf-32`, if the text is to be turned into UTF-8.

    Raises:
        DataError: the compressed file is damaged or cut off.
    """
    blocks = _raw_blocks(uri, compression, start)
    return blocks if encoding is None else _as_utf8(blocks, encoding, uri)


def _raw_blocks(uri: str, compression: str | None, start: int) -> Iterator[bytes]:
    try:
        with storage.open_input(uri) as raw:
            if compression is None and start:
                raw.seek(start - 1)
            blocks = _DECOMPRESSORS[compression](raw, uri) if compression else _pieces(raw)
            for block in blocks:
                # The readers hold what a block becomes, so a block must be short.
                for place in range(0, len(block), _BLOCK_BYTES):
                    yield block[place : place + _BLOCK_BYTES]
    except _DAMAGE as error:
        raise _damaged(uri, str(error)) from error
    except OSError as error:
        # The bzip2 module reports damage as an OSError without a number.
        if compression == "bzip2" and error.errno is None:
            raise _damaged(uri, str(error)) from error
        raise


def _damaged(uri: str, what: str) -> DataError:
    return DataError(
        f"{uri}: expected a whole compressed file, found one that is damaged or cut off ({what}). "
        "No row of it was used; download or write the file again."
    )


_DAMAGE = (
    EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _zstd_blocks(raw: IO[bytes], uri: str) -> Iterator[bytes]:
    """Decompresses frame by frame: the library's stream reader would accept a cut-off frame."""
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame = None
    for piece in _pieces(raw):
        for place in range(0, len(piece), _ZSTD_STEP_BYTES):
            data = piece[place : place + _ZSTD_STEP_BYTES]
            while data:
                frame = context.decompressobj() if frame is None else frame
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise _damaged(uri, "it ends inside a zstd frame")


def _xz_blocks(raw: IO[bytes], uri: str) -> Iterator[bytes]:
    """Decompresses stream by stream: the module's file has no limit on memory."""
    stream = None
    for data in _pieces(raw):
        while data:
            if stream is None:
                data = data.lstrip(b"\0")  # between streams there may be zeros
                if not data:
                    break
                stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
            yield stream.decompress(data, _BLOCK_BYTES)
            while not stream.needs_input and not stream.eof:
                yield stream.decompress(b"", _BLOCK_BYTES)
            data = b""
            if stream.eof:
                data, stream = stream.unused_data, None
    if stream is not None:
        raise _damaged(uri, "it ends inside an xz stream")


def _zip_blocks(raw: IO[bytes], uri: str) -> Iterator[bytes]:
    with _open_zip(raw, uri) as archive, archive.open(_only_member(archive, uri)) as file:
        yield from _pieces(file)


def zip_member(uri: str) -> str:
    """The name of the file in a zip file.

    Raises:
        DataError: it does not hold exactly one file, or is damaged.
    """
    with storage.open_input(uri) as raw, _open_zip(raw, uri) as archive:
        return _only_member(archive, uri)


@contextlib.contextmanager
def _open_zip(raw: IO[bytes], uri: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(raw) as archive:
            yield archive
    except DataError:
        raise
    except RuntimeError as error:
        raise DataError(
            f"{uri}: expected a zip file that can be unpacked, found one that cannot: {error}. "
            "Unpack it, or compress its file with gzip."
        ) from error
    except (*_DAMAGE, ValueError, KeyError, struct.error, OSError) as error:
        # A place outside of the file is an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise _damaged(uri, str(error)) from error


def _only_member(archive: zipfile.ZipFile, uri: str) -> str:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    # A Mac adds a file of its own for each file.
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise DataError(
            f"{uri}: expected a zip file with one file in it, found {len(names):,}"
            f"{': ' if names else ''}{', '.join(map(repr, names[:5]))}. Unpack it, and name the "
            "directory as the source's `path`."
        )
    return names[0]


_DECOMPRESSORS: dict[str, Callable[[Any, str], Iterator[bytes]]] = {
    "gzip": lambda raw, _: _pieces(gzip.GzipFile(fileobj=raw)),  # type: ignore[arg-type]
    "bzip2": lambda raw, _: _pieces(bz2.BZ2File(raw)),  # type: ignore[arg-type]
    "zstd": _zstd_blocks,
    "xz": _xz_blocks,
    "zip": _zip_blocks,
}


def _as_utf8(blocks: Iterator[bytes], encoding: str, uri: str) -> Iterator[bytes]:
    """The same text as UTF-8; half of a surrogate pair becomes bytes that are no UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise DataError(
            f"{uri}: expected text in {encoding.upper()}, as its first bytes say, found other "
            f"bytes or the end of the file inside of a character ({error}). Download the file "
            "again, or convert it to UTF-8 with iconv."
        ) from error


def split_lines(blocks: Iterator[bytes], start: int, end: int | None) -> Iterator[bytes | None]:
    """Lines without their LF; None stands for a line of more than MAX_ROW_BYTES.

    A line belongs to the range [start, end) of the file that contains its first byte.  With a start
    above 0 the blocks must begin one byte earlier: that byte says whether a line begins at `start`.
    """
    for run in split_runs(blocks, start, end):
        if run is None:
            yield None
        else:
            yield from run.split(b"\n")


def split_runs(blocks: Iterator[bytes], start: int, end: int | None) -> Iterator[bytes | None]:
    """The lines of `split_lines`, many at a time: joined by LF, without the last LF.

    Splitting a whole run at once is much faster than handling single lines.
    """
    position = start - 1 if start else 0
    is_first = start > 0
    for run, size in _raw_runs(blocks):
        begin, position = position, position + size + 1
        if is_first:
            # The bytes before the first LF belong to a line of the range before this one.
            is_first = False
            cut = -1 if run is None else run.find(b"\n")
            if run is None or cut < 0:
                continue
            run, begin = run[cut + 1 :], begin + cut + 1
        if end is not None and begin >= end:
            return
        if end is not None and run is not None and begin + len(run) >= end:
            cut = run.find(b"\n", max(end - 1 - begin, 0))
            if cut >= 0:
                yield run[:cut]
                return
        yield run


def _raw_runs(blocks: Iterator[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Runs of whole lines, each with its size; None stands for one line that is too long.

    An unfinished line at the end of a block is kept for the next block.  Of a line that is too long
    only the size is kept.
    """
    unfinished: list[bytes] = []
    size = 0
    for block in blocks:
        first, last = block.find(b"\n"), block.rfind(b"\n")
        size += len(block) if first < 0 else first
        is_too_long = size > MAX_ROW_BYTES
        if is_too_long:
            unfinished.clear()
        if first < 0:
            if not is_too_long:
                unfinished.append(block)
            continue
        if is_too_long:
            yield None, size
            if last > first:
                yield block[first + 1 : last], last - first - 1
        else:
            yield b"".join([*unfinished, block[:last]]), size + last - first
        unfinished, size = [block[last + 1 :]], len(block) - last - 1
    if size:
        yield (b"".join(unfinished) if size <= MAX_ROW_BYTES else None), size


def split_values(blocks: Iterator[bytes], is_array: bool, where: str) -> Iterator[bytes | None]:
    """The elements of one JSON array, or a sequence of JSON objects, each as bytes.

    Only brackets and strings are parsed.  An element with another mistake is yielded like all
    others; decoding it finds the mistake.  None stands for an element of more than MAX_ROW_BYTES.

    Raises:
        DataError: the brackets do not match: the file is cut off, or a quote is not escaped.
    """
    # `depth` counts open brackets; an element begins and ends at depth `inside`.  In `buffer`,
    # `scan` is where the search goes on, `start` where the open element begins, and `gap` where
    # the last element ended.
    inside = 1 if is_array else 0
    depth = scan = start = gap = num_values = 0
    buffer = b""
    is_oversized = False
    for block in blocks:
        base = start if depth > inside else gap
        if len(buffer) - base > MAX_ROW_BYTES:
            # Forget the element's bytes but go on counting its brackets, to find where it ends.
            is_oversized = depth > inside
            buffer, base, scan = _unfinished_string(buffer[scan:]), 0, 0
            start = gap = 0
        buffer = buffer[base:] + block
        scan, start, gap = scan - base, max(start - base, 0), max(gap - base, 0)
        for match in _TOKEN.finditer(buffer, scan):
            place = match.start()
            byte = buffer[place]
            if byte == _QUOTE:
                if not match.group(1):
                    # The string goes on in the next block: search again from its quote.
                    scan = place
                    break
            elif byte in b"{[":
                if depth == inside:
                    yield from _scalars(buffer[gap:place])
                    start = place
                depth += 1
                gap = place + 1 if depth == inside else gap
            else:
                depth -= 1
                if depth == inside:
                    num_values += 1
                    yield None if is_oversized else buffer[start : match.end()]
                    is_oversized, gap = False, match.end()
                elif depth < inside:
                    yield from _scalars(buffer[gap:place])
                    _check_end(
                        buffer[place:] if not is_array else buffer[place + 1 :], blocks, where
                    )
                    return
            scan = match.end()
    if depth != 0 or is_array:
        raise DataError(
            f"{where}: expected every bracket of the JSON to be closed, found the end of the file "
            f"inside {depth} open brackets, after {num_values:,} whole values. The file is cut "
            "off, or a quote in it is not escaped; download or write it again."
        )
    yield from _scalars(buffer[gap:])


def _unfinished_string(rest: bytes) -> bytes:
    """The shortest text that leaves the search in the same state as `rest` does."""
    if not rest.startswith(b'"'):
        return b""
    num_backslashes = len(rest) - len(rest.rstrip(b"\\"))
    return b'"\\' if num_backslashes % 2 else b'"'


def _scalars(text: bytes) -> Iterator[bytes]:
    """Values between two elements that are neither objects nor arrays."""
    if not text.strip(b", \t\r\n"):
        return
    values = _STRING.findall(text)
    for part in _STRING.sub(b'""', text).split(b","):
        part = part.strip()
        if part:
            yield values.pop(0) if part == b'""' else part


def _check_end(rest: bytes, blocks: Iterator[bytes], where: str) -> None:
    while not rest.strip():
        block = next(blocks, None)
        if block is None:
            return
        rest = block
    raise DataError(
        f"{where}: expected nothing after the end of the JSON, found {rest.strip()[:40]!r}. Write "
        "one array, or one object a line."
    )
