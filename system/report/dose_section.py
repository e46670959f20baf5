"""Several doses on the page: what an example is worth at each, and whether returns diminish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from system.influence.estimate.dose_summary import DIMINISH, GROW
from system.influence.estimate.summary import short_unit
from system.report.blocks import Block, Cell, Column, Heading, Prose, Table, Tone, text_column
from system.report.formatting import NOTHING, count, decimals, interval, percent, plural, signed

_EXAMPLES = 100
"""Effects per example are too small to read; they are shown for so many."""
_VERB = {"add": "adding", "remove": "removing"}
_KINDS = {
    "own": ("on itself", "the effect of a category on its own held-out examples"),
    "worth": ("on all targets", "its mean effect on all targets, which is what a mix moves by"),
}


def dose_blocks(summary: dict[str, Any], sources: Sequence[str]) -> list[Block]:
    """Blocks of the effects section; none where one dose was measured.

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
            text=f"Every category was measured at several doses, the smaller inside the larger. "
            f"Effects are {unit} for {_EXAMPLES} examples: where they are the same at every dose, "
            "twice the data does twice as much. The change from the smallest dose to the largest "
            f"is paired inside each replication; it is called significant at {level} confidence. "
            "Returns diminish where an added example brings less at the larger dose, and where a "
            "removed example is missed more.",
        ),
    ]
    for direction, part in doses["directions"].items():
        for kind, (where, meaning) in _KINDS.items():
            blocks.append(
                _table(
                    part["sources"],
                    sources,
                    kind,
                    asked=doses["asked"],
                    caption=f"Effect {where} by dose, measured by {_VERB[direction]}",
                    note=f"{meaning[:1].upper()}{meaning[1:]}. {_counts(part[kind])}",
                )
            )
    return blocks


def _counts(found: dict[str, int]) -> str:
    return (
        f"Returns diminish significantly for {found['diminish']} of "
        f"{plural(found['sources'], 'category', 'categories')} and grow for {found['grow']}."
    )


def _table(
    measured: dict[str, Any],
    sources: Sequence[str],
    kind: str,
    *,
    asked: Sequence[int],
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
            *[Column(label=f"{count(dose)} rows") for dose in asked],
            Column(label="change", title="from the smallest dose to the largest"),
            text_column("returns"),
        ],
        rows=[
            [
                name,
                *[_point(row["points"], place, kind, digits) for place in range(len(asked))],
                *_change(row[f"{kind}_change"], digits),
            ]
            for name, row in zip(sources, rows, strict=True)
        ],
        folded=kind == "worth",
        note=note,
    )


def _point(points: list[dict[str, Any]], place: int, kind: str, digits: int) -> str | Cell:
    """One dose of one category; a dash where it has no more rows than at the dose before."""
    if place >= len(points) or points[place][kind] is None:
        return NOTHING
    found = points[place][kind]
    return Cell(
        text=f"{signed(_EXAMPLES * found['value'], digits)} "
        f"{interval(_EXAMPLES * found['low'], _EXAMPLES * found['high'], digits)}",
        title=f"{count(points[place]['dose'])} examples, "
        f"{count(points[place]['dose_tokens'])} response tokens",
    )


def _change(found: dict[str, Any] | None, digits: int) -> list[str | Cell]:
    if found is None:
        return [NOTHING, NOTHING]
    text = (
        f"{signed(_EXAMPLES * found['value'], digits)} "
        f"{interval(_EXAMPLES * found['low'], _EXAMPLES * found['high'], digits)}"
    )
    returns = found["returns"]
    tone: Tone = "" if returns in (DIMINISH, GROW) else "quiet"
    return [text, Cell(text=returns or "one replication", tone=tone)]
