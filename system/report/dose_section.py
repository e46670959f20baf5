"""Blocks of the effects section for runs that measured several doses.

They show the effect per example at each dose, and whether returns diminish as the dose grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from system.influence.estimate.dose_summary import DIMINISH, GROW
from system.influence.estimate.summary import short_unit
from system.report.blocks import Block, Cell, Column, Heading, Prose, Table, Tone, text_column
from system.report.formatting import NOTHING, count, decimals, interval, percent, plural, signed

_EXAMPLES = 100
"""Effects are shown for this number of examples: for one example they are too small to read."""
_VERB = {"add": "adding", "remove": "removing"}
_KINDS = {
    "own": ("on itself", "the effect of a category on its own held-out examples"),
    "worth": ("on all targets", "the mean effect of a category on all targets (its worth)"),
}


def dose_blocks(summary: dict[str, Any], sources: Sequence[str]) -> list[Block]:
    """The blocks; an empty list if only one dose was measured.

    Args:
        summary: `influence/summary.json`.
        sources: categories in the order of the page.
    """
    doses = summary.get("doses")
    if doses is None:
        return []
    unit, level = short_unit(summary["unit"]), percent(doses["confidence"], 0)
    blocks: list[Block] = [
        Heading(text="How returns change with the dose"),
        Prose(
            text=f"Every category was measured at several doses; each larger dose contains the "
            f"smaller ones. Effects are in {unit} for {_EXAMPLES} examples. If they are equal at "
            "every dose, twice the data has twice the effect. The change from the smallest to the "
            f"largest dose is paired within each replication and tested at {level} confidence. "
            "Returns diminish if an added example brings less at the larger dose, or if a removed "
            "example costs more at the larger dose.",
        ),
    ]
    for direction, part in doses["directions"].items():
        for kind, (where, meaning) in _KINDS.items():
            blocks.append(
                _table(
                    part["sources"],
                    sources,
                    kind,
                    doses=doses["asked"],
                    caption=f"Effect {where} by dose, measured by {_VERB[direction]}",
                    note=f"{meaning[:1].upper()}{meaning[1:]}. {_count_returns(part[kind])}",
                )
            )
    return blocks


def _count_returns(counts: dict[str, int]) -> str:
    return (
        f"Returns diminish significantly for {counts['diminish']} of "
        f"{plural(counts['sources'], 'category', 'categories')} and grow for {counts['grow']}."
    )


def _table(
    measured: dict[str, Any],
    sources: Sequence[str],
    kind: str,
    *,
    doses: Sequence[int],
    caption: str,
    note: str,
) -> Table:
    rows = [measured[name] for name in sources]
    errors = [
        _EXAMPLES * point[kind]["se"]
        for row in rows
        for point in row["points"]
        if point[kind] is not None
    ]
    digits = decimals(errors, least=3)
    return Table(
        caption=caption,
        columns=[
            text_column("category"),
            *[Column(label=f"{count(dose)} rows") for dose in doses],
            Column(label="change", title="from the smallest dose to the largest"),
            text_column("returns"),
        ],
        rows=[
            [
                name,
                *[_point(row["points"], place, kind, digits) for place in range(len(doses))],
                *_change(row[f"{kind}_change"], digits),
            ]
            for name, row in zip(sources, rows, strict=True)
        ],
        folded=kind == "worth",
        note=note,
    )


def _point(points: list[dict[str, Any]], place: int, kind: str, digits: int) -> str | Cell:
    """One dose of one category; a dash if the category has no more rows than at the last dose."""
    if place >= len(points) or points[place][kind] is None:
        return NOTHING
    effect = points[place][kind]
    return Cell(
        text=f"{signed(_EXAMPLES * effect['value'], digits)} "
        f"{interval(_EXAMPLES * effect['low'], _EXAMPLES * effect['high'], digits)}",
        title=f"{count(points[place]['dose'])} examples, "
        f"{count(points[place]['dose_tokens'])} response tokens",
    )


def _change(change: dict[str, Any] | None, digits: int) -> list[str | Cell]:
    if change is None:
        return [NOTHING, NOTHING]
    text = (
        f"{signed(_EXAMPLES * change['value'], digits)} "
        f"{interval(_EXAMPLES * change['low'], _EXAMPLES * change['high'], digits)}"
    )
    returns = change["returns"]
    tone: Tone = "" if returns in (DIMINISH, GROW) else "quiet"
    return [text, Cell(text=returns or "one replication", tone=tone)]
