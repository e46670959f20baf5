"""The parts of the report page: sections that consist of blocks.

All texts are plain; the template `report.html` escapes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from system.report.theme import Figure

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell with a tone or a tooltip; cells without are plain strings."""

    text: str
    tone: Tone = ""
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A table column."""

    label: str
    numeric: bool = True
    title: str = ""
    """Tooltip that explains the column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table whose first column holds the row headers; a wide table scrolls within its box."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Cell]]
    folded: bool = False
    """The table is hidden until the reader clicks on its caption."""
    note: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """A paragraph."""

    text: str
    tone: Literal["", "lead", "note", "warn"] = ""
    kind: Literal["prose"] = "prose"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    kind: Literal["bullets"] = "bullets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """A heading inside a section."""

    text: str
    kind: Literal["heading"] = "heading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One or several Plotly figures, each with a caption."""

    figures: Sequence[Figure]
    captions: Sequence[str]
    are_beside: bool = False
    """The figures are next to each other if the page is wide enough."""
    kind: Literal["picture"] = "picture"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Inline SVG made by this package; all names in it are escaped."""

    svg: str
    caption: str
    kind: Literal["drawing"] = "drawing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Commands or JSON, shown unchanged."""

    text: str
    caption: str = ""
    folded: bool = False
    kind: Literal["code"] = "code"


Block = Table | Prose | Bullets | Heading | Picture | Drawing | Code


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the page."""

    name: str
    """Anchor of the section, unique on the page."""
    title: str
    blocks: Sequence[Block]
    short: str
    """Name in the navigation."""
    waits_for: str = ""
    """Stage that must run before the section has content; empty if it has run."""


def waiting(name: str, title: str, short: str, stage: str) -> Section:
    """A section without content, because its stage has not run."""
    return Section(name=name, title=title, short=short, blocks=(), waits_for=stage)


def text_column(label: str, title: str = "") -> Column:
    """A column of text."""
    return Column(label=label, numeric=False, title=title)
