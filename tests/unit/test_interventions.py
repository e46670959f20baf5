import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from design_builders import (
    SOURCES,
    active_ids,
    config,
    design_of,
    schedule,
    unit,
)

from system.config import InfluenceConfig
from system.errors import DataError
from system.influence.design.design import Design
from system.influence.design.interventions import (
    BASE,
    DOSE,
    EXTRA,
    active_rows,
    allocate_rows,
    assemble_design,
    fit_dose,
    requested_rows,
    response_tokens,
)
from system.schema import TOKENS


def test_removing_masks_the_dose_rows_of_one_category_and_nothing_else():
    made = schedule()
    reference = active_ids(made, unit("reference"))
    removed = active_ids(made, unit("remove", 1))
    gone = reference - removed
    assert len(gone) == 8 and all(name.startswith("beta-") for name in gone)
    assert removed < reference


def test_adding_switches_on_the_extra_rows_of_one_category_and_nothing_else():
    made = schedule(directions=("add", "remove"))
    reference = active_ids(made, unit("reference"))
    added = active_ids(made, unit("add", 2)) - reference
    assert len(added) == 8 and all(name.startswith("gamma-") for name in added)
    assert len(reference) == 3 * 24
    assert len(made.plan.table) == 3 * 32


def test_all_runs_share_steps_batches_and_denominators():
    made = schedule(directions=("add", "remove"))
    assert made.plan.num_steps == -(-3 * 32 // 4)
    # Inactive rows stay in the denominators: each step still counts all of its rows.
    np.testing.assert_array_equal(made.plan.denominators, 2 * 4)


def test_replications_differ_in_rows_and_in_order():
    first, second = schedule(0), schedule(1)
    ids = [made.plan.table.column("id").to_pylist() for made in (first, second)]
    assert set(ids[0]) != set(ids[1])
    small = dict.fromkeys(SOURCES, 24)
    first, second = schedule(0, supply=small), schedule(1, supply=small)
    ids = [made.plan.table.column("id").to_pylist() for made in (first, second)]
    assert set(ids[0]) == set(ids[1]) and ids[0] != ids[1]


def test_the_same_seed_gives_the_same_schedule():
    assert schedule().replication == schedule().replication


def test_categories_are_mixed_in_the_order():
    categories = schedule().plan.table.column("category").to_pylist()
    changes = sum(a != b for a, b in itertools.pairwise(categories))
    assert changes > len(categories) / 3


def test_warm_up_rows_are_other_rows_where_there_are_enough():
    made = schedule(estimator="branch", warm_rows_per_category=12)
    assert made.warm is not None
    warm = set(made.warm.table.column("id").to_pylist())
    assert len(warm) == 3 * 12
    assert not warm & set(made.plan.table.column("id").to_pylist())
    assert active_rows(made.warm, unit("warm"), design_of([made])).all()


def test_reused_warm_up_rows_are_written_down():
    made = schedule(
        supply={"alpha": 500, "beta": 30, "gamma": 500},
        estimator="branch",
        warm_rows_per_category=12,
    )
    assert made.replication.rows["beta"].warm_reused == 6
    assert made.replication.rows["alpha"].warm_reused == 0
    assert made.warm is not None and made.warm.table.num_rows == 36


def test_a_small_category_gets_a_smaller_dose_in_proportion():
    made = schedule(supply={"alpha": 500, "beta": 16, "gamma": 500}, dose_rows=12)
    rows = made.replication.rows["beta"]
    assert (rows.base, rows.dose, rows.available) == (16, 8, 16)
    assert made.replication.dose_tokens["remove"]["beta"] == 8 * 2
    assert len(active_ids(made, unit("reference")) - active_ids(made, unit("remove", 1))) == 8


def test_with_both_directions_a_small_category_keeps_equal_doses():
    asked = requested_rows(config(directions=("add", "remove"), rows_per_category=48, dose_rows=16))
    rows = allocate_rows("c", 40, asked)
    assert (rows.base, rows.dose, rows.extra) == (30, 10, 10)


def test_a_small_category_may_still_be_removed_as_a_whole():
    rows = allocate_rows("c", 16, requested_rows(config(rows_per_category=24, dose_rows=24)))
    assert (rows.base, rows.dose) == (16, 16)


def test_doses_by_tokens_have_as_many_rows_as_fit():
    """Rows have two response tokens each, so a dose of 21 tokens has ten rows."""
    made = schedule(directions=("add", "remove"), dose_rows=16, dose_tokens=21)
    for rows in made.replication.rows.values():
        assert (rows.base, rows.dose, rows.extra) == (24, 10, 10)
    assert set(made.replication.dose_tokens["remove"].values()) == {20}
    assert len(active_ids(made, unit("reference"))) == 3 * 24
    assert len(active_ids(made, unit("reference")) - active_ids(made, unit("remove", 1))) == 10
    design = design_of([made], dose_tokens=21)
    assert design.asked["dose_tokens"] == 21
    assert "dose_tokens" not in design_of([made]).asked


def test_a_dose_by_tokens_is_a_part_of_the_dose_by_rows_and_never_below_eight_rows():
    share = allocate_rows(
        "c", 100, requested_rows(config(directions=("add", "remove"), dose_rows=16))
    )
    long_N, short_N = np.full(40, 1000), np.full(40, 1)
    mixed_N = np.concatenate([np.full(24, 1), np.full(16, 7)])
    assert fit_dose(share, mixed_N, None, 8) == share
    for response_N, dose, extra in ((long_N, 8, 8), (short_N, 16, 16), (mixed_N, 16, 14)):
        found = fit_dose(share, response_N, 100, 8)
        assert (found.base, found.warm, found.available) == (share.base, share.warm, 100)
        assert (found.dose, found.extra) == (dose, extra)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"dose_rows": [8, 16]}, "several doses"), ({"append": True}, "append, which adds rows")],
)
def test_a_dose_by_tokens_is_one_dose_of_a_whole_measurement(knobs, words):
    with pytest.raises(ValueError, match=words):
        InfluenceConfig.model_validate({"dose_tokens": 100, **knobs})


