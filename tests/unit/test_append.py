"""`influence.append` without trainings: what is drawn, kept, named stale, counted, put together."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from append_corpus import (
    FIFTH,
    FOURTH,
    INFLUENCE,
    Grown,
    design_at,
    made_up_scores,
    matrices,
    source,
)
from influence_corpus import TASKS, build_inputs, influence_config
from ingest_builders import write_lines

from actors.influence.appender import AppendRunner
from actors.pipeline import stage_inputs
from system import storage
from system.data.corpus import Corpus
from system.data.lengths import SeededLengths
from system.influence.append.append import earlier_run, extend_plan
from system.influence.append.append_cost import append_cost
from system.influence.append.earlier import APPENDS_TO, EarlierResult
from system.influence.design.design import Design, InterventionRun
from system.influence.design.heldout import seeded_draw
from system.influence.design.interventions import active_rows, plan_replication
from system.influence.estimate.matrix import EffectMatrix
from system.influence.measure.proxy import ProxyModel
from system.models.base import load_tokenizer
from system.rundir import RunDir
from system.training.plan import APPENDED, read_plan, write_plan
from system.training.settings import TrainSettings


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """A fourth category has come."""
    run = Grown(tmp_path_factory.mktemp("grown"), directions=("add", "remove"))
    run.prepare(*map(source, (*TASKS, FOURTH)))
    return run


@pytest.fixture(scope="module")
def appended(grown: Grown) -> str:
    """URI of the attempt that appends it."""
    name = grown.measure()
    return RunDir(grown.config.run_dir).attempt_uri("influence", name)


def test_a_new_category_has_one_run_a_replication_and_the_old_ones_keep_theirs(grown, appended):
    design, before = design_at(appended), grown.earlier().design
    assert design.sources == tuple(sorted((*TASKS, FOURTH)))
    assert len(design.all_runs) == len(before.all_runs) + len(before.replications)
    assert design.all_runs == design.runs
    place = design.sources.index(FOURTH)
    new = [unit for unit in design.all_runs if earlier_run(design, before, unit) is None]
    assert new == [InterventionRun(replication=k, kind="append", source=place) for k in range(2)]
    known = {earlier_run(design, before, unit) for unit in design.all_runs} - {None}
    assert known == set(before.all_runs)
    assert Design.from_json(design.to_json(), "json") == design


def test_the_base_is_the_old_one_to_the_bit(grown, appended):
    for index in range(2):
        before, after = (
            read_plan(storage.join(uri, "plans", f"r{index:02d}-main.arrow"))
            for uri in (grown.earlier().uri, appended)
        )
        assert before.sha256 == after.sha256
    before = grown.earlier().heldout().to_pylist()
    after = storage.read_table(storage.join(appended, "heldout.arrow")).to_pylist()
    assert after[: len(before)] == before
    assert {row["category"] for row in after[len(before) :]} == {FOURTH}


def test_an_extended_schedule_keeps_its_steps_rows_and_denominators(grown, appended):
    design = design_at(appended)
    main = read_plan(storage.join(appended, "plans", "r00-main.arrow"))
    plan = read_plan(storage.join(appended, "plans", "r00-append.arrow"))
    assert design.replications[0].append_sha256 == plan.sha256
    np.testing.assert_array_equal(plan.denominators, main.denominators)
    stage = np.array(plan.table.column("stage").to_pylist())
    old = np.flatnonzero(stage != APPENDED)
    for column in ("step", "stage", "id", "category", "input_ids"):
        kept = plan.table.column(column).take(pa.array(old)).to_pylist()
        assert kept == main.table.column(column).to_pylist()
    steps = plan.table.column("step").to_numpy()[stage == APPENDED]
    assert np.bincount(steps, minlength=plan.num_steps).max() <= -(-32 // plan.num_steps) + 1
    unit = InterventionRun(replication=0, kind="append", source=design.sources.index(FOURTH))
    active = active_rows(plan, unit, design)
    reference = active_rows(
        plan, InterventionRun(replication=0, kind="reference", source=-1), design
    )
    gained = plan.table.filter(pa.array(active & ~reference))
    assert set(gained.column("category").to_pylist()) == {FOURTH} and gained.num_rows == 32
    np.testing.assert_array_equal(
        reference[old],
        active_rows(main, InterventionRun(replication=0, kind="reference", source=-1), design),
    )


def test_a_category_joins_at_the_same_places_whoever_else_joins(grown, appended):
    main = read_plan(storage.join(appended, "plans", "r00-main.arrow"))
    tokenizer = load_tokenizer(grown.output("model", "model"))
    draw = seeded_draw(grown.corpus(), tokenizer, 64)
    one, other = (draw("train", name, 20, 1)[0] for name in (FOURTH, "size"))
    alone = extend_plan(main, {"a": one}, 5)
    together = extend_plan(main, {"b": other, "a": one}, 5)
    steps = [
        {row["id"]: row["step"] for row in plan.table.select(["id", "step", "stage"]).to_pylist()
         if row["stage"] == APPENDED}
        for plan in (alone, together, extend_plan(alone, {"b": other}, 5))
    ]  # fmt: skip
    assert steps[0].items() <= steps[1].items() and steps[1] == steps[2]
    assert extend_plan(main, {"a": one}, 6).sha256 != alone.sha256


def test_rows_that_joined_do_not_change_a_bit_of_the_runs_without_them(tmp_path):
    """The reference on the extended schedule is the reference on the old one."""
    config = build_inputs(tmp_path)
    small = influence_config(tmp_path, rows_per_category=16, dose_rows=8).influence
    config = config.model_copy(update={"influence": small})
    corpus = Corpus.open(str(tmp_path / "corpus" / "manifest.json"))
    draw = seeded_draw(corpus, load_tokenizer(tmp_path / "model"), 64)
    made = plan_replication(
        0, run_seed=3, sources=TASKS[:2], config=config.influence, max_length=64, draw=draw
    )
    dose, _ = draw("train", TASKS[2], 8, 3)
    extended = extend_plan(made.plan, {TASKS[2]: dose}, 3)
    write_plan(str(tmp_path / "plan.arrow"), extended)
    extended = read_plan(str(tmp_path / "plan.arrow"))
    stage = np.array(extended.table.column("stage").to_pylist())
    settings = TrainSettings.from_influence(config.influence, config.model, 11)
    proxy = ProxyModel(str(tmp_path / "model"), device="cpu", trust_remote_code=False)
    runs = {
        "old": (made.plan, np.ones(made.plan.table.num_rows, dtype=bool)),
        "masked": (extended, stage != APPENDED),
        "dosed": (extended, np.ones(stage.size, dtype=bool)),
    }
    digests = {}
    for name, (plan, active) in runs.items():
        proxy.tune(plan, active, settings)
        proxy.save(str(tmp_path / name))
        digests[name] = hashlib.sha256(
            (tmp_path / name / "model.safetensors").read_bytes()
        ).hexdigest()
    assert digests["old"] == digests["masked"] != digests["dosed"]


def test_old_entries_keep_their_numbers_and_new_ones_are_paired_differences(grown, appended):
    before, after = matrices(grown, grown.earlier().uri), matrices(grown, appended)
    design, names = design_at(appended), sorted(TASKS)
    place = design.sources.index(FOURTH)
    heldout = storage.read_table(storage.join(appended, "heldout.arrow"))
    expected = np.zeros(len(design.targets))
    for k in range(2):
        losses = [
            made_up_scores(heldout, f"{k} {run}") for run in ("reference ", f"append {FOURTH}")
        ]
        loss = [item["nll"].to_numpy() / item["num_tokens"].to_numpy() for item in losses]
        category = np.array(heldout.column("category").to_pylist())
        expected += [
            (loss[0] - loss[1])[category == target.name].mean() / 2 for target in design.targets
        ]
    for direction, matrix in after.items():
        part, old = matrix.part(names, names), before[direction].part(names, names)
        for grid in ("effect", "effect_se", "effect_df", "shrunk", "shrunk_se", "gamma"):
            np.testing.assert_array_equal(
                getattr(part, f"{grid}_TS"), getattr(old, f"{grid}_TS"), err_msg=grid
            )
        np.testing.assert_allclose(matrix.effect_TS[:, place], expected / 32)
        flagged = np.array([name == FOURTH for name in design.sources])
        np.testing.assert_array_equal(matrix.appended_TS, flagged[:, None] | flagged[None, :])
        table = matrix.to_table()
        back = EffectMatrix.from_table(table, direction=direction)
        np.testing.assert_array_equal(back.appended_TS, matrix.appended_TS)
        older = EffectMatrix.from_table(table.drop_columns("appended"), direction=direction)
        assert not older.appended_TS.any(), "tables of before the flag have none appended"
    np.testing.assert_array_equal(
        after["add"].effect_TS[:, place], after["remove"].effect_TS[:, place]
    )


def test_appends_follow_each_other(tmp_path):
    """The fifth category joins: the numbers of the fourth stay, and stay flagged."""
    run = Grown(tmp_path)
    attempts = RunDir(run.config.run_dir).stage_uri("influence")
    run.prepare(*map(source, (*TASKS, FOURTH)))
    second = storage.join(attempts, run.measure())
    run.prepare(*map(source, (*TASKS, FOURTH, FIFTH)))
    third = storage.join(attempts, run.measure())
    design, names = design_at(third), sorted((*TASKS, FOURTH))
    assert design.append is not None
    assert design.append.sources == (FOURTH, FIFTH) and design.append.new == (FIFTH,)
    assert storage.join(attempts, design.append.earlier) == second
    before, after = matrices(run, second)["remove"], matrices(run, third)["remove"]
    for grid in ("effect", "effect_se", "shrunk", "gamma", "appended"):
        old, new = (getattr(item.part(names, names), f"{grid}_TS") for item in (before, after))
        np.testing.assert_array_equal(old, new, err_msg=grid)
    flagged = np.array([name in (FOURTH, FIFTH) for name in design.sources])
    np.testing.assert_array_equal(after.appended_TS, flagged[:, None] | flagged[None, :])
    steps = []
    for uri in (second, third):
        plan = read_plan(storage.join(uri, "plans", "r01-append.arrow"))
        rows = plan.table.select(["id", "step", "category"]).to_pylist()
        steps.append({row["id"]: row["step"] for row in rows if row["category"] != FIFTH})
    assert steps[0] == steps[1]
    # Weights kept by the first attempt are found through the second.
    place = design_at(second).sources.index("size")
    unit = InterventionRun(replication=0, kind="remove", source=place)
    folder = Path(run.earlier().uri, "checkpoints", f"r00-remove-{sorted(TASKS).index('size'):03d}")
    assert EarlierResult(attempts, Path(second).name).checkpoint(unit) is None
    folder.mkdir(parents=True)
    assert EarlierResult(attempts, Path(second).name).checkpoint(unit) == str(folder)


def appended_ids(uri: str, category: str) -> list[set[str]]:
    """Of each replication, the rows of a category that a run with it trains on beside the base."""
    design = design_at(uri)
    found = []
    for index in range(2):
        path = storage.join(uri, "plans", f"r{index:02d}-append.arrow")
        plan = read_plan(path)
        reference = active_rows(
            plan, InterventionRun(replication=index, kind="reference", source=-1), design
        )
        active = reference
        if category in design.sources:
            place = design.sources.index(category)
            active = active_rows(
                plan, InterventionRun(replication=index, kind="append", source=place), design
            )
        rows = plan.table.filter(pa.array(active & ~reference))
        ids = rows.column("id").to_pylist()
        assert set(rows.column("category").to_pylist()) <= {category}
        assert len(ids) == len(set(ids))
        found.append(set(ids))
    return found


def test_a_retagged_appended_category_is_measured_on_its_own_dose_alone(tmp_path):
    run = Grown(tmp_path)
    attempts = RunDir(run.config.run_dir).stage_uri("influence")
    run.prepare(*map(source, (*TASKS, FOURTH)))
    run.measure()
    lines = (tmp_path / "data" / f"{FOURTH}.jsonl").read_bytes().splitlines()
    write_lines(tmp_path / "data" / "place-left.jsonl", lines[40:])
    run.prepare(*map(source, TASKS), source(FOURTH, "place-left"))
    earlier = EarlierResult(attempts, run.records["influence"].fingerprint)
    cost = append_cost(run.config, earlier, run.corpus(), SeededLengths(run.corpus()), lambda: None)
    uri = storage.join(attempts, run.measure())
    design = design_at(uri)
    assert design.append is not None and FOURTH in design.append.stale
    assert [rows.rows[FOURTH].dose for rows in design.replications] == [32, 32]
    assert [len(ids) for ids in appended_ids(uri, FOURTH)] == [32, 32]
    files = [storage.join(uri, "units", f"{unit.name}.json") for unit in design.all_runs]
    assert cost.trained_tokens == sum(storage.read_json(file)["trained_tokens"] for file in files)
    # What was measured is in the corpus, so the next append finds that it holds.
    status = EarlierResult(attempts, Path(uri).name).category_status(run.corpus())
    assert status.stale == {} and status.new == ()


def test_an_appended_category_may_leave_and_return(tmp_path):
    run = Grown(tmp_path)
    attempts = RunDir(run.config.run_dir).stage_uri("influence")
    run.prepare(*map(source, (*TASKS, FOURTH)))
    run.measure()
    run.prepare(*map(source, (*TASKS, FIFTH)))
    without = storage.join(attempts, run.measure())
    kept = appended_ids(without, FIFTH)
    plan = read_plan(storage.join(without, "plans", "r00-append.arrow"))
    assert FOURTH not in plan.table.column("category").to_pylist()
    run.prepare(*map(source, (*TASKS, FIFTH, FOURTH)))
    back = storage.join(attempts, run.measure())
    assert [len(ids) for ids in appended_ids(back, FOURTH)] == [32, 32]
    assert appended_ids(back, FIFTH) == kept
    plan = read_plan(storage.join(back, "plans", "r00-append.arrow"))
    steps = plan.table.column("step").to_numpy()
    np.testing.assert_array_equal(
        plan.sequences, np.arange(len(steps)) - np.searchsorted(steps, steps)
    )


def test_scores_of_earlier_runs_are_completed_not_replaced(grown, appended):
    design = design_at(appended)
    work = AppendRunner(replace(grown.context(appended), appends_to=grown.first), design)
    unit = design.all_runs[1]
    assert set(work._scored_on(unit).column("category").to_pylist()) == {FOURTH}
    new = made_up_scores(work._scored_on(unit), "again")
    whole = work._complete(unit, new)
    before = earlier_run(design, work.earlier.design, unit)
    assert before is not None
    first = work.earlier.scores(before)
    assert whole.slice(0, first.num_rows).equals(first)
    assert whole.slice(first.num_rows).equals(new)
    assert whole.schema.metadata[b"instructmix.seconds"] == b"2.000"
    fresh = next(unit for unit in design.all_runs if unit.kind == "append")
    assert work._scored_on(fresh).num_rows == work.heldout.num_rows
    stats = {"trained_tokens": 1, "first_loss": 2.0, "last_loss": 1.0}
    assert work._training_stats(unit, stats)["repeated"] == {"is_same": False}
    assert work._training_stats(fresh, stats) == stats


def test_the_cost_of_an_append_is_that_of_its_runs(grown, appended):
    """Without kept checkpoints all runs are made again; with them, the new ones alone."""
    corpus = grown.corpus()
    lengths = SeededLengths(corpus)
    arguments = (grown.config, grown.earlier(), corpus, lengths, lambda: None)
    cost, design = append_cost(*arguments), design_at(appended)
    tokens = {
        unit.name: storage.read_json(storage.join(appended, "units", f"{unit.name}.json"))[
            "trained_tokens"
        ]
        for unit in design.all_runs
    }
    assert cost.runs == cost.scorings == len(design.all_runs)
    assert cost.trained_tokens == sum(tokens.values())
    heldout = storage.read_table(storage.join(appended, "heldout.arrow")).to_pylist()
    sizes = {True: 0, False: 0}
    for row in heldout:
        sizes[row["category"] == FOURTH] += len(row["input_ids"])
    old = len(design.all_runs) - 2
    assert cost.scored_tokens == old * sizes[True] + 2 * sum(sizes.values())
    for unit in grown.earlier().design.all_runs:
        Path(grown.earlier().uri, "checkpoints", unit.name).mkdir(parents=True)
    kept = append_cost(*arguments)
    storage.delete(storage.join(grown.earlier().uri, "checkpoints"))
    new = [tokens[unit.name] for unit in design.all_runs if unit.kind == "append"]
    assert (kept.runs, kept.trained_tokens) == (2, sum(new))
    assert (kept.scorings, kept.scored_tokens) == (cost.scorings, cost.scored_tokens)


def test_append_changes_no_fingerprint_where_nothing_is_appended(grown):
    run_dir = RunDir(grown.config.run_dir)
    inputs = stage_inputs(INFLUENCE, grown.config, grown.records)
    off = grown.config.influence.model_copy(update={"append": False})
    config = grown.config.model_copy(update={"influence": off})
    plain = stage_inputs(INFLUENCE, config, grown.records)
    assert inputs == {**plain, APPENDS_TO: grown.first}
    assert run_dir.read_attempt_record("influence", grown.first) is not None
