"""The influence stage on a real local Ray with real trainings and a real vLLM engine."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from influence_corpus import TASKS
from influencer_world import Killed, StopsAfter, Trainings, World, finished, matrix, world  # noqa: F401  (fixtures)

from actors.influence.intervention_runner import InterventionRunner
from actors.stage import StageResult
from system import storage
from system.influence.design.design import Design
from system.influence.design.random_design import runs_needed
from system.influence.estimate.matrix import EffectMatrix
from system.influence.measure.score_parts import ScorePart
from system.models.base import load_model
from system.schema import MATRIX, check_table
from system.scoring.score import Scored, score_reference

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_stage_leaves_a_matrix_for_every_pair(world, finished):
    table = pq.read_table(world.path("whole", finished.outputs["matrix"]))
    checked = check_table(table, MATRIX, "matrix").to_pylist()
    assert {(row["target"], row["source"]) for row in checked} == {
        (target, source) for target in TASKS for source in TASKS
    }
    assert {row["unit"] for row in checked} == {"examples", "tokens"}
    assert all(row["effect_se"] > 0 for row in checked)
    summary = storage.read_json(str(world.path("whole", "summary.json")))
    assert summary["errors"] == "replication" and summary["cost"]["runs"] == 2 * 4
    assert summary["cost"]["trained_tokens"] > 10_000
    assert 3 <= len(finished.lines) <= 6


def test_checkpoints_are_deleted_once_scored(world, finished):
    assert not world.path("whole", "checkpoints").exists()
    assert len(list(world.path("whole", "scores").iterdir())) == 2 * 4


def test_an_actor_that_dies_in_the_middle_changes_nothing(world, finished):
    """Both kinds of actor are killed with a unit in their hands."""
    killed: list[str] = []
    stop = threading.Event()

    def kill_busy_actors() -> None:
        while not stop.is_set() and len(killed) < 2:
            time.sleep(0.005)  # a scoring is over soon
            for name, pool in list(world.cluster._pools.items()):
                if name in killed or not list(world.path("killed", "units").glob("*.json")):
                    continue
                for _, actor in list(pool._in_flight.values()):
                    ray.kill(actor)
                    killed.append(name)

    thread = threading.Thread(target=kill_busy_actors)
    thread.start()
    try:
        world.run("killed")
    finally:
        stop.set()
        thread.join()
    assert sorted(killed) == ["scorer", "tuner"]
    np.testing.assert_array_equal(
        matrix(world, "killed").effect_TS, matrix(world, "whole").effect_TS
    )


def test_a_checkpoint_that_is_scored_in_parts_has_the_same_scores(world, finished, monkeypatch):
    """Parts are kept one by one: a driver that dies between them scores none of them again."""
    monkeypatch.setattr("system.influence.measure.score_parts.PART_ROWS", 20)
    keep, kept = InterventionRunner._keep_part, []

    def dies_after_the_second(self: InterventionRunner, part: ScorePart, scored: Scored) -> bool:
        done = keep(self, part, scored)
        kept.append(part)
        if len(kept) == 2:
            raise Killed
        return done

    monkeypatch.setattr(InterventionRunner, "_keep_part", dies_after_the_second)
    with pytest.raises(Killed):
        world.run("parts")
    for pool in ("scorer", "tuner"):
        world.cluster.close_pool(pool)
    first = kept.copy()
    assert len({part.run for part in first}) == 1, "a checkpoint's parts come one after the other"
    assert len(list(world.path("parts", "parts").rglob("*.parquet"))) == 2
    world.run("parts")
    rows = storage.read_table(str(world.path("parts", "heldout.arrow"))).num_rows
    runs = {part.run for part in kept}
    assert len(runs) == 2 * 4
    for run in runs:
        spans = sorted((p.rows.start, p.rows.stop) for p in kept if p.run == run)
        assert len(spans) > 1 and len(set(spans)) == len(spans), "no part is scored twice"
        assert (spans[0][0], spans[-1][1]) == (0, rows)
    assert not list(world.path("parts", "parts").rglob("*.parquet"))
    for path in world.path("whole", "scores").iterdir():
        one, other = (storage.read_table(str(world.path(n, "scores", path.name))) for n in
                      ("whole", "parts"))  # fmt: skip
        assert one.select(["id", "num_tokens"]).equals(other.select(["id", "num_tokens"]))
        np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-4)


def test_a_driver_that_dies_continues_with_the_same_numbers(world, finished):
    """What it finished is kept; a checkpoint that it left half-written is trained again."""
    name, finished_runs = "stopped", 3
    with pytest.raises(Killed):
        world.run(name, StopsAfter(finished_runs))
    world.cluster.close_pool("tuner")
    kept = {path.name: path.stat().st_mtime_ns for path in world.path(name, "scores").glob("*")}
    assert len(kept) >= finished_runs
    last = "r01-remove-002"
    assert not world.path(name, "units", f"{last}.json").exists()
    broken = world.path(name, "checkpoints", last)
    shutil.rmtree(broken, ignore_errors=True)
    broken.mkdir(parents=True)
    (broken / "model.safetensors").write_bytes(b"half of it")
    world.run(name)
    for path, before in kept.items():
        assert world.path(name, "scores", path).stat().st_mtime_ns == before
    np.testing.assert_array_equal(matrix(world, name).effect_TS, matrix(world, "whole").effect_TS)


def test_another_attempt_measures_only_what_is_new(world, finished):
    """Another analysis: nothing.  One more replication: its runs.  Another rate: everything."""
    attempts = {
        "whole/confidence": ({"confidence": 0.9}, 0),
        "whole/replications": ({"replications": 3}, 4),
    }
    for name, (changed, expected) in attempts.items():
        progress = Trainings()
        world.run(name, progress, **changed)
        assert progress.finished == expected, name
    progress = StopsAfter(-1)
    with pytest.raises(Killed):
        world.run("whole/rate", progress, learning_rate=1e-3)
    assert progress.found == 0
    np.testing.assert_array_equal(
        matrix(world, "whole/confidence").effect_TS, matrix(world, "whole").effect_TS
    )
    fresh = world.run("three", replications=3)
    np.testing.assert_array_equal(
        matrix(world, "whole/replications").effect_TS, matrix(world, "three").effect_TS
    )
    cost = storage.read_json(str(world.path("whole/replications", "summary.json")))["cost"]
    assert cost["trained_tokens"] == fresh.counts["trained_tokens"]
    partial = pq.read_table(world.path("three", "partial.parquet"))
    partial = EffectMatrix.from_table(partial, direction="remove")
    np.testing.assert_array_equal(partial.effect_TS, matrix(world, "whole").effect_TS)


def test_branch_measures_both_directions_from_a_shared_warm_up(world):
    result = world.run(
        "branch", estimator="branch", directions=("add", "remove"), keep_checkpoints=True
    )
    assert result.counts["runs"] == 2 * (1 + 1 + 2 * 3)
    assert result.counts["trained_tokens"] > 0
    for direction in ("add", "remove"):
        assert np.isfinite(matrix(world, "branch", direction).effect_TS).all()
    kept = {path.name for path in world.path("branch", "checkpoints").iterdir()}
    design = Design.from_json(storage.read_json(str(world.path("branch", "design.json"))), "d")
    assert kept == {run.name for run in design.all_runs}


def test_scores_are_those_of_the_kept_checkpoint(world):
    """The engine scored the weights that this very run trained, not some other run's."""
    world.run("branch", estimator="branch", directions=("add", "remove"), keep_checkpoints=True)
    heldout = storage.read_table(str(world.path("branch", "heldout.arrow")))
    for name in ("r00-reference", "r01-add-002"):
        model = load_model(world.path("branch", "checkpoints", name))
        expected = score_reference(model, heldout).table
        found = storage.read_table(str(world.path("branch", "scores", f"{name}.parquet")))
        assert found["id"].to_pylist() == expected["id"].to_pylist()
        np.testing.assert_allclose(
            found["nll"].to_numpy() / found["num_tokens"].to_numpy(),
            expected["nll"].to_numpy() / expected["num_tokens"].to_numpy(),
            atol=1e-3,
        )


