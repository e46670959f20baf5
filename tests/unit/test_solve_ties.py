"""Ties and symmetries: equal data gives equal answers."""

from dataclasses import replace

import numpy as np
import pytest
from mix_reference import is_feasible, named, problem, question_where

from system.solve import MixOptions, solve_mix

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("objective", ["linear", "concave", "robust", "max-min"])
def test_equal_categories_are_treated_equally(seed, objective):
    """Two copies of every category, in any order: copies get equal counts."""
    rng = np.random.default_rng(seed)
    S = 4
    effect = rng.integers(-2, 3, (S, S)) * 0.5
    base = rng.integers(10, 50, S).astype(float)
    double = np.tile(effect, (1, 2))
    fields = {"targets": named(S, "t")}
    if objective == "concave":
        fields["effect_remove_TS"] = double + 0.5
    if objective == "robust":
        fields["se_TS"] = np.full(double.shape, 0.1)
    p = problem(double, np.tile(base, 2), importance_T=np.ones(S), **fields)
    mix = solve_mix(p, MixOptions(objective=objective, move=0.2, guard_nats=5.0))
    counts = np.array(list(mix.counts().values()))
    assert counts[:S] == pytest.approx(counts[S:], abs=1e-6 * mix.budget)


@pytest.mark.parametrize("seed", range(20))
def test_order_of_categories_does_not_change_the_mix(seed):
    rng = np.random.default_rng(seed)
    p, options = question_where(
        rng,
        ["linear", "concave", "robust"][seed % 3],
        holds=lambda p, options: len(p.categories) > 1 and is_feasible(p, options),
        change=lambda p, options: (p, replace(options, groups=())),
    )
    order = rng.permutation(len(p.categories))

    def turned(array):
        return None if array is None else np.asarray(array)[..., order]

    q = replace(
        p,
        categories=tuple(p.categories[j] for j in order),
        **{
            name: turned(getattr(p, name))
            for name in (
                "base_S",
                "effect_add_TS",
                "effect_remove_TS",
                "se_TS",
                "identifiable_TS",
                "supply_S",
                "lower_S",
                "upper_S",
                "tokens_S",
            )
        },
    )
    first = solve_mix(p, options)
    second = solve_mix(q, options).counts()
    for name, count in first.counts().items():
        assert second[name] == pytest.approx(count, abs=1e-6 * first.budget)


def test_all_zero_effects_leave_the_base_and_say_so():
    mix = solve_mix(problem(np.zeros((3, 3)), [10, 20, 30]), MixOptions(guard=0.0))
    assert mix.counts() == {"c0": 10, "c1": 20, "c2": 30}
    assert (mix.gain, mix.move_price) == (0, 0)
    assert "no move within the limits improves" in mix.notes[0]


def test_ties_take_the_least_move_then_spread_it():
    """c1 and c2 are worth the same: the move is split between them, from c0 which is worth less."""
    effect = [[0.0, 1.0, 1.0]]
    p = problem(effect, [60, 20, 20], importance_T=[1.0])
    mix = solve_mix(p, MixOptions(move=0.1))
    assert mix.counts() == pytest.approx({"c0": 50, "c1": 25, "c2": 25})


def test_of_equal_mixes_the_one_that_moves_least_is_taken():
    """c0 and c1 are worth the same: c2's 20 go to them, and they exchange nothing.

    The trust region would let them exchange 10 more; c0 has room for 5 only, so that an exchange
    does not cancel out.
    """
    p = problem([[1.0, 1.0, 0.0]], [50, 30, 20], supply_S=[55, 100, 20], importance_T=[1.0])
    mix = solve_mix(p, MixOptions(move=0.3))
    assert mix.counts() == pytest.approx({"c0": 55, "c1": 45, "c2": 0})
    assert mix.moved == pytest.approx(0.2)


def test_one_category_is_the_whole_budget():
    mix = solve_mix(problem([[1.0]], [40]), MixOptions(budget=100))
    assert mix.counts() == {"c0": 100}
    assert mix.categories[0].share == 1
