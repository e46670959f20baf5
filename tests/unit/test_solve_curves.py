"""Objective `concave` with several doses: against the hypograph written down for scipy."""

from dataclasses import replace

import numpy as np
import pytest
from curved_problems import curved_problem
from mix_reference import named, problem
from scipy.optimize import isotonic_regression, linprog

from system.config import SolveConfig
from system.errors import DataError
from system.influence.estimate.matrix import estimate_effects
from system.mix.question import mix_options, mix_problem
from system.solve import MixOptions, MixProblem, MixSession, expected_regret, solve_mix, sweep_move
from system.solve.curves import build_curve, non_increasing
from system.solve.model import build_model
from system.solve.problem import DoseCurve


def lines(asked: MixProblem):
    """[N, T, S] slopes of the polylines from left to right, and the knots [N - 1] between them."""
    add, remove = asked.curve_add, asked.curve_remove
    assert add is not None and remove is not None
    slopes, knots = [], []
    for curve, sign in ((remove, -1.0), (add, 1.0)):
        total_KTS = curve.effect_KTS * curve.dose_KS[:, None, :]
        zero = np.zeros((1, *total_KTS.shape[1:]))
        steps = np.diff(np.concatenate([zero, total_KTS]), axis=0)
        width_KS = np.diff(curve.dose_KS, axis=0, prepend=0.0)
        slopes.append((steps / width_KS[:, None, :])[:: int(sign)])
        knots.append(sign * curve.dose_KS[:-1, 0][:: int(sign)])
    return np.concatenate(slopes), np.concatenate([knots[0], [0.0], knots[1]])


