"""What every reader yields for a row: a dict, or a `Defect` that says why it cannot be read.

A file of its own, because the readers of CSV, JSON and tables share it and must not import each
other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from system.data.read.blocks import MAX_ROW_BYTES


class Defect(NamedTuple):
    """A row that cannot be read; `reason` and `detail` go into the list of rejected rows."""

    reason: str
    detail: str


RawRow = dict[str, Any] | Defect | None
"""None stands for an empty line, which is not a row."""

TOO_LONG = Defect("too-long", f"longer than {MAX_ROW_BYTES:,} bytes")


def bad_utf8(byte: int) -> Defect:
    """The row has a byte that no UTF-8 text has: often the file is Latin-1."""
    return Defect(
        "bad-utf8",
        f"byte {byte:#04x} is not UTF-8; if the file is Latin-1: iconv -f WINDOWS-1252 -t UTF-8",
    )
