"""Blocks that compare the effects of this run with those of other runs (`report --compare`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from system.influence.estimate.agreement import Correlation
from system.influence.estimate.comparison import Comparison, DirectionComparison, Measured
from system.report.blocks import Block, Cell, Column, Heading, Picture, Prose, Table, text_column
from system.report.formatting import (
    NOTHING,
    count,
    decimals,
    figure_text,
    fixed,
    interval,
    percent,
    signed,
)
from system.report.theme import MAIN, MUTED, Figure, axis, layout

_VERB = {"add": "adding", "remove": "removing"}


def comparison_blocks(comparisons: Sequence[Comparison], unit: str) -> list[Block]:
    """Blocks of the effects section; an empty list if no run is compared.

    Args:
        comparisons: of this run (`first`) with another run (`second`).
        unit: short name of the unit of effects.
    """
    if not comparisons:
        return []
    blocks: list[Block] = [
        Heading(text="Comparison with other measurements"),
        Prose(
            text="The same effects, measured by other runs: for example with another estimator, a "
            "proxy model of another size, or other doses. Correlations are over pairs of different "
            "categories. A cheap measurement can replace an expensive one if the two agree about "
            "as well as two halves of the expensive one (see above)."
        ),
        _table(comparisons),
    ]
    for number, comparison in enumerate(comparisons, start=1):
        blocks.append(
            Picture(
                are_beside=True,
                figures=[_figure(part, number, unit) for part in comparison.directions],
                captions=[
                    f"{_short_name(comparison.second)}, measured by {_VERB[part.direction]}: each "
                    "dot is the effect of a dose for a pair of different categories; on the line, "
                    "both runs agree."
                    for part in comparison.directions
                ],
            )
        )
    return blocks


def _short_name(measured: Measured) -> str:
    return measured.name.rstrip("/").rsplit("/", 1)[-1]


def _table(comparisons: Sequence[Comparison]) -> Table:
    first = comparisons[0].first
    return Table(
        caption="Agreement with other measurements, and their cost",
        columns=[
            text_column("run"),
            text_column("estimator"),
            text_column("direction"),
            Column(label="cost", title="million token equivalents: trained + scored / 3"),
            Column(label="cost ratio", title="cost divided by the cost of this run"),
            Column(label="rank correlation", title="of the effects of pairs, with its interval"),
            Column(label="within a target", title="median over targets of the rank correlation"),
            Column(label="same sign"),
            Column(
                label="worth",
                title="rank correlation of the worth of the sources",
            ),
            Column(label="size", title="root mean square effect divided by that of this run"),
        ],
        rows=[
            [
                Cell(text=_short_name(other.second), title=other.second.name),
                _estimator(other.second),
                _VERB[part.direction],
                fixed(other.second.token_equivalents / 1e6, 2),
                fixed(other.cost_ratio, 3),
                _correlation(part.agreement.rank),
                signed(part.agreement.target_rank_median, 2),
                percent(part.agreement.sign, 0),
                signed(part.worth_agreement, 2),
                fixed(part.scale, 2),
            ]
            for other in comparisons
            for part in other.directions
        ],
        note=f"This run: {_estimator(first)}, {fixed(first.token_equivalents / 1e6, 2)} million "
        "token equivalents.",
    )


def _estimator(measured: Measured) -> str:
    return (
        f"{measured.summary['estimator']}, {count(measured.summary['replications'])} replications"
    )


def _correlation(correlation: Correlation) -> str:
    if not np.isfinite(correlation.value):
        return NOTHING
    text = signed(correlation.value, 2)
    return (
        text
        if not np.isfinite(correlation.low)
        else f"{text} {interval(correlation.low, correlation.high, 2)}"
    )


def _figure(part: DirectionComparison, number: int, unit: str) -> Figure:
    other_TS = ~part.first.own_TS
    dose_S = part.first.dose_S
    one, two = ((m.effect_TS * dose_S)[other_TS] for m in (part.first, part.second))
    digits = decimals([*one.tolist(), *two.tolist()], least=3)
    names = [
        f"{figure_text(source)} on {figure_text(target)}"
        for row, target in enumerate(part.first.targets)
        for column, source in enumerate(part.first.sources)
        if other_TS[row, column]
    ]
    low = float(min(one.min(), two.min()))
    high = float(max(one.max(), two.max()))
    margin = 0.06 * (high - low or 1.0)
    ends = [low - margin, high + margin]
    return Figure(
        name=f"compare-{number}-{part.direction}",
        label="Dots: effect of each pair in this run and in the other one.",
        data=[
            {
                "type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip",
                "line": {"color": MUTED, "width": 1, "dash": "dot"},
            },
            {
                "type": "scatter", "mode": "markers", "x": one.tolist(), "y": two.tolist(),
                "marker": {"size": 7, "color": MAIN, "opacity": 0.65},
                "customdata": [
                    [name, signed(a, digits), signed(b, digits)]
                    for name, a, b in zip(names, one.tolist(), two.tolist(), strict=True)
                ],
                "hovertemplate": "<b>%{customdata[0]}</b><br>this run %{customdata[1]}<br>other "
                "%{customdata[2]}<extra></extra>",
            },
        ],
        layout=layout(
            xaxis=axis(f"this run, {unit}", zeroline=True, range=ends),
            yaxis=axis(f"other run, {unit}", zeroline=True, range=ends),
            showlegend=False,
        ),
        height=340,
    )  # fmt: skip
