"""Lists the files of a run, stamps them so that a change shows, and cuts them into chunks.

The order of the input is: sources as configured, then files by path, then rows.  It decides which
of two equal rows is kept.

A chunk is the file ranges that one ingest actor reads as one work unit: a byte range of a big plain
JSONL file, row groups of a big Parquet file, record batches of a big Arrow file, rows of a big data
set, a whole file that cannot be cut, or many small files together.  The result does not depend on
the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from system import storage
from system.config import SourceConfig
from system.data.read.hub import count_rows, stat_hub
from system.data.read.listing import resolve
from system.data.read.readers import DATASET, HUB, FileRange, file_kind
from system.data.read.tables import count_arrow_batches
from system.errors import DataError
from system.redact import without_secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file (or one `datasets` data set) of a source."""

    index: int
    """Number in the order of the input, over all sources."""
    source: int
    """Index into the configuration's sources."""
    uri: str
    size: int
    """In bytes; for a data set, of its Arrow files."""
    stamp: str
    """Changes with the content: size and mtime, ETag, or fingerprint of a data set."""
    shown: str = ""
    """The URI without secrets, for files and messages; empty: `uri` has none."""

    @property
    def name(self) -> str:
        """What files and messages call it."""
        return self.shown or self.uri


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The file ranges that one ingest actor reads as one work unit."""

    index: int
    source: int
    ranges: tuple[FileRange, ...]
    max_rows: int | None = None
    """Stop after so many rows, counted over all ranges; None: read all."""


def source_name(source: SourceConfig) -> str:
    """The name of the source in reports: the configured one, else made from its path."""
    if source.name:
        return source.name
    name = without_secrets(source.path).split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    return name if name.startswith(".") else name.split(".")[0] or name


def list_files(sources: Sequence[SourceConfig], data_dir: str) -> list[SourceFile]:
    """All files of all sources, in the order of the input.

    Raises:
        DataError: a source has no file.
    """
    files: list[SourceFile] = []
    for number, source in enumerate(sources):
        uris = resolve(source.path, data_dir)
        for uri in uris:
            size, stamp = stat(uri)
            files.append(
                SourceFile(index=len(files), source=number, uri=uri, size=size, stamp=stamp)
            )
    return files


def stat(uri: str) -> tuple[int, str]:
    """Size in bytes, and a stamp that changes when the content does.

    Raises:
        DataError: there is nothing of that name.
    """
    return stat_hub(uri) if uri.startswith("hf://") else storage.stat(uri)


def plan_chunks(
    files: Sequence[SourceFile], sources: Sequence[SourceConfig], chunk_bytes: int
) -> list[Chunk]:
    """Cuts and groups the files into chunks of about `chunk_bytes` on disk."""
    chunks: list[Chunk] = []
    for number, source in enumerate(sources):
        source_files = [file for file in files if file.source == number]
        if source.max_rows is not None:
            # One chunk: the first rows of the source are known only when they are read in order.
            ranges = tuple(_whole(file) for file in source_files)
            groups: Iterator[tuple[FileRange, ...]] = iter([ranges])
        else:
            groups = _groups(source_files, chunk_bytes)
        for ranges in groups:
            chunks.append(
                Chunk(index=len(chunks), source=number, ranges=ranges, max_rows=source.max_rows)
            )
    return chunks


def _whole(file: SourceFile) -> FileRange:
    return FileRange(file=file.index, uri=file.uri, stamp=file.stamp)


def _groups(files: Sequence[SourceFile], chunk_bytes: int) -> Iterator[tuple[FileRange, ...]]:
    """The file ranges of each chunk; small files share a chunk, a big file is cut."""
    waiting: list[FileRange] = []
    waiting_bytes = 0
    for file in files:
        if waiting_bytes and waiting_bytes + file.size > chunk_bytes:
            yield tuple(waiting)
            waiting, waiting_bytes = [], 0
        if file.size > chunk_bytes:
            yield from ((file_range,) for file_range in _cut(file, chunk_bytes))
        else:
            waiting.append(_whole(file))
            waiting_bytes += file.size
    if waiting:
        yield tuple(waiting)


def _cut(file: SourceFile, chunk_bytes: int) -> Iterator[FileRange]:
    """The ranges of one big file; a file that cannot be read from the middle stays whole."""
    kind = file_kind(file.uri)
    if kind.name == "lines" and kind.compression is None and kind.encoding is None:
        for start in range(0, file.size, chunk_bytes):
            end = min(start + chunk_bytes, file.size)
            yield FileRange(file=file.index, uri=file.uri, stamp=file.stamp, start=start, end=end)
    elif kind.name == "parquet":
        for start, end in _row_group_ranges(file.uri, chunk_bytes):
            yield FileRange(file=file.index, uri=file.uri, stamp=file.stamp, start=start, end=end)
    elif count := _count_parts(file.uri, kind.name):
        parts = min(count, math.ceil(file.size / chunk_bytes))
        ends = [count * (k + 1) // parts for k in range(parts)]
        for start, end in zip([0, *ends], ends, strict=False):
            yield FileRange(file=file.index, uri=file.uri, stamp=file.stamp, start=start, end=end)
    else:
        yield _whole(file)


def _count_parts(uri: str, kind: str) -> int | None:
    """Record batches of an Arrow file, rows of a data set; None: it cannot be cut."""
    if kind == "arrow":
        return count_arrow_batches(uri)
    if kind not in (DATASET, HUB):
        return None
    return count_rows(uri, kind == HUB)


def _row_group_ranges(uri: str, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    metadata = _parquet_metadata(uri)
    start, range_bytes = 0, 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if range_bytes and range_bytes + size > chunk_bytes:
            yield start, group
            start, range_bytes = group, 0
        range_bytes += size
    if start < metadata.num_row_groups or not metadata.num_row_groups:
        yield start, metadata.num_row_groups


def _parquet_metadata(uri: str) -> Any:
    try:
        with storage.open_input(uri) as file:
            return pq.read_metadata(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: expected a Parquet file; it cannot be read: {error}") from error
