"""Several doses in one run, on a real Ray with real trainings and a real vLLM engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
from influence_corpus import TASKS
from influencer_world import Killed, StopsAfter, Trainings, World, record

from actors import solver
from system import storage
from system.config import SolveConfig
from system.influence.estimate.dose_views import read_levels
from system.influence.estimate.matrix import EffectMatrix
from system.schema import MATRIX, check_table
from system.solve import Mix

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REMOVED = {"dose_rows": [16, 32], "directions": ("remove",)}
ADDED = {"dose_rows": [16, 32], "directions": ("add",)}
RUNS = 2 * (1 + 2 * len(TASKS))
"""Two replications: a reference, and two doses of every category."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("doses"))
    yield world
    world.cluster.shutdown()


@pytest.fixture(scope="module")
def resumed(world: World) -> World:
    """Both doses removed in one run, whose driver was killed half-way."""
    with pytest.raises(Killed):
        world.run("removed", StopsAfter(RUNS // 2), **REMOVED)
    world.cluster.close_pool("tuner")
    scores = world.path("removed", "scores")
    kept = {path.name: path.stat().st_mtime_ns for path in scores.glob("*")}
    assert RUNS // 2 <= len(kept) < RUNS
    result = world.run("removed", **REMOVED)
    assert result.counts["runs"] == RUNS
    for path, before in kept.items():
        assert (scores / path).stat().st_mtime_ns == before
    assert any("doses of 16 and 32 rows" in line for line in result.lines)
    return world


def levels(world: World, name: str, direction: str) -> list[EffectMatrix]:
    table = storage.read_table(str(world.path(name, "matrix.parquet")))
    return read_levels(table, direction=direction)


def check_same(one: EffectMatrix, other: EffectMatrix) -> None:
    np.testing.assert_array_equal(one.dose_S, other.dose_S)
    np.testing.assert_array_equal(one.effect_TS, other.effect_TS)
    np.testing.assert_array_equal(one.effect_se_TS, other.effect_se_TS)
    np.testing.assert_array_equal(one.shrunk_TS, other.shrunk_TS)
    np.testing.assert_array_equal(one.gamma_TS, other.gamma_TS)


def test_a_removed_dose_has_the_effects_of_a_run_with_it_alone(resumed):
    """Removing leaves the schedule as it is, so every dose has the runs that it would have."""
    resumed.run("small", dose_rows=16, directions=("remove",))
    (alone,) = levels(resumed, "small", "remove")
    check_same(levels(resumed, "removed", "remove")[0], alone)


def test_the_largest_added_dose_has_the_effects_of_a_run_with_it_alone(world):
    """The schedule has the rows of the largest; a smaller dose asked later costs its own runs."""
    world.run("added", **ADDED)
    world.run("alone/32", dose_rows=32, directions=("add",))
    (alone,) = levels(world, "alone/32", "add")
    check_same(levels(world, "added", "add")[1], alone)
    progress = Trainings()
    world.run("alone/more", progress, **ADDED)
    assert progress.finished == 2 * len(TASKS)
    more, added = (levels(world, name, "add") for name in ("alone/more", "added"))
    for one, other in zip(more, added, strict=True):
        check_same(one, other)


def test_the_stage_leaves_every_dose_in_its_files(resumed):
    table = pq.read_table(resumed.path("removed", "matrix.parquet"))
    rows = check_table(table, MATRIX, "matrix")
    rows = rows.select(["target", "source", "direction", "dose", "unit"]).to_pylist()
    assert len(rows) == len({tuple(row.values()) for row in rows}) == 2 * 2 * len(TASKS) ** 2
    assert {row["dose"] for row in rows if row["unit"] == "examples"} == {16.0, 32.0}
    replicates = pq.read_table(resumed.path("removed", "replicates.parquet"))
    assert replicates.num_rows == 2 * 2 * len(TASKS) ** 2
    partial = pq.read_table(resumed.path("removed", "partial.parquet"))
    assert partial.num_rows == table.num_rows
    doses = storage.read_json(str(resumed.path("removed", "summary.json")))["doses"]
    assert doses["asked"] == [16, 32] and set(doses["directions"]) == {"remove"}
    for name in TASKS:
        points = doses["directions"]["remove"]["sources"][name]["points"]
        assert [point["dose"] for point in points] == [16.0, 32.0]


@pytest.mark.parametrize(
    ("solve", "words"),
    [
        ({}, "nearest to the largest moves that the limits allow: solve.dose"),
        ({"dose": 16}, "removing 16 rows (nearest to 16 rows: solve.dose)"),
        ({"objective": "concave"}, "returns follow the 2 measured doses"),
    ],
    ids=["nearest", "asked", "concave"],
)
def test_the_mix_says_which_doses_decided(resumed, solve, words):
    """The solve stage on what the influence stage left."""
    config = resumed.config(resumed.root, **REMOVED)
    values = {**config.solve.model_dump(), "move": 0.2, **solve}
    config = config.model_copy(update={"solve": SolveConfig.model_validate(values)})
    context = resumed.context(f"mix-{'-'.join(solve) or 'plain'}", config)
    outputs = {
        name: str(resumed.path("removed", file).relative_to(resumed.root))
        for name, file in (("matrix", "matrix.parquet"), ("summary", "summary.json"))
    }
    made = record("influence", "matrix", resumed.path("removed", "matrix.parquet"))
    upstream = {**context.upstream, "influence": dataclasses.replace(made, outputs=outputs)}
    context = dataclasses.replace(context, upstream=upstream)
    lines = solver.run(context).lines
    assert any(words in line for line in lines)
    mix = Mix.from_json(storage.read_bytes(f"{context.attempt}/mix.json").decode())
    assert sum(mix.counts().values()) == 100
