"""The section of the mix, from a solved mix and its sweep."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mix_reference import problem

from actors.planner import mix_lines
from system.report.blocks import Prose
from system.report.mix_section import mix_section
from system.solve import Mix, MixOptions, solve_mix

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


def section(mix: Mix, sweep: list[dict[str, Any]]):
    view: Any = SimpleNamespace(mix=mix, sweep=sweep)
    return mix_section(view)


def prose(mix: Mix) -> str:
    return " ".join(block.text for block in section(mix, []).blocks if isinstance(block, Prose))


def test_a_sweep_without_points_is_said():
    mix = solve_mix(problem(EFFECT, [100, 100, 100]), MixOptions())
    assert "No fractional mix within the limits was found" in prose(mix)


def test_a_search_that_stopped_early_says_how_far_the_bound_is():
    mix = solve_mix(problem(EFFECT, [100, 100, 100]), MixOptions(integer=True))
    stopped = replace(mix, status="feasible", gain=8.0, solver=replace(mix.solver, gap=0.2))
    assert "within 0.2000 nats of the proven bound, 2.50\u00a0% of its gain" in prose(stopped)
    assert "within 0.2 nats per response token of the proven bound, 2.50% of its gain" in " ".join(
        mix_lines(stopped)
    )
    assert stopped.gap_share == 0.025 and replace(stopped, gain=0.0).gap_share is None
