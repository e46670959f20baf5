"""`auto`: the design whose error costs least, in rounds, until the mix would not change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from influence_corpus import TASKS
from influencer_world import Killed, StopsAfter, Trainings, World, matrix

from system import storage
from system.influence.design.design import Design
from system.influence.design.random_design import runs_needed

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("auto"))
    yield world
    world.cluster.shutdown()


def test_auto_measures_in_rounds_until_the_mix_would_not_change(world):
    """A third round where two say too little, none where the user asks for less; killed in it."""
    runs = 2 * runs_needed(len(TASKS))
    strict = {"designs": ("random-design",), "regret": 0.0, "max_replications": 3}
    result = world.run("auto", estimator="auto", auto=strict)
    assert result.counts["runs"] == 3 * runs_needed(len(TASKS))
    assert "auto.max_replications 3 reached" in result.lines[0]
    summary = storage.read_json(str(world.path("auto", "summary.json")))
    assert [item["replications"] for item in summary["rounds"]["rounds"]] == [2, 3]
    design = Design.from_json(storage.read_json(str(world.path("auto", "design.json"))), "d")
    assert len(design.replications) == 3 and len(design.all_runs) == result.counts["runs"]

    with pytest.raises(Killed):
        world.run("auto-killed", StopsAfter(runs + 2), estimator="auto", auto=strict)
    world.cluster.close_pool("tuner")
    world.run("auto-killed", estimator="auto", auto=strict)
    np.testing.assert_array_equal(
        matrix(world, "auto").effect_TS, matrix(world, "auto-killed").effect_TS
    )

    progress = Trainings()
    easy = world.run("auto/easy", progress, estimator="auto", auto={**strict, "regret": 10.0})
    assert progress.finished == 0, "its runs are those of the first two rounds"
    assert easy.counts["runs"] == runs and easy.lines[0].startswith("enough:")


def test_the_design_whose_error_costs_least_goes_on_with_the_runs_of_its_trial(world):
    """Both designs make a first round, once; a driver that dies in it repeats no run."""
    auto = {"designs": ("branch", "random-design"), "regret": 10.0, "max_replications": 3}
    first = {"branch": 2 * (1 + len(TASKS)), "random-design": 2 * runs_needed(len(TASKS))}
    result = world.run("choice", estimator="auto", auto=auto)
    trials = storage.read_json(str(world.path("choice", "trial.json")))
    assert [trial["design"] for trial in trials] == ["branch", "random-design"]
    prices = {t["design"]: t["precision"] ** 2 * t["token_equivalents"] for t in trials}
    chosen = min(prices, key=lambda name: prices[name])
    summary = storage.read_json(str(world.path("choice", "summary.json")))
    assert summary["estimator"] == chosen and summary["trial"] == trials
    assert f"the design is {chosen}" in result.lines[1]
    (only,) = summary["rounds"]["rounds"]
    own = next(trial for trial in trials if trial["design"] == chosen)
    assert only["trained_tokens"] == sum(trial["trained_tokens"] for trial in trials)
    assert only["precision"] == own["precision"], "the first round is the trial's"
    assert result.counts["trained_tokens"] == own["trained_tokens"]

    # The chosen design alone measures the same, with the very same runs.
    progress = Trainings()
    alone = {**auto, "designs": (chosen,)}
    world.run("choice/alone", progress, estimator="auto", auto=alone)
    assert progress.finished == 0
    np.testing.assert_array_equal(
        matrix(world, "choice").effect_TS, matrix(world, "choice/alone").effect_TS
    )

    with pytest.raises(Killed):
        world.run("choice-killed", StopsAfter(first["branch"] + 1), estimator="auto", auto=auto)
    world.cluster.close_pool("tuner")
    progress = Trainings()
    world.run("choice-killed", progress, estimator="auto", auto=auto)
    assert progress.finished <= first["random-design"]
    again = storage.read_json(str(world.path("choice-killed", "trial.json")))
    for one, other in zip(trials, again, strict=True):
        assert {**one, "tuner_hours": 0} == {**other, "tuner_hours": 0}
    np.testing.assert_array_equal(
        matrix(world, "choice").effect_TS, matrix(world, "choice-killed").effect_TS
    )
