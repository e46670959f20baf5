"""What a reader yields where there is a row: a dict, or why it cannot be read."""

from __future__ import annotations

from typing import Any, NamedTuple

from system.data.read.blocks import MAX_ROW_BYTES


class Defect(NamedTuple):
    """A row that cannot be read."""

    reason: str
    detail: str


RawRow = dict[str, Any] | Defect | None
"""None: an empty line, which is no row."""

TOO_LONG = Defect("too-long", f"longer than {MAX_ROW_BYTES:,} bytes")
