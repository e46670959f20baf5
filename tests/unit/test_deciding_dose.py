"""Which dose decides the mix: per category and direction, nearest to what may move."""

import numpy as np
import pytest
from dose_world import CurvedWorld

from system.config import SolveConfig
from system.influence.estimate.matrix import estimate_effects
from system.mix.deciding_dose import choose_doses, deciding_note
from system.mix.question import largest_moves, mix_options, mix_problem
from system.solve import solve_mix


def levels(direction="add", **knobs):
    measured = CurvedWorld(num_categories=4, **knobs).measure(3, direction=direction)
    return [estimate_effects(item).matrix for item in measured]


def test_each_category_takes_the_dose_nearest_to_its_largest_move_by_ratio():
    found = levels()
    chosen = choose_doses(found, "nearest", np.array([5.0, 22.0, 23.0, 1000.0]))
    # Between 16 and 32 the middle by ratio is 22.6.
    np.testing.assert_array_equal(chosen.dose_S, [16.0, 16.0, 32.0, 64.0])
    for column, level in enumerate((0, 0, 1, 2)):
        for name in ("effect_TS", "effect_se_TS", "shrunk_TS", "gamma_TS", "identifiable_TS"):
            np.testing.assert_array_equal(
                getattr(chosen, name)[:, column], getattr(found[level], name)[:, column]
            )
    assert chosen.sources == found[0].sources and chosen.direction == "add"


def test_of_two_doses_as_near_the_larger_and_of_no_move_the_smallest():
    even = levels(doses=(16.0, 64.0))
    chosen = choose_doses(even, "nearest", np.array([32.0, 0.0, 31.9, 32.1]))
    np.testing.assert_array_equal(chosen.dose_S, [64.0, 16.0, 16.0, 64.0])


@pytest.mark.parametrize(
    ("wanted", "dose"), [("largest", 64.0), ("smallest", 16.0), (40, 32.0), (1, 16.0)]
)
def test_the_configuration_overrides_what_is_near(wanted, dose):
    chosen = choose_doses(levels(), wanted, np.full(4, 1000.0))
    np.testing.assert_array_equal(chosen.dose_S, dose)


def test_one_dose_decides_as_it_is():
    (only,) = levels(doses=(32.0,))
    assert choose_doses([only], "smallest", np.zeros(4)) is only


def test_the_note_names_the_doses_and_the_reason():
    found = levels()
    moves = np.array([5.0, 22.0, 23.0, 1000.0])
    chosen = {"add": choose_doses(found, "nearest", moves)}
    note = deciding_note(chosen, "nearest")
    assert "adding 16 rows for 2, 32 rows for 1, 64 rows for 1 categories" in note
    assert note.endswith("(nearest to the largest moves that the limits allow: solve.dose)")
    plain = deciding_note({"remove": choose_doses(found, "largest", moves)}, "largest")
    assert plain == (
        "the effects that decide are those of removing 64 rows (the largest measured: solve.dose)"
    )
    assert "(nearest to 40 rows: solve.dose)" in deciding_note(chosen, 40)


def test_the_largest_moves_follow_from_the_limits():
    counts = {"a": 400, "b": 100, "c": 500}
    solve = SolveConfig(budget=500, move=0.1, category_cap=0.5, lower={"c": 245}, upper={"b": 60})
    moves = largest_moves(solve, counts, None)
    # Base 200, 50, 250: 50 may move in all, half of each category's base at most.
    np.testing.assert_allclose(moves["add"], [50.0, 10.0, 50.0])
    np.testing.assert_allclose(moves["remove"], [50.0, 25.0, 5.0])
    tokens = {"a": 10.0, "b": 20.0, "c": 2.0}
    in_tokens = SolveConfig(budget=3500, unit="tokens", move=0.1)
    np.testing.assert_allclose(largest_moves(in_tokens, counts, tokens)["add"][0], 35.0)


def test_a_mix_made_by_the_nearest_dose_promises_less_than_by_the_smallest():
    """Returns diminish: for a move of hundreds the slope of 16 rows promises too much."""
    quiet = {"shared_noise": 1e-4, "run_noise": 1e-4, "example_effect": 1e-3}
    found = levels(**quiet, example_noise=1e-3, spread=0.0)
    counts = dict.fromkeys(found[0].sources, 500)
    solve = SolveConfig(budget=1000, move=0.2, importance="uniform")
    gains = {}
    for wanted in ("smallest", "nearest"):
        moves = largest_moves(solve, counts, None)
        chosen = choose_doses(found, wanted, moves["add"])
        problem = mix_problem(solve, {"add": chosen}, counts, None)
        gains[wanted] = solve_mix(problem, mix_options(solve, is_believed=True)).expected_gain
    assert 0 < gains["nearest"] < 0.8 * gains["smallest"]
