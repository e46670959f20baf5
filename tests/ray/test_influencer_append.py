"""`influence.append` on a real Ray: a fourth category for a finished measurement of three."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from influence_corpus import TASKS, influence_config
from influencer_world import Killed, StopsAfter, Trainings, World, matrix, record
from ingest_builders import write_lines

from actors.influence.influencer import run
from actors.stage import StageResult
from system import storage
from system.config import SourceConfig
from system.data.ingest.ingest import ingest_local
from system.examples.planted import planted_world
from system.influence.design.design import Design
from system.influence.estimate.matrix import EffectMatrix
from system.influence.measure.proxy import ProxyModel
from system.models.base import load_model
from system.progress import Progress
from system.scoring.score import score_reference
from system.training.plan import read_plan
from system.training.settings import TrainSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FOURTH = "colour-contradicted"
OLD = sorted(TASKS)
ALL = sorted([*TASKS, FOURTH])
GRIDS = ("effect", "effect_se", "effect_df", "shrunk", "gamma", "gamma_low", "identifiable")


class Growing(World):
    """A world whose corpus has further states: `corpus-four` and `corpus-five`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        tasks = {task.name: task for task in planted_world(0).tasks}
        for name in (FOURTH, "place"):
            rows = planted_world(0).rows(tasks[name], 160)
            write_lines(root / "data" / f"{name}.jsonl", rows)
        self.ingest("four", *TASKS, FOURTH)
        self.ingest("five", *TASKS, FOURTH, "place")

    def ingest(self, name: str, *categories: str) -> None:
        sources = tuple(SourceConfig(path=f"{c}.jsonl", category=c) for c in categories)
        config = influence_config(self.root).model_copy(update={"sources": sources})
        ingest_local(config, str(self.root / f"corpus-{name}"))

    def append(
        self,
        name: str,
        corpus: str,
        *,
        to: str = "0",
        progress: Progress | None = None,
        **influence: object,
    ) -> StageResult:
        context = self.context(name, self.config(self.root, append=True, **influence), progress)
        tag = record("tag", "manifest", Path(f"corpus-{corpus}/manifest.json"))
        upstream = {**context.upstream, "tag": tag}
        return run(replace(context, upstream=upstream, appends_to=to))

    def design(self, name: str) -> Design:
        return Design.from_json(storage.read_json(str(self.path(name, "design.json"))), name)

    def summary(self, name: str) -> dict:
        return storage.read_json(str(self.path(name, "summary.json")))

    def losses(self, name: str, unit: str) -> dict[str, np.ndarray]:
        """Target -> mean loss of its held-out rows, by id."""
        table = storage.read_table(str(self.path(name, "scores", f"{unit}.parquet")))
        rows = sorted(table.to_pylist(), key=lambda row: row["id"])
        return {
            target: np.array([r["nll"] / r["num_tokens"] for r in rows if r["category"] == target])
            for target in {row["category"] for row in rows}
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Growing]:
    world = Growing(tmp_path_factory.mktemp("append"))
    yield world
    world.cluster.shutdown()


@pytest.fixture(scope="module")
def kept(world: Growing) -> StageResult:
    """Three categories measured with their checkpoints kept, then the fourth appended."""
    world.run("kept", keep_checkpoints=True)
    return world.append("kept/four", "four", keep_checkpoints=True)


@pytest.fixture(scope="module")
def forgotten(world: Growing, kept: StageResult) -> StageResult:
    """The same, killed once, with the checkpoints of the first measurement gone."""
    shutil.copytree(world.path("kept"), world.path("gone"))
    shutil.rmtree(world.path("gone", "checkpoints"))
    with pytest.raises(Killed):
        world.append("gone/four", "four", progress=StopsAfter(4))
    world.cluster.close_pool("tuner")
    files = list(world.path("gone/four", "scores").glob("*"))
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert 4 <= len(before) < 10
    progress = Trainings()
    result = world.append("gone/four", "four", progress=progress)
    assert progress.finished == 10 - len(before)
    for name, stamp in before.items():
        assert world.path("gone/four", "scores", name).stat().st_mtime_ns == stamp
    return result


