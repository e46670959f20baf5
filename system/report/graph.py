"""The dependency graph as inline SVG: base categories on the left, dependent ones on the right.

A layered drawing (Sugiyama et al. 1981): the column of a category is its level.  Edges over several
levels get a waypoint in each column between, and sweeps that sort each column by the mean place of
the neighbours remove most crossings.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from dataclasses import dataclass

from system.report.formatting import fixed, percent, wrapped
from system.report.theme import INK, MAIN, MUTED, PAPER
from system.taxonomy.records import Edge, Taxonomy

_NODE_WIDTH, _NODE_HEIGHT, _COLUMN, _ROW, _MARGIN, _HEAD = 148, 40, 216, 58, 4, 30
_SWEEPS = 12
MOST_EDGES = 40
"""Largest number of arrows that can still be followed."""

Vertex = tuple[str, int]
"""A category at its level, or a waypoint of an edge: (name or edge key, level)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Positions of all parts of the drawing, in pixels."""

    points: dict[Vertex, tuple[float, float]]
    """Centre of each vertex."""
    routes: list[tuple[Edge, list[Vertex]]]
    """Each edge with the vertices on its way, the base end first."""
    num_levels: int
    width: float
    height: float


def strongest(taxonomy: Taxonomy) -> tuple[Taxonomy, list[int]]:
    """The part of a large graph that is drawn, and the level that each column shows.

    Only the strongest reduced edges are kept, and levels without them get no column.
    """
    reduced = [edge for edge in taxonomy.edges if edge.is_reduced]
    if len(reduced) <= MOST_EDGES:
        return taxonomy, list(range(max(taxonomy.levels, default=0) + 1))
    level = taxonomy.level_by_category
    kept = sorted(reduced, key=lambda edge: (-edge.weight, edge.target, edge.source))[:MOST_EDGES]
    shown = sorted({level[name] for edge in kept for name in (edge.source, edge.target)})
    levels = tuple(shown.index(place) if place in shown else 0 for place in taxonomy.levels)
    return dataclasses.replace(taxonomy, edges=tuple(kept), levels=levels), shown


def draw(taxonomy: Taxonomy) -> Drawing:
    """Positions of the categories with dependencies, and routes of the reduced edges."""
    level = taxonomy.level_by_category
    isolated = set(taxonomy.isolated)
    columns: dict[int, list[Vertex]] = {k: [] for k in range(max(taxonomy.levels, default=0) + 1)}
    for name in taxonomy.categories:
        if name not in isolated:
            columns[level[name]].append((name, level[name]))
    routes, links = [], []
    for number, edge in enumerate(edge for edge in taxonomy.edges if edge.is_reduced):
        first, last = level[edge.source], level[edge.target]
        waypoints = [(f"\0{number}", between) for between in range(first + 1, last)]
        for waypoint in waypoints:
            columns[waypoint[1]].append(waypoint)
        route = [(edge.source, first), *waypoints, (edge.target, last)]
        routes.append((edge, route))
        links += list(itertools.pairwise(route))
    _untangle(columns, links)
    return _place(columns, links, routes)


def _untangle(columns: dict[int, list[Vertex]], links: list[tuple[Vertex, Vertex]]) -> None:
    """Sorts every column by the mean place of its neighbours, in sweeps to the right and left."""
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        levels = sorted(columns) if forward else sorted(columns, reverse=True)
        for level in levels[1:]:
            beside = columns[level - 1] if forward else columns[level + 1]
            place = {vertex: index for index, vertex in enumerate(beside)}
            own = {vertex: index for index, vertex in enumerate(columns[level])}
            pull: dict[Vertex, list[int]] = {vertex: [] for vertex in columns[level]}
            for start, end in links:
                here, there = (end, start) if forward else (start, end)
                if here in pull and there in place:
                    pull[here].append(place[there])
            columns[level].sort(
                key=lambda v, pull=pull, own=own: (
                    sum(pull[v]) / len(pull[v]) if pull[v] else own[v],
                    own[v],
                )
            )


def _place(
    columns: dict[int, list[Vertex]],
    links: list[tuple[Vertex, Vertex]],
    routes: list[tuple[Edge, list[Vertex]]],
) -> Drawing:
    tallest = max(len(column) for column in columns.values())
    points: dict[Vertex, tuple[float, float]] = {}
    for level, column in columns.items():
        top = (tallest - len(column)) * _ROW / 2
        for index, vertex in enumerate(column):
            x = _MARGIN + _NODE_WIDTH / 2 + level * _COLUMN
            points[vertex] = (x, _HEAD + _MARGIN + _NODE_HEIGHT / 2 + top + index * _ROW)
    return Drawing(
        points=points,
        routes=routes,
        num_levels=len(columns),
        width=2 * _MARGIN + _NODE_WIDTH + (len(columns) - 1) * _COLUMN,
        height=_HEAD + 2 * _MARGIN + _NODE_HEIGHT + (tallest - 1) * _ROW,
    )


def graph_svg(taxonomy: Taxonomy) -> str:
    """The drawing as SVG text; every name in it is escaped."""
    taxonomy, levels = strongest(taxonomy)
    drawing = draw(taxonomy)
    heaviest = max(edge.weight for edge, _ in drawing.routes)
    parts = [
        f'<svg class="graph" role="img" aria-label="Dependency graph, base categories left" '
        f'width="{drawing.width:.0f}" height="{drawing.height:.0f}" '
        f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0.6 L8 4 L0 7.4 z" fill="{MAIN}"/></marker></defs>',
    ]
    for column, level in enumerate(levels):
        x = _MARGIN + _NODE_WIDTH / 2 + column * _COLUMN
        text = "base" if level == 0 else f"level {level}"
        parts.append(
            f'<text x="{x:.0f}" y="18" text-anchor="middle" font-size="12" fill="{MUTED}">'
            f"{text}</text>"
        )
    for edge, route in sorted(drawing.routes, key=lambda item: item[0].weight):
        parts.append(_edge_svg(edge, [drawing.points[vertex] for vertex in route], heaviest))
    names = {name for edge, _ in drawing.routes for name in (edge.source, edge.target)}
    for (name, _), point in drawing.points.items():
        if name in names:
            parts.append(_node_svg(name, point))
    return "".join([*parts, "</svg>"])


def _edge_svg(edge: Edge, points: list[tuple[float, float]], heaviest: float) -> str:
    half, bend = _NODE_WIDTH / 2, (_COLUMN - _NODE_WIDTH) / 2
    stops = list(points)
    stops[0] = (stops[0][0] + half, stops[0][1])
    stops[-1] = (stops[-1][0] - half - 2, stops[-1][1])
    path = f"M{stops[0][0]:.1f} {stops[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(stops):
        path += f" C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    width = 1.0 + 4.0 * edge.weight / heaviest
    opacity = 0.8 if edge.stability is None else 0.15 + 0.8 * edge.stability
    stability = "" if edge.stability is None else f", stability {percent(edge.stability, 0)}"
    title = html.escape(
        f"{edge.source} → {edge.target}: z {fixed(edge.z, 1)}, p {edge.p:.2g}{stability}"
    )
    return (
        f'<path d="{path}" fill="none" stroke="{MAIN}" stroke-width="{width:.2f}" '
        f'stroke-opacity="{opacity:.2f}" marker-end="url(#tip)"><title>{title}</title></path>'
    )


def _node_svg(name: str, point: tuple[float, float]) -> str:
    x, y = point
    lines = wrapped(name, 22)
    top = y + 4 - 7 * (len(lines) - 1)
    spans = "".join(
        f'<tspan x="{x:.0f}" y="{top + 14 * index:.0f}">{html.escape(line)}</tspan>'
        for index, line in enumerate(lines)
    )
    return (
        f"<g><title>{html.escape(name)}</title>"
        f'<rect x="{x - _NODE_WIDTH / 2:.0f}" y="{y - _NODE_HEIGHT / 2:.0f}" rx="6" '
        f'width="{_NODE_WIDTH}" height="{_NODE_HEIGHT}" fill="{PAPER}" stroke="{INK}"/>'
        f'<text text-anchor="middle" font-size="12" fill="{INK}">{spans}</text></g>'
    )
