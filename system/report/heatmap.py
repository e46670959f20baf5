"""The effect matrix as heat maps; categories with similar effects are next to each other.

Legend of shape suffixes: T target (measured on), S source (trained on).
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist

from system.influence.estimate.matrix import EffectMatrix
from system.report.formatting import (
    LONGEST,
    figure_label,
    figure_text,
    fixed,
    shortened,
    signed,
    wrapped,
)
from system.report.pairs import Entry
from system.report.theme import DIVERGING, INK, MUTED, PAPER, UNKNOWN, Figure, axis, layout

_WIDE_LABEL, _NARROW_LABEL, _TOP_LABEL = 20, 13, 24
WIDEST_BESIDE = 15
"""Largest number of sources with which two heat maps fit next to each other."""
_CELL, _TICK, _MOST_CELLS = 3, 14, 400
"""Of a map of many categories: pixels of a cell, pixels between names, largest number of cells in
a row or column."""
_LARGEST_GAMMA = 2.0
"""End of the colour scale of gamma: a larger one would make all other cells look the same."""


def clustered_order(matrices: list[EffectMatrix]) -> tuple[list[str], list[str]]:
    """Targets and sources in dendrogram order; both axes share the order of the categories.

    The profile of a category has its effects on the others and their effects on it (shrunk effects
    of a dose, all directions).  Clustering: average linkage with optimal leaf order (Bar-Joseph et
    al. 2001).  Targets without a source of the same name come last, in the order of the matrix.
    """
    sources, targets = list(matrices[0].sources), list(matrices[0].targets)
    own = [name for name in sources if name in targets]
    rows = [targets.index(name) for name in own]
    columns = [sources.index(name) for name in own]
    parts = []
    for matrix in matrices:
        dose_TS = (matrix.shrunk_TS * matrix.dose_S)[np.ix_(rows, columns)].copy()
        np.fill_diagonal(dose_TS, 0.0)
        scale = float(np.sqrt(np.mean(dose_TS**2))) or 1.0
        parts += [dose_TS / scale, dose_TS.T / scale]
    if len(own) > 2:
        profile = np.concatenate(parts, axis=1)
        distance = pdist(profile)
        order = leaves_list(optimal_leaf_ordering(linkage(distance, "average"), distance))
        own = [own[place] for place in order]
    rest = [name for name in sources if name not in own]
    return own + [name for name in targets if name not in own], own + rest


def effect_figure(grid: list[list[Entry]], direction: str, unit: str) -> Figure:
    """Effect of a dose of each source on each target."""
    return _figure(
        grid,
        [[entry.effect for entry in row] for row in grid],
        [[entry.low > 0 or entry.high < 0 for entry in row] for row in grid],
        largest=float("inf"),
        name=f"effect-{direction}",
        label=f"Heat map of effects ({direction}): rows are targets, columns are sources.",
        title=unit,
    )


def gamma_figure(grid: list[list[Entry]], direction: str) -> Figure:
    """Gamma of each pair: one example of the source is worth so many of the target's own."""
    return _figure(
        grid,
        [[entry.gamma for entry in row] for row in grid],
        [[entry.has_sign for entry in row] for row in grid],
        largest=_LARGEST_GAMMA,
        name=f"gamma-{direction}",
        label=f"Heat map of gamma ({direction}): rows are targets, columns are sources.",
        title="gamma",
    )


def _limit(grid: list[list[Entry]], values: list[list[float | None]], largest: float) -> float:
    """End of the colour scale: the 98 % quantile of the sizes between different categories."""
    other = [
        abs(value)
        for row, line in zip(grid, values, strict=True)
        for entry, value in zip(row, line, strict=True)
        if value is not None and not entry.is_own
    ]
    limit = float(np.quantile(other, 0.98)) if other else 0.0
    return min(limit, largest) or 1.0


