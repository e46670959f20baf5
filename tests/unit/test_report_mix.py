"""The section of the mix, from a solved mix and its sweep."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from mix_reference import problem

from system.mix.notes import mix_lines
from system.report.blocks import Prose
from system.report.mix_figures import price_figures
from system.report.mix_section import mix_section
from system.report.theme import Figure
from system.solve import Mix, MixOptions, solve_mix

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


def section(mix: Mix, sweep: list[dict[str, Any]]):
    view: Any = SimpleNamespace(mix=mix, sweep=sweep)
    return mix_section(view)


def prose(mix: Mix) -> str:
    return " ".join(block.text for block in section(mix, []).blocks if isinstance(block, Prose))


def test_a_sweep_without_points_is_said():
    mix = solve_mix(problem(EFFECT, [100, 100, 100]), MixOptions())
    assert "a fractional mix within the limits was found" in prose(mix)


def test_a_search_that_stopped_early_says_how_far_the_bound_is():
    mix = solve_mix(problem(EFFECT, [100, 100, 100]), MixOptions(integer=True))
    stopped = replace(mix, status="feasible", gain=8.0, solver=replace(mix.solver, gap=0.2))
    assert "within 0.2000 nats of the proven bound, 2.50\u00a0% of its gain" in prose(stopped)
    assert "within 0.2 nats per response token of the proven bound, 2.50% of its gain" in " ".join(
        mix_lines(stopped)
    )
    assert stopped.gap_share == 0.025 and replace(stopped, gain=0.0).gap_share is None


def test_prices_are_drawn_as_bars_with_guards_apart():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    mix = solve_mix(p, MixOptions(guard_nats=20.0))
    bars, guards = price_figures(mix)
    shown = dict(zip(names(bars), bars.data[0]["x"], strict=True))
    assert shown == pytest.approx(
        {
            "c1 (supply)": 100 * mix.categories[1].supply_price,
            "budget": 100 * mix.budget_price,
        }
    )
    assert mix.move_price == 0
    assert dict(zip(names(guards), guards.data[0]["x"], strict=True)) == pytest.approx(
        {"c0": mix.targets[0].guard_price}
    )
    for figure in (bars, guards):
        go.Figure(data=figure.data, layout=figure.layout)


def test_prices_of_a_whole_mix_are_those_of_the_fractional_one():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    (whole,) = price_figures(solve_mix(p, MixOptions(integer=True)))
    (fractional,) = price_figures(solve_mix(p, MixOptions()))
    assert names(whole) == names(fractional) == ["c1 (supply)", "trust region", "budget"]
    assert whole.data[0]["x"] == pytest.approx(fractional.data[0]["x"])


def test_a_mix_that_no_limit_holds_has_no_picture_of_prices():
    assert price_figures(solve_mix(problem(np.zeros((3, 3)), [10, 20, 30]), MixOptions())) == []


def names(figure: Figure) -> list[str]:
    return [entry[0] for entry in figure.data[0]["customdata"]]
