"""The optimum is the optimum: against scipy, brute force and answers worked out by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from case_counts import CaseCount
from hypothesis import given, settings
from mix_reference import (
    best_whole_gain,
    is_feasible,
    named,
    problem,
    question_where,
    questions,
    reference_gain,
)

from system.errors import InfeasibleMixError
from system.solve import MixOptions, solve_mix
from system.solve.crash import guess_basis
from system.solve.model import build_model

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


def size_of(p) -> float:
    remove = p.effect_add_TS if p.effect_remove_TS is None else p.effect_remove_TS
    return max(np.abs(p.effect_add_TS).max(), np.abs(remove).max()) * p.base_S.sum()


def test_gain_equals_scipys_or_both_find_nothing():
    cases = CaseCount()

    @settings(max_examples=250, deadline=None)
    @given(questions())
    def compare(question):
        p, options = question
        expected = reference_gain(build_model(p, options))
        if cases.add(expected is not None):
            assert solve_mix(p, options).gain == pytest.approx(expected, abs=1e-8 * size_of(p))
        else:
            with pytest.raises(InfeasibleMixError):
                solve_mix(p, options)

    compare()
    cases.require(0.8)


@pytest.mark.parametrize("objective", ["linear", "max-min", "concave", "robust"])
def test_what_scipy_calls_infeasible_is_refused(objective):
    for seed in range(5):
        p, options = question_where(
            np.random.default_rng(seed), objective, lambda p, o: not is_feasible(p, o)
        )
        with pytest.raises(InfeasibleMixError, match=r"lower the minimum|raise move|let target"):
            solve_mix(p, options)


@pytest.mark.parametrize("objective", ["linear", "concave", "robust"])
@pytest.mark.parametrize("seed", range(4))
def test_interior_point_start_gives_scipys_gain(objective, seed):
    rng = np.random.default_rng(seed)
    S, T = 60, 70
    effect = rng.normal(0, 0.2, (T, S))
    fields = {"supply_S": (base := np.round(rng.lognormal(5, 1, S)) + 1) * 1.5}
    if objective == "concave":
        fields["effect_remove_TS"] = effect + np.abs(rng.normal(0, 0.1, (T, S)))
    if objective == "robust":
        fields["se_TS"] = np.abs(rng.normal(0, 0.02, (T, S)))
    p = problem(effect, base, **fields)
    options = MixOptions(objective=objective, guard_nats=float(base.sum()) * 1e-3)
    model = build_model(p, options)
    assert guess_basis(model) is not None
    mix = solve_mix(p, options)
    assert mix.gain > 0
    assert mix.gain == pytest.approx(reference_gain(model), abs=1e-8 * size_of(p))


def whole_question(seed: int):
    """A small problem whose whole mixes can all be tried."""
    rng = np.random.default_rng(seed)
    S = int(rng.integers(1, 5))
    base = rng.integers(0, 7, S).astype(float)
    base[0] += 2
    effect = rng.integers(-2, 3, (S, S)) * 1.0 if seed % 3 == 0 else rng.normal(0, 1, (S, S))
    objective = ["linear", "max-min", "concave", "robust", "robust"][seed % 5]
    fields, options = {}, {}
    if objective == "concave":
        fields["effect_remove_TS"] = effect + np.abs(rng.normal(0, 1, (S, S)))
    if objective == "robust":
        fields["se_TS"] = np.abs(rng.normal(0, 0.3, (S, S)))
        if seed % 5 == 4:
            options |= {"uncertainty": "budget", "sources_off": float(rng.choice([1.0, 1.5]))}
            options["sources_off"] = min(options["sources_off"], float(S))
    if rng.random() < 0.4:
        options["max_categories"] = int(rng.integers(1, S + 1))
    if rng.random() < 0.4:
        options["guard_nats"] = float(rng.choice([0.0, 1.0]))
    if rng.random() < 0.4:
        fields["tokens_S"] = rng.integers(1, 4, S).astype(float)
        options["unit"] = "tokens"
    p = problem(effect, base, **fields)
    move = float(rng.choice([0.1, 0.3, 0.6, 1.0]))
    return p, MixOptions(objective=objective, move=move, integer=True, mip_gap=0.0, **options)


@pytest.mark.parametrize("kind", range(5))
def test_whole_mix_is_the_best_of_all_whole_mixes(kind):
    cases = CaseCount()
    for seed in range(kind, 60, 5):
        p, options = whole_question(seed)
        expected = best_whole_gain(build_model(p, options))
        if not cases.add(expected is not None):
            with pytest.raises(InfeasibleMixError, match="max_categories"):
                solve_mix(p, options)
            continue
        mix = solve_mix(p, options)
        assert mix.gain == pytest.approx(expected, abs=1e-8), seed
        assert all(c.count == int(c.count) for c in mix.categories)
        assert mix.status == "optimal"
        assert mix.move_price is None and all(c.reduced_cost is None for c in mix.categories)
    cases.require(0.8)


@pytest.mark.parametrize("seed", range(25))
def test_category_limit_is_the_best_choice_of_categories(seed):
    """Every subset of categories is solved by scipy with the others forced to zero."""
    rng = np.random.default_rng(seed)
    p, options = question_where(
        rng,
        ["linear", "max-min", "concave", "robust"][seed % 4],
        is_feasible,
        lambda p, o: (replace(p, lower_S=None), replace(o, move=1.0, cap=None, groups=())),
    )
    S = len(p.categories)
    k = int(rng.integers(1, S + 1))
    model = build_model(p, options)
    best = None
    for opened in itertools.combinations(range(S), k):
        closed = np.ones(S, bool)
        closed[list(opened)] = False
        gain = reference_gain(replace(model, ceiling_S=np.where(closed, 0.0, model.ceiling_S)))
        best = gain if best is None else best if gain is None else max(best, gain)
    limited = replace(options, max_categories=k)
    if best is None:
        with pytest.raises(InfeasibleMixError, match="max_categories"):
            solve_mix(p, limited)
        return
    mix = solve_mix(p, limited)
    assert mix.gain == pytest.approx(best, abs=2e-8 * size_of(p))
    assert sum(c.count > 0 for c in mix.categories) <= k


@pytest.mark.parametrize("seed", range(20))
def test_budget_of_uncertainty_equals_all_worst_cases_written_out(seed):
    """With whole ``sources_off`` the adversary has finitely many choices: one row for each."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    S, k = 5, int(rng.integers(1, 4))
    effect, se = rng.normal(0, 1, (S, S)), np.abs(rng.normal(0, 0.5, (S, S)))
    base = rng.integers(20, 100, S).astype(float)
    p = problem(effect, base, se_TS=se)
    options = MixOptions(
        objective="robust",
        uncertainty="budget",
        sources_off=k,
        move=0.3,
        guard_nats=5.0 if seed % 2 else None,
    )
    beta = p.importance_T
    # Columns u, v, g (the guaranteed gain).
    A, b = [np.r_[np.ones(S), np.zeros(S + 1)]], [0.3 * base.sum()]
    for off in itertools.combinations(range(S), k):
        is_off = np.isin(np.arange(S), off)
        for weights, bound in [(beta, None), *((row, 5.0) for row in np.eye(S))]:
            score, loss = weights @ effect, (weights @ se) * is_off
            row = np.r_[-(score - loss), score + loss, 1.0 if bound is None else 0.0]
            if bound is None or seed % 2:
                A.append(row)
                b.append(0.0 if bound is None else bound)
    answer = linprog(
        np.r_[np.zeros(2 * S), -1.0],
        A_ub=np.array(A),
        b_ub=b,
        A_eq=[np.r_[np.ones(S), -np.ones(S), 0.0]],
        b_eq=[0.0],
        bounds=[(0, None)] * S + [(0, x) for x in base] + [(None, None)],
    )
    mix = solve_mix(p, options)
    assert mix.gain == pytest.approx(-answer.fun, abs=1e-6)
    box = solve_mix(p, MixOptions(objective="robust", move=0.3, guard_nats=options.guard_nats))
    assert mix.gain >= box.gain - 1e-9


