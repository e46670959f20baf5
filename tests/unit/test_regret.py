"""The expected regret of a mix against a closed form, and where it must vanish."""

from dataclasses import replace

import numpy as np
import pytest
from mix_reference import problem
from scipy import stats

from system.errors import ConfigError
from system.solve import GroupLimit, MixOptions, expected_regret


def two_categories(difference, error, **fields):
    """One target; only the difference of the two effects matters, with standard error `error`."""
    effect_TS = np.array([[difference, 0.0]])
    se_TS = np.array([[error, 0.0]])
    return problem(effect_TS, [500.0, 500.0], se_TS=se_TS, importance_T=np.ones(1), **fields)


OPTIONS = MixOptions(objective="linear", move=0.1, budget=1000.0)


@pytest.mark.parametrize("difference", [0.0, 1e-4, 5e-4])
def test_two_categories_have_the_unit_normal_loss(difference):
    """100 examples move to the better side: 200 * E[(-d)+] by the normal loss function."""
    error = 4e-4
    found = expected_regret(two_categories(difference, error), OPTIONS, num_draws=1500)
    ratio = difference / error
    loss = error * (stats.norm.pdf(ratio) - ratio * stats.norm.sf(ratio))
    # With no difference the tie goes to the base: half of what a wrong side would cost, both ways.
    expected = 100 * (2 * loss if difference else 2 * error * stats.norm.pdf(0))
    assert found.value == pytest.approx(expected, abs=4 * found.error)
    assert 0 < found.error < 0.15 * found.value


def test_known_effects_cause_no_regret():
    found = expected_regret(two_categories(1e-3, 0.0), OPTIONS)
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert found.gain == pytest.approx(100 * 1e-3)
    assert found.undecided == {}


def test_errors_that_cannot_change_the_mix_cause_no_regret():
    """One category helps far beyond its errors: more precision would buy nothing."""
    found = expected_regret(two_categories(1e-2, 1e-4), OPTIONS)
    assert found.value == pytest.approx(0.0, abs=1e-9)


def test_undecided_categories_are_named():
    effect_TS = np.array([[1.0e-3, 1.001e-3, -1e-2, 0.0]])
    made = problem(
        effect_TS, [250.0] * 4, se_TS=np.array([[1e-4, 1e-4, 1e-5, 1e-5]]),
        importance_T=np.ones(1), cap_S=np.array([80.0] * 4),
    )  # fmt: skip
    found = expected_regret(made, MixOptions(objective="linear", move=0.08, budget=1000.0))
    assert set(found.undecided) == {"c0", "c1"}


def test_equal_seeds_give_equal_answers_and_two_slopes_are_drawn_apart():
    rng = np.random.default_rng(0)
    effect_TS = rng.normal(0, 1e-4, (4, 4))
    made = problem(
        effect_TS, [100.0] * 4, se_TS=np.full((4, 4), 1e-4), importance_T=np.full(4, 0.25),
        effect_remove_TS=effect_TS + 5e-5, se_remove_TS=np.full((4, 4), 1e-4),
    )  # fmt: skip
    options = MixOptions(objective="robust", radius=0.5, move=0.2, budget=200.0)
    first, second = expected_regret(made, options), expected_regret(made, options)
    assert first == second
    assert first.value > 0


def test_it_needs_standard_errors():
    with pytest.raises(ConfigError, match="standard errors"):
        expected_regret(problem(np.eye(2), [10.0, 10.0]), OPTIONS)


def test_draws_that_allow_no_mix_are_left_out_and_counted():
    """A group asks for a move that a guard allows at the estimate, but not in every draw."""
    made = problem(
        np.array([[1e-2, 0.0], [-1e-2, 0.0]]),
        [100.0, 100.0],
        se_TS=np.array([[1e-3, 0.0], [2e-3, 0.0]]),
        targets=("t0", "t1"),
        importance_T=[1.0, 0.5],
    )
    group = GroupLimit(name="a", members=("c0",), lower=110.0)
    options = MixOptions(move=0.2, guard_nats=0.12, groups=(group,))
    found = expected_regret(made, options, num_draws=200)
    assert 10 < found.num_infeasible < 60, "a loss above 0.12 lies one standard error away"
    assert found.value >= 0 and found.known_value == found.value
    never = expected_regret(
        replace(made, se_TS=np.array([[0.0, 0.0], [1e3, 0.0]])),
        replace(options, objective="linear"),
        num_draws=1,
        seed=2,
    )
    assert never.num_infeasible == 1 and never.known_value is None and never.undecided == {}
