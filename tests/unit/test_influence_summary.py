import dataclasses
import json

import numpy as np
import pytest
from influence_world import World

from system.config import InfluenceConfig
from system.influence.design.design import CategoryRows, Design, Replication, Target
from system.influence.estimate.agreement import split_half
from system.influence.estimate.matrix import estimate_effects
from system.influence.estimate.measurements import Losses
from system.influence.estimate.summary import (
    Cost,
    replicates_table,
    result_lines,
    summarise,
    worth_agreement,
)

COST = Cost(
    runs=18, trained_tokens=90_000, scored_tokens=30_000, train_seconds=60.0, score_seconds=9.0
)


def design(names, replications, base=16):
    rows = CategoryRows(available=99, base=base, dose=8, extra=0, warm=0, warm_reused=0)
    return Design(
        estimator="retrain",
        seed=0,
        directions=("remove",),
        sources=names,
        targets=tuple(
            Target(name=name, num_rows=4, num_tokens=8, is_external=False) for name in names
        ),
        replications=tuple(
            Replication(
                index=index,
                seed=index,
                plan_sha256="",
                warm_sha256=None,
                num_steps=1,
                rows=dict.fromkeys(names, rows),
                dose_tokens={"remove": dict.fromkeys(names, 80)},
            )
            for index in range(replications)
        ),
        asked={"base": 16, "dose": 8, "extra": 0, "warm": 0, "heldout": 4},
        dropped={"no-response-token": 3},
    )


def summary(world, replications, base=16, **knobs):
    measured = world.measure(replications)
    made = design(measured.sources, replications, base)
    losses = Losses(
        examples=tuple(np.arange(4) + 4 * row for row in range(len(measured.targets))),
        num_tokens_N=np.full(4 * len(measured.targets), 2),
        loss={
            run.name: np.full(4 * len(measured.targets), 1.5)
            for run in made.all_runs
            if run.kind == "reference"
        },
        num_incomplete=0,
    )
    estimates = {"remove": estimate_effects(measured)}
    return summarise(
        made, InfluenceConfig(**knobs), {"remove": measured}, estimates, losses, COST, {}
    )


@pytest.mark.parametrize("replications", [1, 2, 5])
def test_a_summary_is_json_and_is_told_in_three_to_six_lines(replications):
    found = summary(World(), replications)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert 3 <= len(result_lines(found)) <= 6


def test_one_schedule_is_labelled_held_out_only_and_not_believed():
    found = summary(World(), 1)
    assert found["errors"] == "held-out only" and not found["is_believed"]
    assert "only one replication" in " ".join(result_lines(found))


def test_interactions_that_are_all_alike_agree_on_nothing():
    """Right answers can be all or none: every effect off the diagonal is then exactly zero."""
    measured = World().measure(2)
    alike = dataclasses.replace(
        measured, differences=tuple(np.zeros_like(row) for row in measured.differences)
    )
    found = split_half(alike)
    assert found is not None
    halves = found.to_json()
    assert halves is not None and halves["rank"]["value"] is None and halves["worth"] is None
    found = summary(World(), 2)
    found["directions"]["remove"]["agreement"] = halves
    lines = " ".join(result_lines(found))
    assert "order of the interactions by nothing (all are alike)" in lines


def test_agreement_below_the_limit_is_said():
    noise = World(spread=0.0, example_effect=0.0, seed=3)
    found = summary(noise, 2, min_agreement=0.9)
    assert not found["is_believed"]
    assert "should not move a mix" in " ".join(result_lines(found))
    quiet = World(run_noise=1e-3, shared_noise=1e-3)
    assert summary(quiet, 2, min_agreement=0.5)["is_believed"]


def test_two_categories_have_no_agreement_but_are_not_doubted_for_it():
    found = summary(World(num_categories=2), 3)
    assert found["directions"]["remove"]["agreement"] is None and found["is_believed"]
    assert "only one replication" not in " ".join(result_lines(found))


