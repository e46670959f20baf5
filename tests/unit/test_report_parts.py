import itertools
import re

import numpy as np
import pytest

from system.report.formatting import (
    count,
    decimals,
    duration,
    figure_label,
    interval,
    names,
    signed,
    wrapped,
)
from system.report.graph import draw, graph_svg
from system.report.training_section import running_mean, stage_spans
from system.taxonomy.records import Edge, Taxonomy


def edge(source: str, target: str, *, weight: float = 1.0, is_reduced: bool = True) -> Edge:
    return Edge(
        target=target, source=source, weight=weight, z=4.0, p=1e-4, stability=0.9,
        is_reduced=is_reduced,
    )  # fmt: skip


def taxonomy(edges: list[Edge], levels: dict[str, int]) -> Taxonomy:
    return Taxonomy(
        categories=tuple(levels),
        edges=tuple(edges),
        dropped=(),
        levels=tuple(levels.values()),
        level_stability=None,
        order=tuple(sorted(levels, key=lambda name: levels[name])),
        objective=1.0,
        gap=0.0,
        method="no cycle",
        num_tested=10,
        false_discovery_rate=0.1,
        asymmetry_unit="nats",
        num_bootstrap=0,
        seed=0,
    )


@pytest.fixture
def tangled() -> Taxonomy:
    """Two crossing chains, one edge over two levels, one category without a dependency."""
    return taxonomy(
        [edge("a", "y"), edge("b", "x"), edge("y", "z", weight=2.0), edge("b", "z")],
        {"a": 0, "b": 0, "x": 1, "y": 1, "z": 2, "alone": 0},
    )


def test_graph_runs_from_base_to_dependent_and_leaves_isolated_categories_out(tangled):
    drawing = draw(tangled)
    for _, route in drawing.routes:
        xs = [drawing.points[vertex][0] for vertex in route]
        assert xs == sorted(set(xs))
    assert "alone" not in graph_svg(tangled)


def test_graph_boxes_do_not_overlap_and_stay_inside(tangled):
    drawing = draw(tangled)
    points = list(drawing.points.values())
    for (x0, y0), (x1, y1) in itertools.combinations(points, 2):
        assert abs(x0 - x1) >= 148 or abs(y0 - y1) >= 40
    assert all(0 < x < drawing.width and 0 < y < drawing.height for x, y in points)


def test_graph_untangles_a_crossing(tangled):
    drawing = draw(tangled)
    ends = {(e.source, e.target): route for e, route in drawing.routes}
    a = drawing.points[ends["a", "y"][0]][1] - drawing.points[ends["b", "x"][0]][1]
    b = drawing.points[ends["a", "y"][1]][1] - drawing.points[ends["b", "x"][1]][1]
    assert a * b > 0


def test_graph_draws_only_the_reduced_edges_and_wider_where_stronger():
    graph = taxonomy(
        [edge("a", "b", weight=1.0), edge("b", "c", weight=4.0), edge("a", "c", is_reduced=False)],
        {"a": 0, "b": 1, "c": 2},
    )
    widths = [float(w) for w in re.findall(r'stroke-width="([\d.]+)"', graph_svg(graph))]
    assert len(widths) == 2 and widths == sorted(widths) and widths[0] < widths[1]


def test_graph_escapes_names():
    graph = taxonomy([edge("<script>", "b&c")], {"<script>": 0, "b&c": 1})
    assert "<script>" not in graph_svg(graph) and "b&amp;c" in graph_svg(graph)


def test_running_mean_weights_tokens_and_shortens_at_the_ends():
    loss, tokens = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert running_mean(loss, tokens, 1) == pytest.approx([1.5, 11 / 4, 10 / 3])


def test_stage_spans_are_consecutive_and_cover_all_steps():
    steps = [{"stage": name} for name in "aabbba"]
    assert stage_spans(steps) == [("a", 0, 1), ("b", 2, 4), ("a", 5, 5)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00004, "0.000"), (-0.00004, "0.000"), (0.0214, "+0.021"), (-1.5, "−1.500"), (None, "–")],
)
def test_signed_numbers_have_no_sign_where_they_round_to_zero(value, text):
    assert signed(value, 3) == text


def test_decimals_follow_the_typical_size():
    assert decimals([0.00012, 0.00034, 5.0]) == 5
    assert decimals([], least=4) == 4
    assert decimals([12.0, 130.0]) == 2


def test_small_texts():
    assert interval(-0.1, 0.25, 2) == "[−0.10, +0.25]"
    assert interval(None, 0.25, 2) == "–"
    assert count(12.0) == "12" and count(1234.5) == "1,234.5"
    assert [duration(s) for s in (0.4, 59.0, 754.0, 7260.0)] == [
        "0.4 s", "59 s", "12 min 34 s", "2 h 01 min",
    ]  # fmt: skip
    assert names(["a", "b", "c"], most=2) == "“a”, “b” and 1 more"


def test_labels_are_cut_to_their_lines_and_escaped():
    assert wrapped("x" * 50, 10) == ["x" * 10, "x" * 9 + "…"]
    assert wrapped("", 10) == ["(empty)"]
    assert wrapped("reading_comprehension", 20) == ["reading_", "comprehension"]
    assert wrapped("multi_hop_qa", 20) == ["multi_hop_qa"]
    assert wrapped("multi_hop_qa", 9) == ["multi_", "hop_qa"]
    assert figure_label("a <b> c", 30) == "a &lt;b&gt; c"