def check_same(first: EffectMatrix, second: EffectMatrix, names: list[str]) -> None:
    parts = [item.part(names, names) for item in (first, second)]
    for grid in GRIDS:
        one, other = (getattr(part, f"{grid}_TS") for part in parts)
        np.testing.assert_array_equal(one, other, err_msg=grid)


def test_earlier_entries_stay_bit_for_bit_and_new_ones_are_flagged(world, kept):
    whole = matrix(world, "kept/four")
    assert whole.sources == whole.targets == tuple(ALL)
    check_same(matrix(world, "kept"), whole, OLD)
    new = np.array([name == FOURTH for name in ALL])
    np.testing.assert_array_equal(whole.appended_TS, new[:, None] | new[None, :])
    assert not matrix(world, "kept").appended_TS.any()
    assert np.isfinite(whole.effect_TS).all() and (whole.effect_se_TS > 0).all()
    assert any(FOURTH in line and "appended to influence/0" in line for line in kept.lines)


def test_an_append_trains_the_new_runs_alone_where_checkpoints_are_kept(world, kept):
    fresh = 2 * (1 + len(ALL))
    append = world.summary("kept/four")["append"]
    assert (append["trainings"], append["repeated"]) == (2, 0)
    assert append["trainings"] < fresh / 4
    made = {path.name for path in world.path("kept/four", "checkpoints").iterdir()}
    place = ALL.index(FOURTH)
    assert made == {f"r{k:02d}-append-{place:03d}" for k in range(2)}
    cost = world.summary("kept/four")["cost"]
    assert cost["runs"] == fresh, "the matrix rests on as many runs as a new one would"


def test_new_entries_are_the_paired_differences_of_the_scores(world, kept):
    """Column: reference less the run with the dose.  Row: earlier runs on the new rows."""
    whole, place, dose = matrix(world, "kept/four"), ALL.index(FOURTH), 32
    columns, rows = [], []
    for k in range(2):
        reference = world.losses("kept/four", f"r{k:02d}-reference")
        added = world.losses("kept/four", f"r{k:02d}-append-{place:03d}")
        columns.append([(reference[name] - added[name]).mean() for name in ALL])
        rows.append(
            [
                (
                    world.losses("kept/four", f"r{k:02d}-remove-{ALL.index(name):03d}")[FOURTH]
                    - reference[FOURTH]
                ).mean()
                for name in OLD
            ]
        )
    np.testing.assert_allclose(whole.effect_TS[:, place], np.mean(columns, axis=0) / dose)
    old = [ALL.index(name) for name in OLD]
    np.testing.assert_allclose(whole.effect_TS[place, old], np.mean(rows, axis=0) / dose)
    own = whole.effect_TS[place, place] * dose
    assert own > 0.05, "a category without a row in the base learns from its own"


def test_the_dose_is_trained_on_the_old_schedule_and_nothing_else(world, kept):
    """The run again, in this process, from masks made here; and the row's scores from weights."""
    design, place = world.design("kept/four"), ALL.index(FOURTH)
    uri = str(world.path("kept/four", "plans", "r00-append.arrow"))
    plan, before = read_plan(uri), read_plan(str(world.path("kept", "plans", "r00-main.arrow")))
    np.testing.assert_array_equal(plan.denominators, before.denominators)
    stage = np.array(plan.table.column("stage").to_pylist())
    assert plan.ids(np.flatnonzero(stage != "appended")) == before.ids(np.arange(3 * 48))
    dose = np.flatnonzero(stage == "appended")
    assert len(dose) == 32 and not set(plan.ids(dose)) & set(before.ids(np.arange(3 * 48)))
    config = influence_config(world.root)
    settings = TrainSettings.from_influence(
        config.influence, config.model, design.replications[0].seed
    )
    heldout = storage.read_table(str(world.path("kept/four", "heldout.arrow")))
    proxy = ProxyModel(str(world.root / "model"), device="cpu", trust_remote_code=False)
    for unit, active in (
        (f"r00-append-{place:03d}", np.ones(stage.size, dtype=bool)),
        ("r00-reference", stage != "appended"),
    ):
        proxy.tune(plan, active, settings)
        expected = score_reference(proxy._model, heldout).table
        check_scores(world, "kept/four", unit, expected)
    weights = load_model(world.path("kept", "checkpoints", "r00-remove-001"))
    name = OLD[1]
    expected = score_reference(weights, heldout).table
    check_scores(world, "kept/four", f"r00-remove-{ALL.index(name):03d}", expected)


