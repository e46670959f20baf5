"""Figures of the section "The mix": counts, prices of the limits, and the sweep of the move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from system.influence.estimate.summary import short_unit
from system.report.formatting import decimals, ends, figure_label, figure_text, interval, signed
from system.report.theme import BASE, GAIN, HARM, INK, MAIN, Figure, axis, category_axis, layout
from system.solve.mix import CategoryMix, Mix

PER = 100
"""Prices are shown for this number of examples: for one example they are too small to read."""


def by_change(mix: Mix) -> list[CategoryMix]:
    """Categories sorted by change: the largest increase first."""
    return sorted(mix.categories, key=lambda c: (-(c.count - c.base), c.category))


def mix_figure(mix: Mix) -> Figure:
    """Bars for each category: examples in the base mix and in the solved mix.

    Of many categories, those with the largest changes in both directions.
    """
    rows = ends(by_change(mix))
    places = list(range(len(rows)))
    changes = [row.count - row.base for row in rows]
    total = sum(row.base for row in mix.categories)
    hover = [
        [figure_text(row.category), row.base / total, row.share, signed(change, 0)]
        for row, change in zip(rows, changes, strict=True)
    ]
    template = (
        "<b>%{customdata[0]}</b><br>%{x:,.0f} examples, %{customdata[SHARE]:.1%}"
        "<br>change %{customdata[3]}<extra></extra>"
    )
    bars: list[dict[str, Any]] = [
        {
            "type": "bar", "orientation": "h", "name": "base mix", "y": places,
            "x": [row.base for row in rows], "marker": {"color": BASE}, "customdata": hover,
            "hovertemplate": template.replace("SHARE", "1"),
        },
        {
            "type": "bar", "orientation": "h", "name": "solved mix", "y": places,
            "x": [row.count for row in rows], "marker": {"color": MAIN}, "customdata": hover,
            "hovertemplate": template.replace("SHARE", "2"),
            "text": [signed(change, 0) if abs(change) >= 0.5 else "" for change in changes],
            "textposition": "outside", "cliponaxis": False, "constraintext": "none",
            "textfont": {
                "size": 11, "color": [GAIN if change > 0 else HARM for change in changes],
            },
        },
    ]  # fmt: skip
    largest = max(max(row.base, row.count) for row in rows)
    return Figure(
        name="mix",
        label="Bars per category: examples in the base mix and in the solved mix.",
        data=bars,
        layout=layout(
            barmode="group",
            bargap=0.32,
            bargroupgap=0.08,
            xaxis=axis("examples per pass", rangemode="tozero", range=[0, largest * 1.14]),
            yaxis=category_axis([figure_label(row.category, 30) for row in rows]),
            legend=layout()["legend"] | {"traceorder": "normal"},
        ),
        height=96 + 34 * len(rows),
        narrow={"yaxis.ticktext": [figure_label(row.category, 15) for row in rows]},
    )


def price_figures(mix: Mix) -> list[Figure]:
    """Bars of what relaxing each limit would bring: limits in examples, then guards of targets.

    The list is empty for a mix without prices, and for a mix that no limit binds.
    """
    prices, relaxed = mix.relaxation or mix, mix.relaxation
    limit_prices = {row.category: row.limit_price for row in mix.categories}
    guards = {row.target: row.guard_price for row in mix.targets}
    if relaxed is not None:
        limit_prices, guards = dict(relaxed.limit_prices), dict(relaxed.guard_prices)
    labels = {
        row.category: f" ({row.at})" * (row.at not in ("free", "base")) for row in mix.categories
    }
    value = {name + labels[name]: price for name, price in limit_prices.items() if price}
    value |= {f"group {row.group}": row.price for row in mix.groups if row.price}
    value = dict(sorted(value.items(), key=lambda item: (-item[1], item[0])))
    for name, price in (("trust region", prices.move_price), ("budget", prices.budget_price)):
        if price:
            value[name if mix.unit == "examples" else f"{name} ({mix.unit})"] = price
    short = short_unit(mix.effect_unit)
    figures = []
    if value:
        figures.append(
            _price_bars(
                "prices",
                "Bars per limit: the gain if it is relaxed by a hundred examples.",
                {name: price * PER for name, price in value.items()},
                f"{short} for {PER} more",
            )
        )
    guard_prices = {name: price for name, price in guards.items() if price}
    if guard_prices:
        figures.append(
            _price_bars(
                "guard-prices",
                "Bars per guarded target: gain for each additional unit that it may lose.",
                dict(sorted(guard_prices.items(), key=lambda item: (-item[1], item[0]))),
                "gain for each additional unit that the target may lose",
            )
        )
    return figures


def _price_bars(name: str, label: str, value: dict[str, float], unit: str) -> Figure:
    names = ends(list(value))
    value = {text: value[text] for text in names}
    digits = decimals(value.values(), least=4)
    bars: dict[str, Any] = {
        "type": "bar", "orientation": "h", "y": list(range(len(names))), "x": list(value.values()),
        "marker": {"color": [GAIN if price > 0 else HARM for price in value.values()]},
        "customdata": [[figure_text(text), signed(value[text], digits)] for text in names],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]} " + unit + "<extra></extra>",
        "text": [signed(price, digits) for price in value.values()],
        "textposition": "outside", "cliponaxis": False, "constraintext": "none",
        "textfont": {"size": 11, "color": INK},
    }  # fmt: skip
    low, high = min(0.0, *value.values()), max(0.0, *value.values())
    room = 0.18 * (high - low)
    return Figure(
        name=name,
        label=label,
        data=[bars],
        layout=layout(
            bargap=0.4,
            xaxis=axis(
                unit, zeroline=True, range=[low - room * (low < 0), high + room * (high > 0)]
            ),
            yaxis=category_axis([figure_label(text, 34) for text in names]),
            showlegend=False,
        ),
        height=96 + 26 * len(names),
        narrow={"yaxis.ticktext": [figure_label(text, 18) for text in names]},
    )


def sweep_figure(sweep: Sequence[dict[str, Any]], move: float) -> Figure:
    """Predicted gain against the share of the budget that may move, with its error band."""
    shares = [row["move"] for row in sweep]
    low, high = [row["gain_low"] for row in sweep], [row["gain_high"] for row in sweep]
    line: dict[str, Any] = {
        "type": "scatter", "mode": "lines+markers", "x": shares, "y": [r["gain"] for r in sweep],
        "name": "predicted gain", "line": {"color": MAIN, "width": 2}, "marker": {"size": 6},
        "customdata": [[interval(*ends, 4)] for ends in zip(low, high, strict=True)],
        "hovertemplate": (
            "%{x:.1%} may move<br>predicted gain %{y:+.4f} %{customdata[0]}<extra></extra>"
        ),
    }  # fmt: skip
    band: dict[str, Any] = {
        "type": "scatter", "mode": "lines", "x": [*shares, *reversed(shares)],
        "y": [*high, *reversed(low)], "fill": "toself", "fillcolor": "rgba(11,92,158,0.14)",
        "line": {"width": 0}, "name": "interval", "hoverinfo": "skip",
    }  # fmt: skip
    return Figure(
        name="sweep",
        label="Line: predicted gain against the share of the budget that may move, with a band.",
        data=[line] if None in low or None in high else [band, line],
        layout=layout(
            xaxis=axis("share of the budget that may move", tickformat=".0%", rangemode="tozero"),
            yaxis=axis("predicted gain, nats per token", zeroline=True, rangemode="tozero"),
            shapes=[
                {
                    "type": "line", "x0": move, "x1": move, "yref": "paper", "y0": 0, "y1": 1,
                    "line": {"color": INK, "width": 1, "dash": "dot"},
                }
            ],
            annotations=[
                {
                    "x": move, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
                    "text": "this mix", "font": {"size": 11, "color": INK},
                }
            ],
            showlegend=False,
        ),
        height=320,
    )  # fmt: skip