@pytest.mark.parametrize("available", [0, 3, 11])
def test_a_category_too_small_for_a_dose_is_named_with_numbers(available):
    asked = requested_rows(config(dose_rows=16))
    with pytest.raises(
        DataError, match=rf"'tiny' has {available} usable.*expected 24.*at least 12"
    ):
        allocate_rows("tiny", available, asked)


def test_whole_category_may_be_removed():
    made = schedule(rows_per_category=8, dose_rows=8)
    left = active_ids(made, unit("remove", 0))
    assert not any(name.startswith("alpha-") for name in left)


def test_roles_are_kept_in_the_plan():
    made = schedule(directions=("add",))
    roles = made.plan.table.column("stage").to_pylist()
    assert {role: roles.count(role) for role in (BASE, DOSE, EXTRA)} == {
        BASE: 3 * 16,
        DOSE: 3 * 8,
        EXTRA: 3 * 8,
    }


def design(**knobs):
    return design_of([schedule(index, **knobs) for index in range(2)], **knobs)


@pytest.mark.parametrize("direction", ["add", "remove"])
def test_a_random_design_switches_half_of_the_doses_in_every_run(direction):
    made = schedule(estimator="random-design", directions=(direction,))
    whole = design_of([made], estimator="random-design", directions=(direction,))
    patterns = made.replication.patterns[direction]
    assert [run.kind for run in whole.all_runs] == [f"mix-{direction}"] * len(patterns)
    on = dict.fromkeys(SOURCES, 0)
    for run, pattern in zip(whole.all_runs, patterns, strict=True):
        mask = active_rows(made.plan, run, whole)
        for source, is_in in zip(SOURCES, pattern, strict=True):
            rows = [
                bool(mask[row])
                for row, (category, role) in enumerate(
                    zip(
                        made.plan.table.column("category").to_pylist(),
                        made.plan.table.column("stage").to_pylist(),
                        strict=True,
                    )
                )
                if category == source and role == (EXTRA if direction == "add" else DOSE)
            ]
            assert len(rows) == 8 and set(rows) == {is_in}
            on[source] += is_in
    assert set(on.values()) == {len(patterns) / 2}


def test_a_design_survives_json():
    made = design(directions=("add", "remove"), estimator="branch")
    assert Design.from_json(json.loads(json.dumps(made.to_json())), "design.json") == made


def test_a_design_counts_its_runs():
    names = [run.name for run in design(directions=("add", "remove")).all_runs]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * 3)
    assert "r01-remove-002" in names and "r00-reference" in names
    assert len(design(estimator="branch").all_runs) == 2 * (2 + 3)


def test_another_format_is_refused():
    with pytest.raises(DataError, match=r"format 1, found 0.*--redo influence"):
        Design.from_json({"format": 0}, "design.json")


def test_one_category_cannot_interact():
    with pytest.raises(DataError, match="at least two categories"):
        assemble_design(
            run_seed=0,
            config=config(),
            sources=("only",),
            targets=(),
            schedules=[],
            heldout_dropped={},
        )


def test_response_tokens_leave_out_the_first_token_of_a_row():
    table = pa.table(
        {
            "id": ["a", "b"],
            "category": ["c", "c"],
            "input_ids": [[1, 2, 3], [4, 5]],
            "response_mask": [[True, True, False], [False, True]],
        },
        schema=TOKENS,
    )
    assert response_tokens(table) == 2