def _figure(
    grid: list[list[Entry]],
    values: list[list[float | None]],
    has_sign: list[list[bool]],
    *,
    largest: float,
    name: str,
    label: str,
    title: str,
) -> Figure:
    targets, sources = [row[0].target for row in grid], [entry.source for entry in grid[0]]
    limit = _limit(grid, values, largest)
    if max(len(targets), len(sources)) > LONGEST:
        return _overview(targets, sources, values, limit, name, label, title)
    data = [
        _tiles(grid, values, limit, title),
        _hatching(grid),
        _dots(grid, has_sign),
    ]
    heading = [len(_cut(source)) for source in sources]
    # The slanted labels of the last columns extend to the right of the map.
    beyond = max(12, *(4.2 * n - 22 * (len(heading) - 1 - k) for k, n in enumerate(heading)))
    longest = max(len(line) for target in targets for line in wrapped(target, _WIDE_LABEL))
    ticks: dict[str, Any] = {
        "ticks": "", "showgrid": False, "zeroline": False, "showline": False,
        "tickfont": {"size": 11, "color": INK},
    }  # fmt: skip
    return Figure(
        name=name,
        label=label,
        data=data,
        layout=layout(
            xaxis=axis(
                "", side="top", tickmode="array", tickvals=list(range(len(sources))),
                ticktext=[figure_text(_cut(source)) for source in sources], tickangle=-50,
                range=[-0.5, len(sources) - 0.5], ticklabeloverflow="allow", **ticks,
            ),
            yaxis=axis(
                "", tickmode="array", tickvals=list(range(len(targets))),
                ticktext=[figure_label(target, _WIDE_LABEL) for target in targets],
                range=[len(targets) - 0.5, -0.5], ticklabelstandoff=4, **ticks,
            ),
            shapes=_outlines(targets, sources),
            margin={"l": 8, "r": round(beyond), "t": 8, "b": 66},
            showlegend=False,
        )
        | {"plot_bgcolor": UNKNOWN},
        height=98 + round(4.9 * max(heading)) + 28 * len(targets),
        min_width=round(22 + 6.2 * longest + 22 * len(sources) + beyond),
        narrow={"yaxis.ticktext": [figure_label(target, _NARROW_LABEL) for target in targets]},
    )  # fmt: skip