def test_hand_solved_three_categories():
    """Scores .3, .5333, .3667: b to its supply, the rest of the move to c, all from a."""
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    mix = solve_mix(p, MixOptions(move=0.1))
    assert list(mix.counts().values()) == pytest.approx([70, 110, 120])
    assert mix.base_objective == pytest.approx(120)
    assert mix.objective == pytest.approx(120 + 10 * (0.8 / 1.5 - 0.3) + 20 * (1.1 / 3 - 0.3))
    assert [c.at for c in mix.categories] == ["free", "supply", "free"]
    assert mix.move_price == pytest.approx(1.1 / 3 - 0.3)
    assert mix.categories[1].supply_price == pytest.approx(1.6 / 3 - 1.1 / 3)


def test_max_min_lifts_the_worst_then_the_next():
    """Target 0 can only reach 0, so the level is 0; target 1 must still rise as far as it can."""
    effect = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]
    p = problem(effect, [100, 100, 100])
    mix = solve_mix(p, MixOptions(objective="max-min", move=0.2))
    assert mix.gain == pytest.approx(0, abs=1e-6)
    # 60 examples leave category 0; the second level splits them so that u1 = u2 / 2.
    assert list(mix.counts().values()) == pytest.approx([40, 120, 140], abs=1e-6)