def test_belief_is_decided_on_different_held_out_rows():
    """What single examples gain replicates perfectly, and says nothing of their categories."""
    world = World(num_categories=12, own=0.0, spread=0.0, run_noise=1e-3, shared_noise=1e-3, seed=0)
    found = summary(world, 2)
    part = found["directions"]["remove"]
    assert part["agreement"]["worth"] > 0.4 > part["agreement_heldout_split"]["worth"]
    assert found["is_checked"] and not found["is_believed"]
    assert worth_agreement(found["directions"]) == part["agreement_heldout_split"]["worth"]


def test_worth_is_weighted_by_what_the_mix_is_wanted_for():
    """Half of the targets are told apart by their sources, the other half are noise."""
    quiet, noisy = (
        World(seed=5, run_noise=1e-3, shared_noise=1e-3),
        World(seed=6, own=0.0, spread=0.0, run_noise=0.2),
    )
    measured = quiet.measure(2)
    rows = (*measured.differences[:4], *noisy.measure(2).differences[4:])
    mixed = dataclasses.replace(measured, differences=rows)
    wanted = np.array([1.0] * 4 + [0.0] * 4)
    alike, weighted = (
        split_half(mixed, split_heldout=True, weight_T=weight) for weight in (None, wanted)
    )
    assert alike is not None and weighted is not None
    assert weighted.worth_agreement > 0.7 > alike.worth_agreement


def test_what_could_not_be_compared_is_not_called_checked():
    assert not summary(World(num_categories=2), 3)["is_checked"]
    assert not summary(World(), 1)["is_checked"]


def test_first_order_effects_are_never_told_without_what_they_are():
    found = summary(World(), 2)
    assert "first-order" not in " ".join(result_lines(found))
    found["estimator"] = "gradient"
    found["cost"]["gradient_tokens"] = 5
    assert "confirm them with estimator retrain" in " ".join(result_lines(found))


def test_the_strongest_pairs_are_the_largest_off_the_diagonal():
    world = World(spread=0.2, run_noise=1e-3, shared_noise=1e-3, example_effect=1e-3)
    truth = world.truth_TS()
    np.fill_diagonal(truth, np.nan)
    row, column = np.unravel_index(np.nanargmin(truth), truth.shape)
    harm = summary(world, 3)["directions"]["remove"]["strongest"]["antagonism"]
    assert (harm["target"], harm["source"]) == (f"c{row}", f"c{column}")
    assert harm["low"] < harm["change"] < harm["high"] < 0


def test_smaller_doses_are_said():
    assert summary(World(), 2)["adapted"] == {}
    found = summary(World(), 2, base=12)
    assert set(found["adapted"]) == set(World().measure(1).sources)
    assert "smaller doses" in " ".join(result_lines(found))


def test_halving_the_error_has_a_price_in_tokens():
    world = World(example_effect=1e-4, example_noise=1e-4)
    halving = summary(world, 3)["directions"]["remove"]["halving"]
    assert halving["trained_tokens"] == pytest.approx(
        (halving["replications"] - 3) * COST.trained_tokens / 3, abs=1
    )


def test_replicates_hold_every_effect_of_every_replication():
    estimate = estimate_effects(World().measure(3))
    table = replicates_table({"remove": estimate})
    assert table.num_rows == 3 * 8 * 8
    first = table.slice(0, 1).to_pylist()[0]
    effects = estimate.matrix.replicate_effects_RTS
    assert effects is not None and first["effect"] == effects[0, 0, 0]
    assert table["effect"][3 * 64 - 1].as_py() == effects[2, 7, 7]


def test_worth_is_believed_where_interactions_drown_in_noise():
    found = summary(World(spread=0.0, example_effect=0.0, shared_noise=1e-3, seed=3), 2)
    halves = found["directions"]["remove"]["agreement"]
    assert found["is_believed"]
    assert halves["worth"] > 0.8 > 0.4 > halves["rank"]["value"]
