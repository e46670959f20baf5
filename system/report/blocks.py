"""What a page is made of: sections of blocks, filled with text that the template escapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from system.report.theme import Figure

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell that needs more than its text."""

    text: str
    tone: Tone = ""
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A table column."""

    label: str
    numeric: bool = True
    title: str = ""
    """What the number means, where the label cannot say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows with a row header in the first column; scrolls sideways inside its own box."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Cell]]
    folded: bool = False
    """Shown after a click on its caption."""
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
    """One Plotly figure with a caption, or several."""

    figures: Sequence[Figure]
    captions: Sequence[str]
    are_beside: bool = False
    """Next to each other where the page is wide enough."""
    kind: Literal["picture"] = "picture"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Inline SVG that this package made, with all names in it escaped."""

    svg: str
    caption: str
    kind: Literal["drawing"] = "drawing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Commands or JSON, word for word."""

    text: str
    caption: str = ""
    folded: bool = False
    kind: Literal["code"] = "code"


Block = Table | Prose | Bullets | Heading | Picture | Drawing | Code


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A numbered part of the page."""

    name: str
    """Anchor."""
    title: str
    blocks: Sequence[Block]
    short: str
    """Its name in the navigation."""
    waits_for: str = ""
    """Stage that must run before there is anything to show; empty where it has."""


def waiting(name: str, title: str, short: str, stage: str) -> Section:
    """A section that has nothing to show yet."""
    return Section(name=name, title=title, short=short, blocks=(), waits_for=stage)


def text_column(label: str, title: str = "") -> Column:
    """A column of words."""
    return Column(label=label, numeric=False, title=title)
