"""Colours, axes, and layout that all figures share.

The colours are safe for colour-blind readers (after Okabe and Ito 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

INK = "#1d2125"
MUTED = "#5b6570"
RULE = "#dfe3e8"
PAPER = "#ffffff"
BASE = "#a7b1bc"
MAIN = "#0b5c9e"
GAIN = "#0b5c9e"
HARM = "#b8480c"
UNKNOWN = "#e9ecef"

DIVERGING = (
    (0.0, "#7f2a04"), (0.15, "#b8480c"), (0.32, "#e89a68"), (0.45, "#f8e3d5"), (0.5, "#fbfbfa"),
    (0.55, "#d9e7f3"), (0.68, "#7fb2da"), (0.85, "#0b5c9e"), (1.0, "#06315a"),
)  # fmt: skip
"""From harm (orange) over no effect (near white) to help (blue)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure: Plotly data and layout, and a description for readers who cannot see it."""

    name: str
    """Name of the figure, unique on the page."""
    label: str
    """Description for screen readers."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    """Pixels."""
    min_width: int = 0
    """Pixels; on a narrower page the figure scrolls within its box."""
    narrow: dict[str, Any] = field(default_factory=dict)
    """Layout attributes (dotted names) for pages below 560 pixels, such as shorter labels."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that the script of the page reads."""
        return {"data": self.data, "layout": self.layout, "narrow": self.narrow}


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis with a thin grid and without zoom, which would block scrolling on touch screens."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": MUTED}, "standoff": 10},
        "gridcolor": RULE,
        "linecolor": RULE,
        "zerolinecolor": "#8a949e",
        "zerolinewidth": 1,
        "tickfont": {"size": 12, "color": INK},
        "automargin": True,
        "fixedrange": True,
        **more,
    }


def category_axis(ticks: Sequence[str], **more: Any) -> dict[str, Any]:
    """A vertical axis with the categories at 0, 1, 2, ... from the top."""
    return axis(
        tickmode="array",
        tickvals=list(range(len(ticks))),
        ticktext=list(ticks),
        range=[len(ticks) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        ticks="",
        ticklabelstandoff=6,
        **more,
    )


def layout(**more: Any) -> dict[str, Any]:
    """The layout that all figures share."""
    return {
        "font": {"family": "ui-sans-serif, system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 36, "b": 44},
        "hoverlabel": {"bgcolor": INK, "font": {"color": PAPER, "size": 12}, "align": "left"},
        "legend": {
            "orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom",
            "font": {"size": 12}, "itemclick": False, "itemdoubleclick": False,
        },
        "dragmode": False,
        "barcornerradius": 2,
        **more,
    }  # fmt: skip