def check_scores(world: Growing, name: str, unit: str, expected: pa.Table) -> None:
    found = storage.read_table(str(world.path(name, "scores", f"{unit}.parquet")))
    by_id = {row["id"]: row["nll"] / row["num_tokens"] for row in found.to_pylist()}
    assert len(by_id) == expected.num_rows
    for row in expected.to_pylist():
        assert by_id[row["id"]] == pytest.approx(row["nll"] / row["num_tokens"], abs=2e-3)


def test_runs_without_a_checkpoint_are_repeated_bit_for_bit(world, kept, forgotten):
    """Also where the driver was killed half-way: what was scored stays, the rest follows."""
    append = world.summary("gone/four")["append"]
    assert (append["trainings"], append["repeated"]) == (2 * 5, 2 * 4)
    assert append["repeated_otherwise"] == 0
    check_same(matrix(world, "kept/four"), matrix(world, "gone/four"), ALL)
    assert not world.path("gone/four", "checkpoints").exists()
    assert any("repeat earlier runs for the new held-out rows" in line for line in forgotten.lines)


def test_another_append_goes_on_from_the_first(world, kept):
    """The fifth category: the fourth stays flagged, and its numbers stay what they were."""
    world.append("kept/five", "five", to="four", keep_checkpoints=True)
    append = world.summary("kept/five")["append"]
    assert append["new"] == ["place"] and append["categories"] == sorted([FOURTH, "place"])
    assert (append["trainings"], append["repeated"]) == (2, 0), "checkpoints of both are found"
    check_same(matrix(world, "kept/four"), matrix(world, "kept/five"), ALL)
    five = matrix(world, "kept/five")
    flagged = np.array([name in (FOURTH, "place") for name in five.sources])
    np.testing.assert_array_equal(five.appended_TS, flagged[:, None] | flagged[None, :])


def test_a_new_run_of_a_branch_starts_from_the_repeated_warm_up(world):
    settings: dict = {"estimator": "branch", "replications": 1}
    world.run("branch", **settings)
    world.append("branch/four", "four", **settings)
    append = world.summary("branch/four")["append"]
    assert (append["trainings"], append["repeated"]) == (1 + 5, 1 + 4)
    assert append["repeated_otherwise"] == 0
    whole = matrix(world, "branch/four")
    check_same(matrix(world, "branch"), whole, OLD)
    assert np.isfinite(whole.effect_TS).all()
    plans = [world.path("branch/four", "plans", f"r00-{kind}.arrow") for kind in ("warm", "append")]
    warm, plan = map(read_plan, map(str, plans))
    config = influence_config(world.root, **settings)
    seed = world.design("branch/four").replications[0].seed
    tuning = TrainSettings.from_influence(config.influence, config.model, seed)
    proxy = ProxyModel(str(world.root / "model"), device="cpu", trust_remote_code=False)
    start = str(world.path("branch", "warm-again"))
    proxy.tune(warm, np.ones(warm.table.num_rows, dtype=bool), tuning)
    proxy.save(start)
    proxy.tune(plan, np.ones(plan.table.num_rows, dtype=bool), tuning, start)
    heldout = storage.read_table(str(world.path("branch/four", "heldout.arrow")))
    unit = f"r00-append-{ALL.index(FOURTH):03d}"
    check_scores(world, "branch/four", unit, score_reference(proxy._model, heldout).table)


def test_another_analysis_of_an_append_trains_nothing(world, forgotten):
    progress = Trainings()
    world.append("gone/again", "four", to="four", progress=progress, confidence=0.9)
    assert progress.finished == 0
    wide, narrow = matrix(world, "gone/four"), matrix(world, "gone/again")
    np.testing.assert_array_equal(wide.effect_TS, narrow.effect_TS)
    np.testing.assert_array_equal(wide.appended_TS, narrow.appended_TS)
    assert (narrow.effect_high_TS < wide.effect_high_TS).all()
