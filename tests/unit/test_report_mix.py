"""The section of the mix, from a solved mix and its sweep."""

from types import SimpleNamespace
from typing import Any

from mix_reference import problem

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