def hypograph(asked: MixProblem, options: MixOptions):
    """The best importance-weighted change: t_ij below every line, x net moves, p what is added."""
    slope_NTS, knot_N = lines(asked)
    count, T, S = slope_NTS.shape
    level_NTS = np.zeros_like(slope_NTS)  # intercepts: lines meet at the knots, all through zero
    zero = int(np.flatnonzero(knot_N == 0.0)[0])
    for n in range(zero + 1, count - 1):
        level_NTS[n + 1] = level_NTS[n] + knot_N[n] * (slope_NTS[n] - slope_NTS[n + 1])
    for n in range(zero - 1, -1, -1):
        level_NTS[n] = level_NTS[n + 1] + knot_N[n] * (slope_NTS[n + 1] - slope_NTS[n])
    model = build_model(asked, options)
    size = S + S + T * S
    rows, bounds = [], []
    for n in range(count):
        for i in range(T):
            for j in range(S):
                row = np.zeros(size)
                row[2 * S + i * S + j], row[j] = 1.0, -slope_NTS[n, i, j]
                rows.append(row)
                bounds.append(level_NTS[n, i, j])
    for j in range(S):
        row = np.zeros(size)
        row[j], row[S + j] = 1.0, -1.0
        rows.append(row)
        bounds.append(0.0)
    row = np.zeros(size)
    row[S : 2 * S] = 1.0
    rows.append(row)
    bounds.append(model.move_budget)
    for i in np.flatnonzero(np.isfinite(model.guard_T)):
        row = np.zeros(size)
        row[2 * S + i * S : 2 * S + (i + 1) * S] = -1.0
        rows.append(row)
        bounds.append(model.guard_T[i])
    cost = np.zeros(size)
    cost[2 * S :] = -np.repeat(asked.importance_T, S)
    total = np.zeros((1, size))
    total[0, :S] = 1.0
    limits = [(-model.down_S[j], model.up_S[j]) for j in range(S)]
    limits += [(0, None)] * S + [(None, None)] * (T * S)
    found = linprog(
        cost, np.array(rows), np.array(bounds), total, [0.0], bounds=limits, method="highs"
    )
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("knobs", [{}, {"guard": 0.05}, {"guard_nats": 3.0}, {"cap": 0.12}])
def test_the_mix_is_as_good_as_the_hypograph_allows(seed, knobs):
    asked = curved_problem(seed, upper_S=np.array([110.0, 300.0, 150.0, 300.0]))
    options = MixOptions(objective="concave", move=0.3, budget=400.0, **knobs)
    mix = solve_mix(asked, options)
    best = hypograph(asked, options)
    assert mix.expected_gain == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert mix.gain == pytest.approx(mix.expected_gain, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_whole_mix_is_within_its_gap_of_the_fractional_one(seed):
    asked = curved_problem(seed)
    options = MixOptions(objective="concave", move=0.3, budget=400.0, guard=0.3)
    exact = solve_mix(asked, options)
    whole = solve_mix(asked, replace(options, integer=True))
    assert all(item.count == round(item.count) for item in whole.categories)
    assert sum(item.count for item in whole.categories) == 400
    assert whole.expected_gain <= exact.expected_gain + 1e-6
    assert whole.expected_gain >= exact.expected_gain - 4 * np.abs(lines(asked)[0]).max()
    assert whole.relaxation is not None
    assert whole.relaxation.gain >= exact.gain - 1e-6, "it may leave part of an example unspent"


def test_a_move_stops_at_the_dose_beyond_which_it_does_not_pay():
    """By hand: c0 brings 3 a row up to ten rows, then 1; taking from c1 costs 2 a row."""
    dose_KS = np.array([[10.0, 10.0], [30.0, 30.0]])

    def curve(first, second):
        total = np.stack([np.diag(first) * 10.0, np.diag(first) * 10.0 + np.diag(second) * 20.0])
        effect_KTS = total / dose_KS[:, None, :]
        return DoseCurve(dose_KS=dose_KS, effect_KTS=effect_KTS, se_KTS=np.ones((2, 2, 2)))

    asked = problem(
        np.zeros((2, 2)), [100.0, 100.0], effect_remove_TS=np.zeros((2, 2)),
        importance_T=np.ones(2),
        curve_add=curve([3.0, 0.5], [1.0, 0.5]), curve_remove=curve([4.0, 2.0], [4.0, 2.5]),
    )  # fmt: skip
    mix = solve_mix(asked, MixOptions(objective="concave", move=0.2))
    assert [item.count for item in mix.categories] == [110.0, 90.0]
    assert mix.expected_gain == pytest.approx(10.0)
    assert mix.categories[0].reduced_cost is not None and mix.categories[0].reduced_cost <= 0
    assert mix.move_price == 0.0
    assert any("2 measured doses" in note for note in mix.notes)
    linear = solve_mix(asked, MixOptions(objective="linear", move=0.2))
    assert linear.moved == 0.0, "single slopes of zero know nothing of the doses"


def test_segments_that_end_at_the_supply_have_its_price():
    asked = curved_problem(3, is_concave=True)
    asked = replace(asked, supply_S=np.array([105.0, 400.0, 400.0, 400.0]))
    options = MixOptions(objective="concave", move=0.5, budget=400.0)
    session = MixSession(asked, options)
    prices = [item.supply_price for item in session.mix.categories]
    more = session.what_if(supply={"c0": 105.01})
    assert prices[0] is not None
    assert more.gain - session.mix.gain == pytest.approx(0.01 * prices[0], abs=1e-7)


def test_the_sweep_is_concave_and_follows_the_curve():
    asked = curved_problem(5)
    options = MixOptions(objective="concave", move=0.1, budget=400.0)
    points = sweep_move(asked, options, [0.0, 0.1, 0.2, 0.3])
    gains = np.array([point.gain for point in points])
    assert gains[0] == pytest.approx(0.0)
    assert (np.diff(gains) >= -1e-9).all() and (np.diff(gains, 2) <= 1e-9).all()
    for point in points[1:]:
        again = hypograph(asked, replace(options, move=point.move))
        assert point.gain == pytest.approx(again, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_projection_is_weighted_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 8))
    value, weight = rng.normal(size=(count, 3, 2)), rng.uniform(0.1, 5.0, (count, 3, 2))
    found = non_increasing(value, weight)
    for place in np.ndindex(3, 2):
        line = (slice(None), *place)
        expected = isotonic_regression(value[line], weights=weight[line], increasing=False).x
        np.testing.assert_allclose(found[line], expected, atol=1e-12)
    assert (np.diff(found, axis=0) <= 0).all()


def test_curves_that_fall_stay_as_measured_and_others_are_counted():
    options = MixOptions(objective="concave")
    curve = build_curve(curved_problem(0), options)
    assert curve is not None and curve.num_projected == 0 and curve.shift == 0.0
    assert "not concave" not in curve.note
    asked = curved_problem(0, is_concave=False)
    curve = build_curve(asked, options)
    assert curve is not None and curve.shift > 0
    slope_NTS, _ = lines(asked)
    rising = (np.diff(slope_NTS, axis=0) > 0).any(axis=0)
    assert curve.num_projected == rising.sum()
    assert f"{rising.sum()} of 16 curves were not concave" in curve.note
    fitted = np.concatenate([curve.remove.slope_KTS[::-1], curve.add.slope_KTS])
    assert (np.diff(fitted, axis=0) <= 0).all()


