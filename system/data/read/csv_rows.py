"""Records of CSV and TSV, one after the other, in flat memory.

A record ends where its quotes close, so one quote too many takes the lines after it for its own.
Where that comes to light (text after a closing quote), every line that it took is a row that cannot
be read; where it does not (the file ends, or a record grows past any row's size), it is an error.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator

from system.data.read import blocks
from system.data.read.raw_rows import TOO_LONG, Defect, RawRow
from system.errors import DataError


def read_csv(data: Iterator[bytes], delimiter: str, where: str) -> Iterator[RawRow]:
    """The records after the header, as dicts by the header's names.

    Raises:
        DataError: there is no usable header, or a quote is never closed.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(data, where)
    records = csv.reader(lines.texts(), delimiter=delimiter, strict=True)
    header = _header(records, lines)
    while True:
        lines.begin_record(records.line_num)
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.has_ended:
                raise lines.unclosed("by the end of the file") from error
            yield from lines.defects(records.line_num, str(error))
            continue
        if len(record) == len(header):
            yield dict(zip(header, record, strict=True))
        elif record:
            found = f"{len(record)} fields, the header has {len(header)}"
            yield Defect("bad-csv", f"{lines.span(records.line_num)}: {found}")
        elif lines.take_too_long():
            yield TOO_LONG


def _header(records: Iterator[list[str]], lines: _Lines) -> list[str]:
    try:
        header = next(filter(None, records), [])
    except csv.Error as error:
        raise DataError(f"{lines.where}: expected a header line: {error}") from error
    if lines.take_too_long():
        raise DataError(f"{lines.where}: expected a header line, found a line that is too long")
    if len(set(header)) < len(header):
        raise DataError(
            f"{lines.where}: expected a header of different column names, found {header}"
        )
    return header


class _Lines:
    """The lines of a file as text, and which of them the record being read has taken."""

    def __init__(self, data: Iterator[bytes], where: str) -> None:
        self.where = where
        self.has_ended = False
        self._data = data
        self._before = 0
        """Lines before the record."""
        self._given = 0
        """Lines handed out."""
        self._num_bytes = 0
        """Size of the blocks of lines that lie in the record as a whole."""
        self._is_too_long = False

    def begin_record(self, num_lines: int) -> None:
        """Says that what follows the first `num_lines` lines is a new record."""
        self._before = num_lines
        self._num_bytes = 0

    def texts(self) -> Iterator[str]:
        """Each line with its end; an empty one stands for one that is longer than a row may be."""
        for run in blocks.split_runs(self._data, 0, None):
            before, is_inside = self._before, self._given > self._before
            if is_inside and (run is None or self._num_bytes > blocks.MAX_ROW_BYTES):
                raise self.unclosed(f"within {blocks.MAX_ROW_BYTES:,} bytes")
            if run is None:
                self._is_too_long = True
                run = b""
            text = run.decode("utf-8", "surrogateescape")
            text = text if self._given else text.removeprefix("\ufeff")
            self._given += 1 + text.count("\n")
            # Cuts at LF alone, unlike splitlines.
            yield from io.StringIO(text + "\n", newline="\n")
            if is_inside and before == self._before:
                self._num_bytes += len(run)
        self.has_ended = True

    def take_too_long(self) -> bool:
        """Whether the empty record just read stands for a line that is too long."""
        found, self._is_too_long = self._is_too_long, False
        return found

    def unclosed(self, until: str) -> DataError:
        """The error for a quote that takes the rest of the file."""
        return DataError(
            f"{self.where}: expected every quote to be closed; one that is opened on line "
            f'{self._before + 1} is not closed {until}. Write quotes inside of a field twice (""), '
            "or fetch the file again if it is cut off."
        )

    def span(self, last: int) -> str:
        """The record's lines, for people."""
        first = self._before + 1
        return f"line {first}" if first == last else f"lines {first}-{last}"

    def defects(self, last: int, error: str) -> Iterator[Defect]:
        """A row that cannot be read for every line of the record."""
        first = self._before + 1
        since = f", in a record that begins on line {first}" if last > first else ""
        for line in range(first, last + 1):
            yield Defect("bad-csv", f"line {line}: {error}{since}")
