"""Several doses in one run, on a real Ray with real trainings and a real vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_influencer import TASKS, Killed, StopsAfter, Trainings, World

from system import storage
from system.influence.dose_views import read_levels
from system.influence.matrix import EffectMatrix
from system.schema import MATRIX, check_table

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BOTH = ("add", "remove")
SEVERAL = {"dose_rows": [16, 32], "directions": BOTH}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("doses"))
    yield world
    world.cluster.shutdown()


@pytest.fixture(scope="module")
def resumed(world: World) -> World:
    """Both doses and directions in one run, whose driver was killed half-way."""
    runs = 2 * (1 + 2 * 2 * len(TASKS))
    with pytest.raises(Killed):
        world.run("both", StopsAfter(runs // 2), **SEVERAL)
    world.cluster.close_pool("tuner")
    kept = {path.name: path.stat().st_mtime_ns for path in world.path("both", "scores").glob("*")}
    assert len(kept) >= runs // 2
    result = world.run("both", **SEVERAL)
    assert result.counts["runs"] == runs
    for path, before in kept.items():
        assert world.path("both", "scores", path).stat().st_mtime_ns == before
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


def test_the_largest_dose_has_the_effects_of_a_run_with_it_alone(resumed):
    """Its rows are the schedule's, added or removed; then the smaller dose costs its runs alone."""
    resumed.run("alone/32", dose_rows=32, directions=BOTH)
    for direction in BOTH:
        (alone,) = levels(resumed, "alone/32", direction)
        check_same(levels(resumed, "both", direction)[1], alone)
    progress = Trainings()
    resumed.run("alone/more", progress, **SEVERAL)
    assert progress.finished == 2 * 2 * len(TASKS)
    for direction in BOTH:
        pairs = zip(
            levels(resumed, "alone/more", direction),
            levels(resumed, "both", direction),
            strict=True,
        )
        for one, other in pairs:
            check_same(one, other)


def test_a_smaller_dose_removed_has_the_effects_of_a_run_with_it_alone(resumed):
    """Removing leaves the schedule as it is, so every dose has the runs that it would have."""
    resumed.run("small", dose_rows=16, directions=("remove",))
    several = resumed.run("removed", dose_rows=[16, 32], directions=("remove",))
    assert several.counts["runs"] == 2 * (1 + 2 * len(TASKS))
    (alone,) = levels(resumed, "small", "remove")
    check_same(levels(resumed, "removed", "remove")[0], alone)


def test_the_stage_leaves_every_dose_in_its_files(resumed):
    table = check_table(pq.read_table(resumed.path("both", "matrix.parquet")), MATRIX, "matrix")
    rows = table.select(["target", "source", "direction", "dose", "unit"]).to_pylist()
    assert len(rows) == len({tuple(row.values()) for row in rows}) == 2 * 2 * 2 * len(TASKS) ** 2
    assert {row["dose"] for row in rows if row["unit"] == "examples"} == {16.0, 32.0}
    replicates = pq.read_table(resumed.path("both", "replicates.parquet"))
    assert replicates.num_rows == 2 * 2 * 2 * len(TASKS) ** 2
    partial = pq.read_table(resumed.path("both", "partial.parquet"))
    assert partial.num_rows == table.num_rows
    doses = storage.read_json(str(resumed.path("both", "summary.json")))["doses"]
    assert doses["asked"] == [16, 32] and set(doses["directions"]) == set(BOTH)
    for name in TASKS:
        points = doses["directions"]["remove"]["sources"][name]["points"]
        assert [point["dose"] for point in points] == [16.0, 32.0]
