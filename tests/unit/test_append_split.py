"""What stays of an earlier measurement where a category lost rows."""

from collections.abc import Sequence

import numpy as np
import pytest
from append_corpus import (
    FOURTH,
    Grown,
    source,
)
from influence_corpus import influence_config

from actors.influence.appender import draw_appended
from system import storage
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local
from system.errors import DataError
from system.influence.append.append import first_unused_rows
from system.influence.append.append_summary import append_lines, append_summary
from system.influence.design.design import InterventionRun
from system.influence.design.interventions import active_rows
from system.rundir import RunDir
from system.training.plan import APPENDED, read_plan


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """`size` lost rows to a category of their own, and `colour-reworded` is gone."""
    run = Grown(tmp_path_factory.mktemp("split"))
    run.prepare(source("colour"), source("size", "size-left"), source("size-two", "size-split"))
    return run


def test_a_category_holds_while_all_its_measured_rows_are_in_it(split):
    status = split.earlier().category_status(split.corpus())
    assert status.kept == ("colour",) and status.new == ("size", "size-two")
    assert set(status.stale) == {"size", "colour-reworded"}
    assert "no such category" in status.stale["colour-reworded"]
    assert "rows trained" in status.stale["size"] and "scored" in status.stale["size"]


def test_a_split_leaves_its_base_rows_and_never_repeats_one(split):
    context = split.context(RunDir(split.config.run_dir).attempt_uri("influence", "try"))
    design = draw_appended(context)
    assert design.sources == ("colour", "size", "size-two")
    assert design.append is not None and design.append.sources == ("size", "size-two")
    assert {run.kind for run in design.all_runs} == {"reference", "remove", "append"}
    assert [item.foreign_rows for item in design.replications] == [96, 96]
    for index, replication in enumerate(design.replications):
        plan = read_plan(storage.join(context.attempt, "plans", f"r{index:02d}-append.arrow"))
        ids = plan.table.column("id").to_pylist()
        assert len(set(ids)) == len(ids)
        stage = np.array(plan.table.column("stage").to_pylist())
        dosed = {
            name: {ids[row] for row in np.flatnonzero(stage == APPENDED)
                   if plan.table.column("category")[int(row)].as_py() == name}
            for name in ("size", "size-two")
        }  # fmt: skip
        assert {name: len(rows) for name, rows in dosed.items()} == {
            name: replication.rows[name].dose for name in dosed
        }
        run = InterventionRun(replication=index, kind="append", source=1)
        active = active_rows(plan, run, design)
        assert {ids[row] for row in np.flatnonzero(active & (stage == APPENDED))} == dosed["size"]
    trainings = {run.name: {"trained_tokens": 1} for run in design.all_runs}
    summary = append_summary(design, trainings)
    assert summary is not None
    lines = append_lines({"append": summary})
    assert any("size: " in line and "measured as a new one" in line for line in lines)
    assert any("colour-reworded" in line and "new one" not in line for line in lines)


def test_nothing_that_holds_is_refused_in_one_paragraph(split, tmp_path):
    other = influence_config(split.root).model_copy(update={"sources": (source(FOURTH),)})
    ingest_local(other, str(tmp_path / "corpus"))
    corpus = Corpus.open(str(tmp_path / "corpus" / "manifest.json"))
    with pytest.raises(DataError, match=r"found none \(colour: .*Set influence.append to false"):
        split.earlier().category_status(corpus)


def test_rows_taken_already_are_passed_over_and_the_next_ones_come():
    ids = [f"{k}" for k in range(50)]

    def first(wanted: int) -> Sequence[str]:
        return ids[:wanted]

    assert first_unused_rows(first, 3, {"0", "2"}) == [1, 3, 4]
    assert first_unused_rows(first, 3, set(ids[:40])) == [40, 41, 42]
    assert first_unused_rows(first, 20, set(ids[:40])) == list(range(40, 50))
