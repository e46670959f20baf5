"""Effects that are not believed move nothing, but the limits hold; a sweep shows what exists."""

import numpy as np
import pytest
from mix_reference import problem

from system.errors import InfeasibleMixError
from system.solve import GroupLimit, MixOptions, nearest_mix, solve_mix, sweep_move

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


@pytest.mark.parametrize("integer", [False, True])
def test_the_nearest_mix_is_the_base_where_the_base_keeps_the_limits(integer):
    p = problem(EFFECT, [100, 100, 100], se_TS=np.full((3, 3), 0.1))
    mix = nearest_mix(p, MixOptions(integer=integer, objective="robust", guard=0.0))
    assert mix.moved == 0 and mix.counts() == {"c0": 100, "c1": 100, "c2": 100}
    assert not any("breaks a limit" in note for note in mix.notes)


@pytest.mark.parametrize("objective", ["linear", "max-min", "concave"])
def test_a_group_that_the_base_breaks_moves_no_more_than_it_asks_for(objective):
    p = problem(EFFECT, [100, 100, 100], effect_remove_TS=np.array(EFFECT) + 0.1)
    group = GroupLimit(name="a", members=("c0",), lower=117.0)
    options = MixOptions(integer=True, objective=objective, move=0.0, guard=0.0, groups=(group,))
    mix = nearest_mix(p, options)
    assert mix.counts()["c0"] == 117 and mix.moved == pytest.approx(17 / 300)
    assert mix.notes[0].startswith(
        "the base mix breaks a limit (groups or max_categories), so 5.67%"
    )


def test_a_number_of_categories_that_the_base_exceeds_empties_the_smallest():
    p = problem(EFFECT, [100, 40, 160])
    mix = nearest_mix(p, MixOptions(integer=True, max_categories=2, move=0.0))
    assert mix.counts()["c1"] == 0 and mix.moved == pytest.approx(40 / 300)


def test_limits_that_no_mix_satisfies_are_named_all_the_same():
    p = problem(EFFECT, [100, 100, 100], cap_S=[5, 5, 5])
    group = GroupLimit(name="a", members=("c0",), lower=117.0)
    with pytest.raises(InfeasibleMixError, match="minimum of group 'a'"):
        nearest_mix(p, MixOptions(integer=True, groups=(group,)))


@pytest.mark.parametrize(
    "limits",
    [{"max_categories": 2}, {"groups": (GroupLimit(name="a", members=("c0",), lower=190.0),)}],
)
def test_a_sweep_leaves_out_the_moves_at_which_no_mix_exists(limits):
    p = problem(EFFECT, [100, 100, 100])
    options = MixOptions(move=0.4, integer=True, **limits)
    points = sweep_move(p, options, [0.0, 0.35, 0.1, 0.4])
    assert [point.move for point in points] == [0.35, 0.4]
    best = solve_mix(p, MixOptions(move=0.4, **limits))
    assert points[-1].gain == pytest.approx(best.expected_gain)
    assert sweep_move(p, options, [0.0, 0.1]) == []