def _overview(
    targets: list[str],
    sources: list[str],
    values: list[list[float | None]],
    limit: float,
    name: str,
    label: str,
    title: str,
) -> Figure:
    """A map of many categories: small cells, and names of some rows and columns.

    Above 400 rows or columns, a cell is the mean of neighbours.
    """
    z = np.array([[np.nan if value is None else value for value in row] for row in values])
    z, rows = _merged(z, targets)
    z, columns = _merged(z.T, sources)
    z = z.T
    ticks: dict[str, Any] = {
        "type": "category", "tickmode": "array", "ticks": "", "showgrid": False,
        "zeroline": False, "showline": False, "tickfont": {"size": 10, "color": INK},
    }  # fmt: skip
    step = -(-_TICK // _CELL)
    data = {
        "type": "heatmap", "zmin": -limit, "zmax": limit, "x": columns, "y": rows,
        # Packed numbers: as text they would be most of the page.
        "z": {
            "dtype": "f4", "shape": f"{len(rows)}, {len(columns)}",
            "bdata": base64.b64encode(z.astype("<f4").tobytes()).decode(),
        },
        "colorscale": [list(stop) for stop in DIVERGING],
        "hovertemplate": f"<b>%{{x}}</b> → <b>%{{y}}</b><br>{title} %{{z:.4f}}<extra></extra>",
        "colorbar": _colorbar(title),
    }  # fmt: skip
    return Figure(
        name=name,
        label=label,
        data=[data],
        layout=layout(
            xaxis=axis(
                "", side="top", tickvals=columns[::step], tickangle=-50,
                ticktext=[figure_text(_cut(text)) for text in columns[::step]],
                range=[-0.5, len(columns) - 0.5], **ticks,
            ),
            yaxis=axis(
                "", tickvals=rows[::step],
                ticktext=[figure_text(_cut(text)) for text in rows[::step]],
                range=[len(rows) - 0.5, -0.5], **ticks,
            ),
            margin={"l": 8, "r": 90, "t": 8, "b": 66},
            showlegend=False,
        )
        | {"plot_bgcolor": UNKNOWN},
        height=98 + round(4.9 * _TOP_LABEL) + _CELL * len(rows),
        min_width=250 + _CELL * len(columns),
    )  # fmt: skip


def _merged(values: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Means of neighbouring rows, so that at most 400 are left; NaN is left out."""
    size = -(-len(names) // _MOST_CELLS)
    if size == 1:
        return values, [figure_text(name) for name in names]
    starts = np.arange(0, len(names), size)
    known = np.isfinite(values)
    number = np.add.reduceat(known.astype(int), starts, axis=0)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    means = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    parts = [names[start : start + size] for start in starts]
    return means, [figure_text(f"{part[0]} … {part[-1]}") for part in parts]


def _tiles(
    grid: list[list[Entry]], values: list[list[float | None]], limit: float, title: str
) -> dict[str, Any]:
    return {
        "type": "heatmap", "z": values, "zmin": -limit, "zmax": limit,
        "x": list(range(len(grid[0]))), "y": list(range(len(grid))),
        "colorscale": [list(stop) for stop in DIVERGING], "xgap": 1, "ygap": 1,
        "customdata": [[_hover(entry) for entry in row] for row in grid],
        "hoverongaps": True,
        "hovertemplate": (
            "<b>%{customdata[0]}</b> → <b>%{customdata[1]}</b><br>effect %{customdata[2]}"
            "<br>gamma %{customdata[3]}<br>%{customdata[4]}<extra></extra>"
        ),
        "colorbar": _colorbar(title),
    }  # fmt: skip


def _colorbar(title: str) -> dict[str, Any]:
    return {
        "orientation": "h", "thickness": 9, "len": 0.6, "lenmode": "fraction", "x": 0,
        "xanchor": "left", "y": 0, "yanchor": "top", "ypad": 14, "outlinewidth": 0,
        "title": {"text": title, "side": "top", "font": {"size": 11, "color": MUTED}},
        "tickfont": {"size": 11}, "nticks": 5, "tickformat": "~g",
    }  # fmt: skip


def _cut(name: str) -> str:
    return shortened(name, _TOP_LABEL)


def _hover(entry: Entry) -> list[str]:
    gamma = entry.gamma_text
    if entry.gamma is not None:
        gamma += f" {entry.gamma_interval}"
    return [
        figure_text(entry.source),
        figure_text(entry.target),
        f"{signed(entry.effect, 4)} ± {fixed(entry.se, 4)}",
        gamma,
        f"{'identifiable' if entry.is_identifiable else 'not identifiable'}{entry.mark}",
    ]


def _hatching(grid: list[list[Entry]]) -> dict[str, Any]:
    """Three thin diagonals through every cell whose gamma is not identifiable."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, entries in enumerate(grid):
        for column, entry in enumerate(entries):
            if entry.is_identifiable:
                continue
            left, right, top, bottom = column - 0.45, column + 0.45, row - 0.45, row + 0.45
            for line_x, line_y in (
                ((left, column), (row, top)),
                ((left, right), (bottom, top)),
                ((column, right), (bottom, row)),
            ):
                x += [*line_x, None]
                y += [*line_y, None]
    return {
        "type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip",
        "line": {"color": "rgba(29,33,37,0.28)", "width": 0.8}, "name": "not identifiable",
    }  # fmt: skip


def _dots(grid: list[list[Entry]], has_sign: list[list[bool]]) -> dict[str, Any]:
    """A dot in each cell between different categories whose interval excludes zero."""
    places = [
        (column, row)
        for row, entries in enumerate(grid)
        for column, entry in enumerate(entries)
        if has_sign[row][column] and not entry.is_own
    ]
    return {
        "type": "scatter", "mode": "markers", "x": [x for x, _ in places],
        "y": [y for _, y in places], "hoverinfo": "skip", "name": "interval excludes zero",
        "marker": {"size": 5, "color": PAPER, "line": {"color": INK, "width": 1}},
    }  # fmt: skip


def _outlines(targets: list[str], sources: list[str]) -> list[dict[str, Any]]:
    """Frames around the cells of a category on itself."""
    place = {source: column for column, source in enumerate(sources)}
    return [
        {
            "type": "rect", "x0": place[t] - 0.48, "x1": place[t] + 0.48, "y0": row - 0.48,
            "y1": row + 0.48, "line": {"color": INK, "width": 1.1},
        }
        for row, t in enumerate(targets)
        if t in place
    ]  # fmt: skip