def test_random_design_gives_every_effect_from_every_run(world):
    """As many runs as the weighing design asks for."""
    result = world.run("design", estimator="random-design", directions=("add", "remove"))
    assert result.counts["runs"] == 2 * 2 * runs_needed(len(TASKS))
    for direction in ("add", "remove"):
        found = matrix(world, "design", direction)
        assert np.isfinite(found.effect_TS).all() and (found.effect_se_TS > 0).all()


@pytest.fixture(scope="module")
def by_gradient(world: World) -> StageResult:
    """Two replications, two checkpoints each, both directions; no scorer."""
    world.cluster.close_pool("scorer")
    return world.run("gradient", **GRADIENT)


GRADIENT = {
    "estimator": "gradient",
    "directions": ("add", "remove"),
    "gradient_checkpoints": 2,
    "projection_dim": 4096,
}


def test_gradient_leaves_the_files_of_a_measured_matrix_without_a_scorer(world, by_gradient):
    assert "scorer" not in world.cluster._pools
    table = pq.read_table(world.path("gradient", by_gradient.outputs["matrix"]))
    rows = check_table(table, MATRIX, "matrix").to_pylist()
    assert len(rows) == 2 * 2 * len(TASKS) ** 2
    assert {row["estimator"] for row in rows} == {"gradient"}
    replicates = pq.read_table(world.path("gradient", by_gradient.outputs["replicates"]))
    assert replicates.num_rows == 2 * 2 * len(TASKS) ** 2
    cost = storage.read_json(str(world.path("gradient", "summary.json")))["cost"]
    assert cost["runs"] == 2 and cost["scored_tokens"] == 0
    assert 0 < cost["trained_tokens"] < cost["gradient_tokens"]
    assert cost["token_equivalents"] == cost["trained_tokens"] + cost["gradient_tokens"]
    assert "differentiated" in by_gradient.lines[-1]
    assert not world.path("gradient", "checkpoints").exists()


def test_gradient_is_the_same_with_two_tuners_when_the_driver_and_a_tuner_die(world, by_gradient):
    name, killed, stop = "gradient-killed", [], threading.Event()
    with pytest.raises(Killed):
        world.run(name, StopsAfter(3), **GRADIENT)
    world.cluster.close_pool("tuner")
    kept = {path.name: path.stat().st_mtime_ns for path in world.path(name, "scores").glob("*")}
    assert kept

    def kill_a_busy_tuner() -> None:
        while not stop.is_set() and not killed:
            time.sleep(0.02)
            pool = world.cluster._pools.get("tuner")
            for _, actor in list(pool._in_flight.values())[:1] if pool else []:
                ray.kill(actor)
                killed.append(actor)

    thread = threading.Thread(target=kill_a_busy_tuner)
    thread.start()
    try:
        world.run(name, num_tuners=2, **GRADIENT)
    finally:
        stop.set()
        thread.join()
    assert killed
    for path, before in kept.items():
        assert world.path(name, "scores", path).stat().st_mtime_ns == before
    for direction in ("add", "remove"):
        whole, other = (matrix(world, run, direction) for run in ("gradient", name))
        assert np.isfinite(whole.effect_TS).all() and (whole.effect_se_TS > 0).all()
        assert np.array_equal(whole.effect_TS, other.effect_TS)
        assert np.array_equal(whole.effect_se_TS, other.effect_se_TS)
