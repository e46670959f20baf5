"""What it would take to identify gamma, held against measuring as often as that."""

import numpy as np
import pytest
from influence_world import World
from report_builder import RunBuilder

from system import storage
from system.influence.estimate.identify import (
    MAX_REPLICATIONS,
    identify_json,
    replications_to_identify,
)
from system.influence.estimate.matrix import Estimate, estimate_effects
from system.influence.estimate.measurements import Measurements
from system.report.influence_section import influence_section
from system.report.view import RunView

LIMITS = {"confidence": 0.95, "gamma_floor": 1e-6, "gamma_max_width": 2.0}


def found(measured: Measurements) -> tuple[Estimate, np.ndarray]:
    estimate = estimate_effects(measured)
    return estimate, replications_to_identify(measured, estimate, **LIMITS)


def test_what_is_identifiable_needs_no_more():
    measured = World(own=0.1).measure(2)
    estimate, needed_TS = found(measured)
    known_TS = estimate.matrix.identifiable_TS
    assert known_TS.any() and not known_TS.all()
    assert (needed_TS[known_TS] == 2).all()
    assert ((needed_TS[~known_TS] > 2) | (needed_TS[~known_TS] == 0)).all()


def test_measuring_as_often_as_it_says_identifies_about_what_it_says():
    """Over worlds: of the pairs said to take N, many more are known at N than at the start."""
    now, then, said = 0, 0, 0
    for seed in range(12):
        world = World(own=0.12, seed=seed)
        _, needed_TS = found(world.measure(2, draw=1))
        open_TS = needed_TS > 2
        reach = int(needed_TS.max())
        if reach <= 2:
            continue
        said += int(open_TS.sum())
        for count, place in ((2, 0), (reach, 1)):
            matrix = estimate_effects(world.measure(count, draw=2)).matrix
            known = int((matrix.identifiable_TS & open_TS).sum())
            now, then = (now + known, then) if place == 0 else (now, then + known)
    assert said > 40
    assert then > 0.75 * said  # another draw of the noise: not all of them
    assert now < 0.75 * then


def test_no_number_of_replications_helps_where_its_own_data_does_nothing():
    world = World(own=0.0, relative_noise=0.0)
    measured = world.measure(4)
    estimate, needed_TS = found(measured)
    part = identify_json(estimate.matrix, needed_TS, 4)
    assert part is not None
    unclear = [estimate.matrix.targets.index(name) for name in part["unclear"]]
    assert len(unclear) > 4
    negative = [row for row in unclear if estimate.matrix.effect_TS[row, row] <= 0]
    assert negative and (needed_TS[negative] == 0).all()
    assert part["never"] >= len(negative) * 7 and part["most"] == MAX_REPLICATIONS


def test_one_replication_says_nothing():
    estimate, needed_TS = found(World().measure(1))
    assert not needed_TS.any()
    assert identify_json(estimate.matrix, needed_TS, 1) is None


def test_a_target_without_a_category_is_not_asked_for():
    measured = World(external_targets=2).measure(3)
    estimate, needed_TS = found(measured)
    assert (needed_TS[-2:] == 0).all()
    part = identify_json(estimate.matrix, needed_TS, 3)
    assert part is not None
    assert not set(part["unclear"]) & set(estimate.matrix.targets[-2:])
    known_TS = estimate.matrix.identifiable_TS | estimate.matrix.own_TS
    assert part["open"] == int((~known_TS[:-2]).sum()) >= part["never"]


@pytest.mark.parametrize("replications", [1, 2])
def test_the_report_is_silent_where_nothing_is_open_or_known(tmp_path, replications):
    """Every gamma of a category is known, and the further target has none; or nothing is."""
    run = RunBuilder(replications=replications, until="influence").write(str(tmp_path / "run"))
    assert "Gamma is not identifiable for" not in str(influence_section(RunView.open(run.uri)))


def test_the_report_says_what_it_would_take(tmp_path):
    run = RunBuilder(replications=2, until="influence").write(str(tmp_path / "run"))
    view = RunView.open(run.uri)
    uri = run.output_uri(view.records["influence"], "summary")
    summary = storage.read_json(uri)
    part = summary["directions"]["remove"]["identify"]
    assert part["open"] == 0 and part["half"] is None
    part |= {"open": 5, "half": 6, "all": 8, "never": 2, "unclear": ["paraphrase"]}
    storage.write_json(uri, summary)
    section = str(influence_section(RunView.open(run.uri)))
    assert "Gamma is not identifiable for 5 pairs (removing)" in section
    assert (
        "6 replications in total for half of the 3 pairs that more replications can resolve, 8 for"
        in section
    )
    assert "for 2 pairs even 64 replications are not" in section
    assert "does not clearly help paraphrase" in section
