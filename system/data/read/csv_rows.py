"""Reads the records of CSV and TSV files, one at a time, in little memory.

A record ends on the line on which its quotes are closed, so one quote too many joins the following
lines to its record.  If the mistake shows (text after a closing quote), every joined line counts as
a row that cannot be read.  If it does not show before the file ends, or before the record is longer
than a row may be, the whole file is an error.
"""

from __future__ import annotations

import csv
import io
import re
import reprlib
import sys
from collections.abc import Iterator

from system.data.read import blocks
from system.data.read.raw_rows import TOO_LONG, Defect, RawRow, bad_utf8
from system.errors import DataError

_ESCAPED = re.compile("[\udc80-\udcff]")
"""What Python makes of a byte that is not UTF-8."""


def read_csv(data: Iterator[bytes], delimiter: str, where: str) -> Iterator[RawRow]:
    """The records after the header, as dicts with the names of the header as keys.

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
        if lines.has_bad_bytes and (byte := _bad_byte(record)):
            yield bad_utf8(byte)
        elif len(record) == len(header):
            yield dict(zip(header, record, strict=True))
        elif record:
            detail = f"{len(record)} fields, the header has {len(header)}"
            yield Defect("bad-csv", f"{lines.span(records.line_num)}: {detail}")
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
        found = reprlib.repr(header)
        raise DataError(
            f"{lines.where}: expected a header of different column names, found {found}"
        )
    if byte := _bad_byte(header):
        raise DataError(f"{lines.where}: expected a header in UTF-8: {bad_utf8(byte).detail}")
    return header


def _bad_byte(record: list[str]) -> int:
    """The first byte of the record that is not UTF-8; 0 if there is none."""
    found = _ESCAPED.search("".join(record))
    return ord(found.group()) - 0xDC00 if found else 0


class _Lines:
    """The lines of a file as text; keeps count of the lines in the current record."""

    def __init__(self, data: Iterator[bytes], where: str) -> None:
        self.where = where
        self.has_ended = False
        self.has_bad_bytes = False
        """Whether some line so far is not UTF-8."""
        self._data = data
        self._before = 0
        """Lines before the current record."""
        self._num_yielded = 0
        """Lines that `texts` has yielded."""
        self._num_bytes = 0
        """Size of the runs of lines that lie completely in the current record."""
        self._is_too_long = False

    def begin_record(self, num_lines: int) -> None:
        """Starts a new record after the first `num_lines` lines."""
        self._before = num_lines
        self._num_bytes = 0

    def texts(self) -> Iterator[str]:
        """Each line with its LF; an empty line stands for one that is longer than a row may be."""
        for run in blocks.split_runs(self._data, 0, None):
            before, is_inside = self._before, self._num_yielded > self._before
            if is_inside and (run is None or self._num_bytes > blocks.MAX_ROW_BYTES):
                raise self.unclosed(f"within {blocks.MAX_ROW_BYTES:,} bytes")
            if run is None:
                self._is_too_long = True
                run = b""
            try:
                text = run.decode()
            except UnicodeDecodeError:
                self.has_bad_bytes = True
                text = run.decode("utf-8", "surrogateescape")
            text = text if self._num_yielded else text.removeprefix("\ufeff")
            self._num_yielded += 1 + text.count("\n")
            # StringIO cuts at LF only; splitlines would also cut at other separators.
            yield from io.StringIO(text + "\n", newline="\n")
            if is_inside and before == self._before:
                self._num_bytes += len(run)
        self.has_ended = True

    def take_too_long(self) -> bool:
        """Whether the empty record just read stands for a line that is too long; resets it."""
        is_too_long, self._is_too_long = self._is_too_long, False
        return is_too_long

    def unclosed(self, until: str) -> DataError:
        """The error for a quote that is never closed."""
        return DataError(
            f"{self.where}: expected every quote to be closed; the quote opened on line "
            f'{self._before + 1} is not closed {until}. Write quotes inside of a field twice (""), '
            "or download the file again if it is cut off."
        )

    def span(self, last: int) -> str:
        """The lines of the record, for messages."""
        first = self._before + 1
        return f"line {first}" if first == last else f"lines {first}-{last}"

    def defects(self, last: int, error: str) -> Iterator[Defect]:
        """One unreadable row for each line of the record."""
        first = self._before + 1
        since = f", in a record that begins on line {first}" if last > first else ""
        for line in range(first, last + 1):
            yield Defect("bad-csv", f"line {line}: {error}{since}")
