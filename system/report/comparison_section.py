"""Other measurements of the same effects beside this one: `report RUN_DIR --compare RUN_DIR`."""

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
    """Blocks of the effects section; none where nothing is compared.

    Args:
        comparisons: this run first in each.
        unit: of the effects, short.
    """
    if not comparisons:
        return []
    blocks: list[Block] = [
        Heading(text="Beside other measurements"),
        Prose(
            text="The same effects, measured by other runs: another estimator, another size of the "
            "proxy model, other doses. Correlations are over pairs of different categories; a "
            "cheap measurement may take the place of a dear one where they agree about as well as "
            "the dear one agrees with itself (the halves above)."
        ),
        _table(comparisons),
    ]
    for number, found in enumerate(comparisons, start=1):
        blocks.append(
            Picture(
                are_beside=True,
                figures=[_figure(part, number, unit) for part in found.directions],
                captions=[
                    f"{_short(found.second)}, measured by {_VERB[part.direction]}: each dot is a "
                    "pair of different categories, effects of a dose; on the line both agree."
                    for part in found.directions
                ],
            )
        )
    return blocks


def _short(measured: Measured) -> str:
    return measured.name.rstrip("/").rsplit("/", 1)[-1]


def _table(comparisons: Sequence[Comparison]) -> Table:
    first = comparisons[0].first
    return Table(
        caption="Agreement with other measurements, and what they cost",
        columns=[
            text_column("run"),
            text_column("estimator"),
            text_column("by"),
            Column(label="cost", title="million token equivalents: trained, and a third of scored"),
            Column(label="times this run's"),
            Column(label="order of the pairs", title="rank correlation, with its interval"),
            Column(label="within a target", title="its median over targets"),
            Column(label="same sign"),
            Column(label="worth", title="rank correlation of the mean effects on all targets"),
            Column(label="size", title="root mean square effect per that of this run"),
        ],
        rows=[
            [
                Cell(text=_short(found.second), title=found.second.name),
                _estimator(found.second),
                _VERB[part.direction],
                fixed(found.second.token_equivalents / 1e6, 2),
                fixed(found.cost_ratio, 3),
                _correlation(part.agreement.rank),
                signed(part.agreement.target_rank_median, 2),
                percent(part.agreement.sign, 0),
                signed(part.worth_agreement, 2),
                fixed(part.scale, 2),
            ]
            for found in comparisons
            for part in found.directions
        ],
        note=f"This run: {_estimator(first)}, {fixed(first.token_equivalents / 1e6, 2)} million "
        "token equivalents.",
    )


def _estimator(measured: Measured) -> str:
    return (
        f"{measured.summary['estimator']}, {count(measured.summary['replications'])} replications"
    )


def _correlation(found: Correlation) -> str:
    if not np.isfinite(found.value):
        return NOTHING
    text = signed(found.value, 2)
    return text if not np.isfinite(found.low) else f"{text} {interval(found.low, found.high, 2)}"


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
    room = 0.06 * (high - low or 1.0)
    reach = [low - room, high + room]
    return Figure(
        name=f"compare-{number}-{part.direction}",
        label="Dots: effect of each pair in this run and in the other one.",
        data=[
            {
                "type": "scatter", "mode": "lines", "x": reach, "y": reach, "hoverinfo": "skip",
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
            xaxis=axis(f"this run, {unit}", zeroline=True, range=reach),
            yaxis=axis(f"other run, {unit}", zeroline=True, range=reach),
            showlegend=False,
        ),
        height=340,
    )  # fmt: skip
