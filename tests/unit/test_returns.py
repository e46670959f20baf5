"""Whether returns diminish, on worlds where it is known."""

import dataclasses
import json

import numpy as np
import pytest
from dose_world import CurvedWorld

from system.influence.estimate.dose_summary import (
    DIMINISH,
    GROW,
    STEADY,
    dose_lines,
    summarise_doses,
)
from system.influence.estimate.returns import estimate_change, own_effects, worth
from system.report.dose_section import dose_blocks

QUIET = {"shared_noise": 1e-3, "run_noise": 1e-3, "example_effect": 5e-3, "example_noise": 5e-3}


def coverage(replications, *, worlds=30, **knobs):
    """Share of 95 % intervals of changes that hold the truth: off the diagonal, own, worth."""
    hits = np.zeros(3)
    for seed in range(worlds):
        world = CurvedWorld(seed=seed, **knobs)
        levels = world.measure(replications)
        change = estimate_change(levels[0], levels[-1])
        assert change is not None
        truth_TS, own_TS = world.change_TS(), np.eye(world.num_categories, dtype=bool)
        found = change.effect_TS
        inside_TS = (found.low <= truth_TS) & (truth_TS <= found.high)
        worth_S = truth_TS.mean(axis=0)
        inside_S = (change.worth_S.low <= worth_S) & (worth_S <= change.worth_S.high)
        hits += [inside_TS[~own_TS].mean(), inside_TS[own_TS].mean(), inside_S.mean()]
    return hits / worlds


@pytest.mark.parametrize("scale", [60.0, np.inf], ids=["diminishing", "proportional"])
@pytest.mark.parametrize("replications", [2, 4])
def test_intervals_of_changes_cover_the_truth(replications, scale):
    off, own, of_worth = coverage(replications, scale=scale)
    assert 0.92 < off < 0.995
    assert own > 0.90 and of_worth > 0.92


def test_intervals_of_worth_cover_the_truth_at_a_single_dose():
    inside = []
    for seed in range(30):
        world = CurvedWorld(seed=seed)
        (measured,) = dataclasses.replace(world, doses=(32.0,)).measure(3)
        found, truth_S = worth(measured), world.truth_TS(32.0).mean(axis=0)
        inside.append(((found.low <= truth_S) & (truth_S <= found.high)).mean())
    assert 0.92 < np.mean(inside) <= 1.0


def test_pairing_takes_out_what_the_doses_share():
    """The held-out examples and most of a run's noise are the same: differences are sharper."""
    world = CurvedWorld(alike_over_doses=0.95, example_noise=0.01)
    levels = world.measure(4)
    change = estimate_change(levels[0], levels[-1])
    assert change is not None
    apart = np.hypot(own_effects(levels[0]).se, own_effects(levels[-1]).se)
    assert np.median(np.diag(change.effect_TS.se)) < 0.97 * np.median(apart)


def change_of(world, replications=4):
    levels = world.measure(replications)
    change = estimate_change(levels[0], levels[-1])
    assert change is not None
    return change


def test_a_change_converges_to_the_truth():
    world = CurvedWorld(**QUIET)
    levels = world.measure(40, examples=1000)
    change = estimate_change(levels[0], levels[-1])
    assert change is not None
    np.testing.assert_allclose(change.effect_TS.value, world.change_TS(), atol=3e-5)
    np.testing.assert_allclose(change.worth_S.value, world.change_TS().mean(axis=0), atol=2e-5)


def test_strong_curvature_is_significant_and_none_is_not():
    curved = np.diag(change_of(CurvedWorld(scale=20.0, **QUIET)).effect_TS.sign)
    assert (curved == -1).all()
    false = [
        np.abs(np.diag(change_of(CurvedWorld(scale=np.inf, seed=s)).effect_TS.sign)).mean()
        for s in range(20)
    ]
    assert np.mean(false) < 0.10


def test_sources_without_a_second_dose_are_left_out():
    levels = CurvedWorld().measure(3)
    capped_S = levels[-1].dose_S.copy()
    capped_S[2] = levels[0].dose_S[2]
    change = estimate_change(levels[0], dataclasses.replace(levels[-1], dose_S=capped_S))
    assert change is not None
    assert len(change.sources) == 7 and "c2" not in change.sources
    assert estimate_change(levels[0], levels[0]) is None
    only_S = np.where(np.arange(8) == 5, levels[-1].dose_S, levels[0].dose_S)
    change = estimate_change(levels[0], dataclasses.replace(levels[-1], dose_S=only_S))
    assert change is not None and change.sources == ("c5",)
    assert change.effect_TS.value.shape == (8, 1) and np.isfinite(change.worth_S.se).all()


