"""What a run says about a mix that leaves what was measured."""

import numpy as np
from mix_reference import problem

from system.planning import EXTRAPOLATES, extrapolation_notes
from system.solve import MixOptions, solve_mix

MIX = solve_mix(
    problem(np.diag([1e-3, 0.0, 0.0]), [100.0, 100.0, 100.0]),
    MixOptions(objective="linear", move=0.2, budget=300.0),
)
"""60 examples move to c0, 30 from each of the others (or all from one: ties go to both alike)."""


def doses(rows):
    return dict.fromkeys(("c0", "c1", "c2"), rows)


def test_a_mix_within_what_was_measured_says_nothing():
    assert extrapolation_notes(MIX, doses(60.0), 300.0) == ()


def test_a_move_beyond_the_dose_is_named_with_its_category():
    (note,) = extrapolation_notes(MIX, doses(60.0 / EXTRAPOLATES - 1), 300.0)
    assert note.startswith("1 of 3 categories") and "'c0' 1.5 times" in note


def test_a_budget_beyond_the_runs_is_said():
    (note,) = extrapolation_notes(MIX, doses(100.0), 30.0)
    assert note.startswith("the mix has 10.0 times the rows")