def test_robust_stays_put_when_no_move_pays_for_its_error():
    p = problem(EFFECT, [100, 100, 100], se_TS=np.full((3, 3), 0.5))
    mix = solve_mix(p, MixOptions(objective="robust"))
    assert mix.gain == 0 and mix.counts() == dict.fromkeys(named(3), 100.0)
    assert "stays" in " ".join(mix.notes) or "base mix" in " ".join(mix.notes)


def test_concave_never_adds_and_removes_at_once_even_when_the_table_says_so():
    """Adding measured above removing would be a money pump; the pooled slope is not."""
    p = problem(np.diag([2.0, 1.0]), [50, 50], effect_remove_TS=np.diag([1.0, 1.0]))
    mix = solve_mix(p, MixOptions(objective="concave", move=0.5))
    assert mix.counts() == pytest.approx({"c0": 100.0, "c1": 0.0})
    assert mix.gain == pytest.approx(0.5 * (1.5 * 50) - 0.5 * (1.0 * 50))
    assert "1 effects had adding above removing" in " ".join(mix.notes)


def test_unidentifiable_effects_count_as_zero_and_still_cost_their_error_when_robust():
    mask = np.array([[True, False, True], [True, False, True], [True, False, True]])
    p = problem(EFFECT, [100, 100, 100], identifiable_TS=mask, se_TS=np.full((3, 3), 0.01))
    linear = solve_mix(p, MixOptions())
    assert linear.categories[1].score == 0
    assert "3 of 9 effects were not identifiable" in " ".join(linear.notes)
    robust = solve_mix(p, MixOptions(objective="robust"))
    assert robust.categories[1].score == pytest.approx(-0.01)


def test_scaling_all_effects_keeps_the_mix():
    base = solve_mix(problem(EFFECT, [100, 80, 120]), MixOptions(guard=0.05))
    for factor in (1e-9, 1e-3, 1e6):
        scaled = solve_mix(
            problem(factor * np.array(EFFECT), [100, 80, 120]), MixOptions(guard=0.05)
        )
        assert scaled.counts() == pytest.approx(base.counts())
        assert scaled.gain == pytest.approx(factor * base.gain)


def test_a_budget_of_a_billion_is_solved_as_exactly_as_one_of_a_thousand():
    small = solve_mix(problem(EFFECT, [300, 300, 400]), MixOptions(guard=0.02))
    large = solve_mix(problem(EFFECT, [3e8, 3e8, 4e8]), MixOptions(guard=0.02))
    for a, b in zip(small.categories, large.categories, strict=True):
        assert b.share == pytest.approx(a.share, abs=1e-12)
    assert sum(large.counts().values()) == pytest.approx(1e9, rel=1e-12)


def test_a_category_that_only_harms_goes_to_its_lower_limit():
    effect = [[1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [0.0, 0.0, -1.0]]
    p = problem(effect, [100, 100, 100], lower_S=[0, 0, 30])
    mix = solve_mix(p, MixOptions(move=0.5))
    assert mix.counts()["c2"] == 30
    assert mix.categories[2].at == "lower"
    assert mix.categories[2].reduced_cost < 0 < mix.categories[2].limit_price


def test_ranges_bracket_every_score_where_many_guards_bind():
    rng = np.random.default_rng(0)
    n = 120
    p = problem(rng.normal(0, 0.05, (n, n)) + np.eye(n), np.round(rng.lognormal(5, 1, n)) + 1)
    mix = solve_mix(p, MixOptions(guard=0.02))
    assert sum(t.guard_price > 0 for t in mix.targets) > 20
    for c in mix.categories:
        assert c.score_low is None or c.score_low <= c.score
        assert c.score_high is None or c.score_high >= c.score