def test_runs_that_are_all_alike_change_nothing():
    """Right answers can be all or none: every difference is then exactly zero."""
    alike = [
        dataclasses.replace(item, differences=tuple(np.zeros_like(row) for row in item.differences))
        for item in CurvedWorld().measure(2)
    ]
    part = summarise_doses((16, 32, 64), [{"add": item} for item in alike], 0.95)
    assert json.loads(json.dumps(part, allow_nan=False)) == part
    assert part["directions"]["add"]["own"] == {"sources": 8, "diminish": 0, "grow": 0}


def summary_of(world, replications=4, direction="add"):
    levels = world.measure(replications, direction=direction)
    doses = summarise_doses((16, 32, 64), [{direction: level} for level in levels], 0.95)
    return {"doses": doses, "replications": replications, "unit": "nats per response token"}


@pytest.mark.parametrize(
    ("direction", "verdict"), [("add", DIMINISH), ("remove", GROW)], ids=["add", "remove"]
)
def test_a_falling_effect_diminishes_where_added_and_not_where_removed(direction, verdict):
    """Removing: what is missed most goes first, so the first rows were worth more than the last."""
    found = summary_of(CurvedWorld(scale=20.0, **QUIET), direction=direction)["doses"]
    part = found["directions"][direction]
    assert {item["own_change"]["returns"] for item in part["sources"].values()} == {verdict}
    assert part["own"][verdict] == 8
    assert part["own_ratio_median"] == pytest.approx(
        np.median(
            np.diag(CurvedWorld(scale=20.0).truth_TS(64.0))
            / np.diag(CurvedWorld(scale=20.0).truth_TS(16.0))
        ),
        abs=0.02,
    )


def test_a_summary_of_doses_is_json_and_told_in_a_line_for_each_direction():
    found = summary_of(CurvedWorld())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (line,) = dose_lines(found)
    assert line.startswith("adding doses of 16, 32 and 64 rows: per row, the largest dose")
    assert "returns diminish for" in line
    assert dose_lines({"replications": 2}) == ()


def test_with_one_replication_nothing_is_significant():
    found = summary_of(CurvedWorld(scale=20.0, **QUIET), replications=1)
    part = found["doses"]["directions"]["add"]
    assert {item["own_change"]["returns"] for item in part["sources"].values()} == {None}
    assert "no change is significant" in dose_lines(found)[0]


def test_a_target_that_no_source_owns_has_no_own_effect():
    (measured, *_) = CurvedWorld().measure(2)
    renamed = dataclasses.replace(measured, targets=("x", *measured.targets[1:]))
    own = own_effects(renamed)
    assert np.isnan(own.value[0]) and np.isfinite(own.value[1:]).all()
    levels = [{"add": renamed}, {"add": dataclasses.replace(renamed, dose_S=renamed.dose_S * 2)}]
    part = summarise_doses((16, 32), levels, 0.95)["directions"]["add"]["sources"]["c0"]
    assert part["own_change"] is None and part["points"][0]["own"] is None


def test_the_page_shows_every_dose_of_every_category():
    found = summary_of(CurvedWorld(scale=20.0, **QUIET))
    names = [f"c{index}" for index in reversed(range(8))]
    tables = [block for block in dose_blocks(found, names) if block.kind == "table"]
    assert [table.folded for table in tables] == [False, True]
    assert [row[0] for row in tables[0].rows] == names
    value = found["doses"]["directions"]["add"]["sources"]["c7"]["points"][1]["own"]["value"]
    cell = tables[0].rows[0][2]
    assert not isinstance(cell, str) and cell.text.startswith(f"+{100 * value:.3f}"[:5])
    last = tables[0].rows[0][-1]
    assert not isinstance(last, str) and last.text == DIMINISH
    assert STEADY not in {row[-1].text for row in tables[0].rows if not isinstance(row[-1], str)}


def test_the_page_says_nothing_of_one_dose():
    assert dose_blocks({"unit": "nats"}, ["c0"]) == []
