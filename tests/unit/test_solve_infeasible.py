"""Limits that conflict are named, and the relaxation that is offered is right and smallest."""

import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from case_counts import CaseCount
from curved_problems import curved_problem
from mix_reference import is_feasible, problem, question_where

from system.errors import DataError, InfeasibleMixError
from system.solve import GroupLimit, MixOptions, MixProblem, MixSession, solve_mix

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


def message(p, options) -> str:
    with pytest.raises(InfeasibleMixError) as caught:
        solve_mix(p, options)
    return str(caught.value)


def test_budget_above_supply_says_by_how_much():
    p = problem(EFFECT, [100, 100, 100], supply_S=[100, 100, 100])
    text = message(p, MixOptions(budget=450))
    assert "allow 300 examples together, less than the budget of 450" in text
    assert "lower the budget by 150" in text and "factor 1.5" in text


def test_lower_limits_above_the_budget_are_named():
    text = message(problem(EFFECT, [1, 1, 1], lower_S=[50, 30, 30]), MixOptions(budget=100))
    assert "add up to 110 examples, more than the budget of 100" in text


def test_lower_limit_above_the_supply_of_its_category():
    p = problem(EFFECT, [100, 100, 100], lower_S=[0, 0, 90], supply_S=[999, 999, 80])
    assert "category 'c2' must have at least 90" in message(p, MixOptions())


def test_group_minimum_against_the_trust_region():
    """The group holds 100 of 300 and must hold 160: 60 must move, 20 % of the budget."""
    group = GroupLimit(name="code", members=("c0",), lower=160)
    text = message(problem(EFFECT, [100, 100, 100]), MixOptions(move=0.1, groups=(group,)))
    assert "the trust region (move = 0.1" in text and "the minimum of group 'code' (160)" in text
    assert "raise move from 0.1 to 0.2" in text
    assert "lower the minimum of group 'code' to 130" in text
    assert "guard" not in text and "supply" not in text


def test_group_maximum_against_supplies_needs_more_data():
    p = problem(EFFECT, [100, 100, 100], supply_S=[200, 105, 110])
    group = GroupLimit(name="a", members=("c0",), upper=50)
    text = message(p, MixOptions(move=1.0, groups=(group,)))
    assert "raise the maximum of group 'a' to 85" in text
    assert "use 140 examples of category 'c1' (35 more" in text
    assert "trust region" not in text


def test_guard_against_group_minimum_offers_both():
    effect = [[1.0, 0.0], [0.0, 1.0]]
    p = problem(effect, [100, 100])
    group = GroupLimit(name="a", members=("c0",), lower=130)
    text = message(p, MixOptions(move=1.0, guard=0.1, groups=(group,)))
    assert "the guard of target 'c1' (may lose at most 10)" in text
    assert "let target 'c1' lose 30" in text
    assert "lower the minimum of group 'a' to 110" in text


def test_cap_against_group_minimum():
    group = GroupLimit(name="a", members=("c0",), lower=130)
    text = message(problem(np.eye(2), [100, 100]), MixOptions(move=1.0, cap=0.1, groups=(group,)))
    assert "(20 examples)" in text and "the cap on the move of category 'c" in text
    assert "lower the minimum of group 'a' to 120" in text
    assert "move by 30" not in text, "the cap of c0 alone would not do: c1 is capped as well"


def test_two_independent_conflicts_are_told_together():
    groups = (
        GroupLimit(name="a", members=("c0",), lower=150),
        GroupLimit(name="b", members=("c1",), upper=50),
    )
    p = problem(np.eye(4), [100, 100, 100, 100], cap_S=[10, 10, 400, 400])
    text = message(p, MixOptions(move=1.0, groups=groups))
    assert "No single limit is enough; together these are: " in text
    assert "'a'" in text.split("together these are")[1] or "'c0'" in text
    assert "'b'" in text.split("together these are")[1] or "'c1'" in text


def test_too_few_categories_says_how_many_it_takes():
    p = problem(EFFECT, [100, 100, 100])
    assert "raise max_categories to 3" in message(p, MixOptions(move=0.1, max_categories=1))
    assert solve_mix(p, MixOptions(move=0.4, max_categories=2)).status == "optimal"


def test_whole_numbers_that_do_not_exist_are_blamed_on_integer():
    p = problem(np.eye(2), [10, 10])
    group = GroupLimit(name="a", members=("c0",), lower=10.2, upper=10.8)
    assert "no whole-number mix" in message(p, MixOptions(move=1.0, integer=True, groups=(group,)))


def test_whole_numbers_that_do_not_exist_are_not_blamed_on_the_number_of_categories():
    p = problem(np.eye(2), [10, 10])
    group = GroupLimit(name="a", members=("c0",), lower=10.2, upper=10.8)
    for most in (1, 2):
        limits = {"move": 1.0, "integer": True, "max_categories": most, "groups": (group,)}
        text = message(p, MixOptions(**limits))
        assert "no whole-number mix" in text and "raise max_categories" not in text


@pytest.mark.parametrize("missing", [1e-9, 1e-7, 1e-5])
def test_a_conflict_by_a_hair_is_not_blamed_on_whole_numbers(missing):
    p = problem(np.eye(2), [100, 100])
    group = GroupLimit(name="a", members=("c0",), lower=120.0 + 200.0 * missing)
    text = message(p, MixOptions(move=0.1, groups=(group,)))
    assert "whole" not in text
    assert "the trust region" in text and "lower the minimum of group 'a' to 120" in text


