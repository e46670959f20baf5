"""What-ifs, the sweep of the trust region, the mix as JSON."""

import numpy as np
import pytest
from hypothesis import given, settings
from mix_reference import feasible_questions, problem

from system.errors import ConfigError
from system.solve import Mix, MixOptions, MixSession, solve_mix, sweep_move

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


def test_sweep_rises_with_falling_prices_and_starts_at_zero():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300], se_TS=np.full((3, 3), 0.05))
    points = sweep_move(p, MixOptions(integer=True), [0.0, 0.05, 0.1, 0.3, 0.2])
    assert [point.move for point in points] == [0.0, 0.05, 0.1, 0.3, 0.2]
    ordered = sorted(points, key=lambda point: point.move)
    gains = [point.gain for point in ordered]
    prices = [point.move_price for point in ordered]
    assert gains[0] == 0 and gains == sorted(gains)
    assert prices == sorted(prices, reverse=True)
    assert ordered[2].gain == pytest.approx(solve_mix(p, MixOptions(move=0.1)).gain)
    # 10 to c1, 20 to c2, 30 from c0: errors of a source add over targets, sources are independent.
    error = 0.05 * np.sqrt(10**2 + 20**2 + 30**2)
    assert ordered[2].gain_se == pytest.approx(error)
    assert ordered[2].gain_low == pytest.approx(ordered[2].gain - 1.96 * error)


def test_what_if_starts_from_the_last_basis():
    rng = np.random.default_rng(0)
    n = 40
    p = problem(rng.normal(0, 0.1, (n, n)) + np.eye(n), rng.integers(50, 500, n).astype(float))
    session = MixSession(p, MixOptions(guard=0.01))
    before = session.mix.solver.iterations
    again = session.what_if()
    assert again.counts() == session.mix.counts()
    assert again.solver.iterations == before, "no simplex step is needed when nothing changes"


def test_what_if_goes_on_from_a_guessed_basis_that_was_optimal_at_once():
    n = 260
    p = problem(np.diag(np.arange(n) / n), np.full(n, 100.0), importance_T=np.ones(n))
    session = MixSession(p, MixOptions(guard_nats=5.0))
    assert session.mix.solver.iterations == 0, "the guess is meant to be optimal"
    narrower = session.what_if(move=0.05)
    assert narrower.gain == pytest.approx(solve_mix(p, MixOptions(guard_nats=5.0, move=0.05)).gain)
    assert narrower.solver.rows == session.mix.solver.rows


def test_what_if_refuses_names_it_does_not_know():
    session = MixSession(problem(EFFECT, [1, 1, 1]), MixOptions())
    with pytest.raises(ConfigError, match="unknown category 'nope'"):
        session.what_if(supply={"nope": 3})
    with pytest.raises(ConfigError, match="give one of them"):
        session.what_if(move=0.1, move_budget=3)


@settings(max_examples=40, deadline=None)
@given(feasible_questions())
def test_mix_survives_its_json(question):
    mix = solve_mix(*question)
    assert Mix.from_json(mix.to_json()) == mix
