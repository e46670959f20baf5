"""Figures of the evaluation section: differences, losses, predicted against realised gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from system.report.formatting import figure_label, figure_text, signed
from system.report.theme import BASE, MAIN, MUTED, Figure, axis, category_axis, layout

ARM_STYLES = {
    "base": (BASE, "circle"),
    "natural": ("#3d4650", "circle"),
    "natural-curriculum": ("#c25e12", "diamond"),
    "uniform": ("#b08900", "cross"),
    "random": ("#7a7f38", "star-triangle-up"),
    "solved": ("#15805f", "square"),
    "solved-curriculum": (MAIN, "triangle-up"),
    "solved-reversed": ("#8a5aa8", "triangle-down"),
    "delivered": ("#5a3a22", "star"),
}
"""Colour and symbol of each arm, the same in every figure."""
_OTHER_ARM = (MUTED, "x")


def arm_style(arm: str) -> dict[str, Any]:
    """Marker colour and symbol of an arm."""
    color, symbol = ARM_STYLES.get(arm, _OTHER_ARM)
    return {"color": color, "symbol": symbol, "size": 10 if "triangle" in symbol else 8}


def difference_figure(rows: Sequence[dict[str, Any]], scopes: Sequence[str | None]) -> Figure:
    """Forest plot: gain over the reference by category and arm, with intervals."""
    compared = list(dict.fromkeys(row["arm"] for row in rows))
    data = []
    for number, arm in enumerate(compared):
        offset = (number - (len(compared) - 1) / 2) * min(0.26, 0.7 / len(compared))
        data.append(_points(arm, [r for r in rows if r["arm"] == arm], scopes, offset))
    return Figure(
        name="differences",
        label="Dots with intervals: gain of each arm over the natural mix by category.",
        data=data,
        layout=layout(
            xaxis=axis("gain over the natural mix, nats per token", zeroline=True),
            yaxis=category_axis(_scope_labels(scopes, 30)),
            shapes=_stripes(scopes),
        ),
        height=110 + (22 + 14 * len(compared)) * len(scopes),
        narrow={
            "yaxis.ticktext": _scope_labels(scopes, 15),
            "xaxis.title.text": "gain, nats per token",
        },
    )


def level_figure(
    rows: Sequence[dict[str, Any]], scopes: Sequence[str | None], arms: Sequence[str]
) -> Figure:
    """Dot plot: held-out loss by category and arm, with intervals."""
    shown = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    data = []
    for number, arm in enumerate(shown):
        offset = (number - (len(shown) - 1) / 2) * min(0.2, 0.7 / len(shown))
        data.append(_points(arm, [r for r in rows if r["arm"] == arm], scopes, offset))
    return Figure(
        name="levels",
        label="Dots with intervals: held-out loss of each arm by category.",
        data=data,
        layout=layout(
            xaxis=axis("held-out loss, nats per response token", zeroline=False),
            yaxis=category_axis(_scope_labels(scopes, 30)),
            shapes=_stripes(scopes),
        ),
        height=120 + (16 + 9 * len(shown)) * len(scopes),
        narrow={
            "yaxis.ticktext": _scope_labels(scopes, 15),
            "xaxis.title.text": "loss, nats per token",
        },
    )


def prediction_figure(rows: Sequence[dict[str, Any]], unit: str) -> Figure:
    """Scatter plot: predicted against realised change of each target."""
    ends = [value for row in rows for value in (row["predicted"], row["low"], row["high"])]
    low, high = min(0.0, *ends), max(0.0, *ends)
    predicted = [row["predicted"] for row in rows]
    diagonal = [min(0.0, *predicted), max(0.0, *predicted)]
    return Figure(
        name="prediction",
        label="Dots: predicted change against realised change of every target.",
        data=[
            {
                "type": "scatter", "mode": "lines", "x": diagonal, "y": diagonal,
                "hoverinfo": "skip",
                "line": {"color": MUTED, "width": 1, "dash": "dot"}, "name": "realised = predicted",
            },
            {
                "type": "scatter", "mode": "markers", "name": "targets", "x": predicted,
                "y": [row["realised"] for row in rows], "marker": {"size": 8, "color": MAIN},
                "error_y": {
                    "type": "data", "symmetric": False, "thickness": 1.2, "width": 0,
                    "color": MAIN, "array": [row["high"] - row["realised"] for row in rows],
                    "arrayminus": [row["realised"] - row["low"] for row in rows],
                },
                "customdata": [figure_text(row["target"]) for row in rows],
                "hovertemplate": "<b>%{customdata}</b><br>predicted %{x:+.4f}"
                "<br>realised %{y:+.4f}<extra></extra>",
            },
        ],
        layout=layout(
            xaxis=axis(f"predicted change, {unit}", zeroline=True),
            yaxis=axis(
                f"realised change, {unit}", zeroline=True,
                range=[low - 0.06 * (high - low), high + 0.06 * (high - low)],
            ),
        ),
        height=380,
    )  # fmt: skip


def _points(
    arm: str,
    rows: Sequence[dict[str, Any]],
    scopes: Sequence[str | None],
    offset: float,
) -> dict[str, Any]:
    style = arm_style(arm)
    by_scope = {row["category"]: row for row in rows}
    points = [(place, by_scope[scope]) for place, scope in enumerate(scopes) if scope in by_scope]
    return {
        "type": "scatter", "mode": "markers", "name": figure_text(arm),
        "x": [row["value"] for _, row in points], "y": [place + offset for place, _ in points],
        "marker": style,
        "error_x": {
            "type": "data", "symmetric": False, "thickness": 1.4, "width": 0,
            "color": style["color"], "array": [row["high"] - row["value"] for _, row in points],
            "arrayminus": [row["value"] - row["low"] for _, row in points],
        },
        "customdata": [
            [
                figure_text(row["category"] or "all categories"), figure_text(arm),
                signed(row["low"], 4), signed(row["high"], 4), row.get("verdict", ""),
            ]
            for _, row in points
        ],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}: %{x:.4f} "
        "[%{customdata[2]}, %{customdata[3]}]<br>%{customdata[4]}<extra></extra>",
    }  # fmt: skip


def _scope_labels(scopes: Sequence[str | None], width: int) -> list[str]:
    return [
        "<b>all, by<br>importance</b>" if scope is None else figure_label(scope, width)
        for scope in scopes
    ]


def _stripes(scopes: Sequence[str | None]) -> list[dict[str, Any]]:
    """Every second row is shaded, so that a reader does not lose the line."""
    return [
        {
            "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": place - 0.5,
            "y1": place + 0.5, "fillcolor": "#f4f6f8", "line": {"width": 0}, "layer": "below",
        }
        for place in range(0, len(scopes), 2)
    ]  # fmt: skip