def test_a_source_with_fewer_doses_goes_on_with_its_last_slope():
    asked = curved_problem(2, capped=True)
    curve = build_curve(asked, MixOptions(objective="concave"))
    assert curve is not None and curve.num_projected == 0
    amount_S = np.array([200.0, 0.0, 0.0, 0.0])
    first, second = curve.add.slope_KTS[:2, :, 0]
    np.testing.assert_allclose(curve.add.change(amount_S), 10 * first + 190 * second)


def test_the_regret_draws_whole_curves():
    asked = curved_problem(1)
    exact = {
        name: replace(getattr(asked, name), se_KTS=np.zeros((3, 4, 4)))
        for name in ("curve_add", "curve_remove")
    }
    options = MixOptions(objective="concave", move=0.3, budget=400.0)
    known = expected_regret(replace(asked, **exact), options, num_draws=5)
    assert known.value == pytest.approx(0.0, abs=1e-6) and not known.undecided
    assert expected_regret(asked, options, num_draws=20).value > 0


def test_other_objectives_and_few_categories_do_not_use_curves():
    asked = curved_problem(1)
    for options in (
        MixOptions(objective="linear"),
        MixOptions(objective="robust"),
        MixOptions(objective="max-min"),
        MixOptions(objective="concave", max_categories=2),
    ):
        assert build_curve(asked, options) is None


def levels(direction, doses=(16.0, 32.0, 64.0)):
    from dose_world import CurvedWorld

    found = CurvedWorld(num_categories=4, doses=doses).measure(3, direction=direction)
    return [estimate_effects(item).matrix for item in found]


def test_the_run_hands_its_doses_to_the_optimiser():
    solve = SolveConfig(budget=1000, objective="concave", move=0.2)
    counts = dict.fromkeys(named(4), 500)
    both = {direction: levels(direction) for direction in ("add", "remove")}
    largest = {direction: found[-1] for direction, found in both.items()}
    asked = mix_problem(solve, largest, counts, None, both)
    assert asked.curve_add is not None and asked.curve_remove is not None
    np.testing.assert_array_equal(asked.curve_add.dose_KS[:, 0], [16.0, 32.0, 64.0])
    np.testing.assert_array_equal(asked.curve_remove.effect_KTS[1], both["remove"][1].shrunk_TS)
    mix = solve_mix(asked, mix_options(solve, is_believed=True))
    assert any("3 measured doses" in note for note in mix.notes)
    one = mix_problem(
        solve, {"remove": largest["remove"]}, counts, None, {"remove": both["remove"]}
    )
    assert one.curve_add is not None
    np.testing.assert_array_equal(one.curve_add.effect_KTS[0], both["remove"][0].shrunk_TS)
    assert len(one.curve_add.dose_KS) == 1


@pytest.mark.parametrize("knobs", [{"objective": "linear"}, {"matrix": "gamma"}, {}])
def test_one_dose_linear_and_gamma_know_no_curve(knobs):
    solve = SolveConfig(budget=1000, **{"objective": "concave", **knobs})
    both = {
        name: levels(name) if knobs else levels(name, doses=(32.0,)) for name in ("add", "remove")
    }
    largest = {direction: found[-1] for direction, found in both.items()}
    asked = mix_problem(solve, largest, dict.fromkeys(named(4), 500), None, both)
    assert asked.curve_add is None and asked.curve_remove is None


def test_doses_that_fall_are_refused():
    curve = curved_problem(0).curve_add
    assert curve is not None
    with pytest.raises(DataError, match="positive and ascend"):
        replace(curve, dose_KS=curve.dose_KS[::-1])
    with pytest.raises(DataError, match=r"\[doses, targets, sources\]"):
        replace(curve, se_KTS=curve.se_KTS[:2])


def test_curves_that_are_not_identifiable_count_as_zero():
    asked = curved_problem(3, is_concave=False)
    assert asked.curve_add is not None and asked.curve_remove is not None
    mask_TS = np.ones((4, 4), bool)
    mask_TS[1, 2] = mask_TS[3, 0] = False
    silent = {
        name: replace(curve, effect_KTS=np.where(mask_TS, curve.effect_KTS, 0.0))
        for name, curve in (("curve_add", asked.curve_add), ("curve_remove", asked.curve_remove))
    }
    options = MixOptions(objective="concave", move=0.3)
    masked = solve_mix(replace(asked, identifiable_TS=mask_TS), options)
    zeroed = solve_mix(replace(asked, **silent), options)
    assert masked.counts() == pytest.approx(zeroed.counts())
    assert [t.change for t in masked.targets] == pytest.approx([t.change for t in zeroed.targets])
    assert "2 of 16 effects were not identifiable and count as zero" in masked.notes[0]
