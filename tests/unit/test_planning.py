"""What a run says about a mix that leaves what was measured."""

from dataclasses import replace

import numpy as np
import pytest
from influence_world import World
from mix_reference import problem

from system.config import SolveConfig
from system.errors import StageError
from system.influence.estimate.matrix import estimate_effects
from system.mix.notes import (
    EXTRAPOLATES,
    appended_notes,
    choose_shrinkage,
    evidence_notes,
    extrapolation_notes,
)
from system.mix.question import (
    importance_weights,
    mix_options,
    mix_problem,
)
from system.solve import Mix, MixOptions, solve_mix
from system.solve.highs import Solver

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


def test_a_mix_says_what_of_it_rests_on_appended_entries():
    assert appended_notes(MIX, {}) == ()
    assert appended_notes(MIX, {"append": {"categories": []}}) == ()
    (note,) = appended_notes(MIX, {"append": {"categories": ["c0"]}})
    assert "c0 (of which the mix moves c0)" in note and "influence.append: false" in note
    still = solve_mix(
        problem(np.zeros((3, 3)), [100.0, 100.0, 100.0]),
        MixOptions(objective="linear", move=0.2, budget=300.0),
    )
    (note,) = appended_notes(still, {"append": {"categories": ["c0"]}})
    assert "none of which the mix moves" in note
    named = replace(MIX, appended=("c0",))
    assert Mix.from_json(named.to_json()) == named


def test_a_search_that_ends_without_a_mix_names_the_keys_that_let_it_go_on():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 100, (4, 30)).astype(float)  # market split: no point within a node
    half = np.floor(rows.sum(axis=1) / 2)
    solver = Solver()
    solver.add_columns(np.zeros(30), np.zeros(30), np.ones(30), np.ones(30, dtype=bool))
    solver.add_rows(rows, half, half)
    solver.limit_search(1)
    with pytest.raises(StageError, match=r"solve\.mip_max_nodes .*--mip-max-nodes"):
        solver.solve()
    assert "mip_max_nodes" in SolveConfig.model_fields


def test_the_node_limit_of_the_configuration_reaches_the_solver():
    solve = SolveConfig(budget=10, mip_max_nodes=7)
    assert mix_options(solve, is_believed=True).mip_max_nodes == 7
    assert mix_options(SolveConfig(budget=10), is_believed=True).mip_max_nodes is None


def evidence(worth, estimator="retrain", **choices):
    halves = {"worth": worth}
    return {
        "is_believed": True,
        "estimator": estimator,
        "directions": {"remove": {"agreement_heldout_split": halves}},
        **choices,
    }


def test_a_mix_that_moves_unchecked_says_so():
    assert evidence_notes(MIX, evidence(0.7)) == ()
    (note,) = evidence_notes(MIX, evidence(None))
    assert "could not be checked" in note
    (note,) = evidence_notes(
        MIX, evidence(0.7, directions={"remove": {"agreement_heldout_split": None}})
    )
    assert "could not be checked" in note
    assert evidence_notes(MIX, evidence(None, is_believed=False)) == ()


def test_a_mix_that_moves_by_first_order_effects_says_so():
    (note,) = evidence_notes(MIX, evidence(0.9, estimator="gradient"))
    assert "first-order" in note and "confirm them with estimator retrain" in note
    assert evidence_notes(replace(MIX, moved=0.0), evidence(0.9, estimator="gradient")) == ()


@pytest.mark.parametrize("importance", ["base", "uniform", {"c1": 3.0, "c2": 1.0}])
def test_belief_is_weighed_like_the_mix(importance):
    matrix = estimate_effects(World(num_categories=3).measure(2)).matrix
    counts = {"c0": 100, "c1": 300, "c2": 600}
    solve = SolveConfig(budget=300, importance=importance)
    asked = mix_problem(solve, {"remove": matrix}, counts, None)
    weights = importance_weights(solve, matrix.targets, counts)
    np.testing.assert_allclose(weights, asked.importance_T)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([(3.0, 2.0)], True),
        ([(2.0, 3.0)], False),
        ([(2.0, 3.0), (5.0, 1.0)], True),
    ],
    ids=["shrunken better", "raw better", "both directions together"],
)
def test_automatic_shrinkage_follows_what_predicts_better(errors, expected):
    directions = {
        str(place): {"prediction": {"zero": 9.0, "raw": raw, "shrunk": shrunk}}
        for place, (raw, shrunk) in enumerate(errors)
    }
    asked = SolveConfig(budget=300, shrinkage="auto")
    solve, (note,) = choose_shrinkage(asked, {"directions": directions})
    assert solve.shrinkage is expected
    assert note.startswith(f"solved with {'shrunken' if expected else 'raw'} effects")
    fixed = SolveConfig(budget=300, shrinkage=False)
    assert choose_shrinkage(fixed, {"directions": directions}) == (fixed, ())
    unknown = {"directions": {"add": {"prediction": None}}}
    solve, (note,) = choose_shrinkage(asked, unknown)
    assert solve.shrinkage is True and "one replication" in note


@pytest.mark.parametrize("weight", [1.0, 6.0])
def test_a_gain_is_a_mean_over_the_targets_whatever_numbers_weigh_them(weight):
    matrix = estimate_effects(World().measure(3)).matrix
    counts = dict.fromkeys(matrix.sources, 200)
    named = SolveConfig(budget=1000, importance=dict.fromkeys(matrix.targets, weight))
    even = SolveConfig(budget=1000, importance="uniform")
    gains = [
        solve_mix(
            mix_problem(solve, {"remove": matrix}, counts, None),
            mix_options(solve, is_believed=True),
        ).expected_gain
        for solve in (named, even)
    ]
    assert gains[0] == pytest.approx(gains[1])