@pytest.mark.parametrize("is_concave", [True, False])
def test_guards_that_follow_a_curve_are_named_and_their_relaxations_help(is_concave):
    group = GroupLimit(name="a", members=("c0",), lower=150.0)
    options = MixOptions(objective="concave", move=0.5, budget=400.0, groups=(group,))
    cases, num_offers = CaseCount(), 0
    for seed in range(12):
        p = curved_problem(seed, is_concave=is_concave)
        try:
            solve_mix(p, replace(options, guard_nats=20.0))
        except InfeasibleMixError as error:
            text = str(error)
        else:
            cases.add(False)
            continue
        cases.add(True)
        assert "whole" not in text and "the guard of target" in text
        assert "any one of these" in text.lower()
        for name, loss in re.findall(r"let target '(c\d)' lose ([0-9.e+-]+)", text):
            guard_T = np.full(4, 20.0)
            guard_T[int(name[1])] = float(loss) * (1 + 1e-6)
            assert solve_mix(replace(p, guard_T=guard_T), options).counts()["c0"] >= 150 - 1e-6
            num_offers += 1
    cases.require(0.6)
    assert num_offers >= 4


def test_a_smaller_supply_that_a_guard_forbids_offers_the_supply():
    session = MixSession(
        problem(np.eye(2), [100, 100], supply_S=[200, 200]), MixOptions(guard=0.02)
    )
    with pytest.raises(InfeasibleMixError) as caught:
        session.what_if(supply={"c0": 95})
    assert "use 98 examples of category 'c0' (3 more" in str(caught.value)


def test_a_conflict_of_three_thousand_limits_takes_little_memory():
    n = 3000
    p = problem(np.zeros((1, n)), np.full(n, 10.0), supply_S=np.full(n, 10.4), targets=("t",))
    group = GroupLimit(name="a", members=p.categories[:1000], lower=10_500)
    tracemalloc.start()
    text = message(p, MixOptions(move=0.5, groups=(group,)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "lower the minimum of group 'a' to 10400" in text
    assert peak < 100 * 2**20, "dense rows would take 360 MiB"


def group_above_the_base(p, options) -> tuple[MixProblem, MixOptions]:
    """The first half of the categories must hold more than a narrow trust region allows."""
    half = len(p.categories) // 2
    lower = float(p.base_S[:half].sum() * 1.4 + 5)
    group = GroupLimit(name="half", members=p.categories[:half] or p.categories, lower=lower)
    p = replace(p, tokens_S=None)
    return p, replace(options, groups=(group,), move=0.05, unit="examples")


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_every_single_relaxation_that_is_offered_does_help(first):
    num_wider = 0
    for seed in range(first, first + 20):
        p, options = question_where(
            np.random.default_rng(seed),
            "linear",
            lambda p, options: len(p.categories) >= 3 and not is_feasible(p, options),
            group_above_the_base,
        )
        text = message(p, options)
        wider = re.search(r"raise move from 0.05 to ([0-9.e+-]+)", text)
        lower = re.search(r"lower the minimum of group 'half' to ([0-9.e+-]+)", text)
        assert lower is not None, "without the group every one of these problems has a mix"
        (group,) = options.groups
        needed = float(lower.group(1))
        solve_mix(p, replace(options, groups=(replace(group, lower=needed * (1 - 1e-5)),)))
        above = replace(group, lower=needed * (1 + 1e-3) + 1e-3)
        message(p, replace(options, groups=(above,)))
        if wider is not None:
            num_wider += 1
            needed = float(wider.group(1))
            solve_mix(p, replace(options, move=min(needed * (1 + 1e-5), 1.0)))
            message(p, replace(options, move=needed * (1 - 1e-3)))
    assert num_wider >= 3


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("base_S", [1.0, -2.0, 3.0], "every base count must be a number >= 0"),
        ("base_S", [1.0, float("nan"), 3.0], "every base count"),
        ("base_S", [0.0, 0.0, 0.0], "at least one category with a positive count"),
        ("base_S", [1.0, 2.0], "one base count for each of the 3"),
        ("supply_S", [1.0, 2.0, -3.0], "every supply"),
        ("tokens_S", [1.0, 0.0, 1.0], "tokens per example must be > 0"),
        (
            "tokens_S",
            [1.0, float("inf"), 1.0],
            "tokens per example must be > 0 and finite, found inf",
        ),
        ("importance_T", [0.0, 0.0, 0.0], "at least one target needs a positive importance"),
        ("se_TS", -np.ones((3, 3)), "standard errors must be >= 0"),
        ("identifiable_TS", np.ones((3, 3)), "must be a bool table"),
        ("categories", ("a", "a", "b"), "found 'a' more than once"),
    ],
)
def test_unusable_input_is_refused_with_its_place(field, value, said):
    with pytest.raises(DataError, match=re.escape(said)):
        problem(EFFECT, **({"base_S": [1.0, 2.0, 3.0]} | {field: value}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_effects_that_are_not_finite_are_refused_by_name(bad):
    effect = np.array(EFFECT)
    effect[1, 2] = bad
    with pytest.raises(DataError, match="target 'c1', source 'c2'"):
        problem(effect, [1, 1, 1])


def test_shape_that_does_not_fit_the_names_is_refused():
    with pytest.raises(DataError, match=r"3 targets .* 3 source categories, found shape \(2, 3\)"):
        problem(EFFECT[:2], [1, 1, 1], targets=("c0", "c1", "c2"))
