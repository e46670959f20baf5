import json
from pathlib import Path

import pyarrow as pa
import pytest
from influence_corpus import TASKS, build_inputs
from ingest_builders import Ingested, run_config, write_lines

from system.config import InfluenceConfig, IngestConfig, SourceConfig
from system.data.corpus import Corpus
from system.errors import DataError
from system.evaluation.unseen_rows import untrained_rows
from system.influence.design.external_targets import read_target, read_targets
from system.influence.design.heldout import draw_targets, seeded_draw
from system.influence.design.interventions import seed_of
from system.models.base import load_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heldout")
    build_inputs(path)
    return path


@pytest.fixture(scope="module")
def corpus(root) -> Corpus:
    return Corpus.open(str(root / "corpus" / "manifest.json"))


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "model")


def targets(corpus, tokenizer, num_rows=12, external=None, max_length=64):
    return draw_targets(
        run_seed=3,
        sources=TASKS,
        num_rows=num_rows,
        draw=seeded_draw(corpus, tokenizer, max_length),
        external=external or {},
        tokenizer=tokenizer,
        max_length=max_length,
    )


def test_every_category_is_measured_on_its_own_estimate_rows(corpus, tokenizer):
    rows, found, dropped = targets(corpus, tokenizer)
    assert [target.name for target in found] == list(TASKS)
    assert all(target.num_rows == 12 for target in found) and dropped == {}
    estimate = {
        name
        for category in TASKS
        for table in corpus.iter_tables("estimate", category, ["id"])
        for name in table["id"].to_pylist()
    }
    assert set(rows["id"].to_pylist()) <= estimate


def test_a_larger_draw_begins_with_the_smaller_one(corpus, tokenizer):
    draw = seeded_draw(corpus, tokenizer, 64)
    few, _ = draw("train", "size", 10, 5)
    many, _ = draw("train", "size", 40, 5)
    assert many["id"].to_pylist()[:10] == few["id"].to_pylist()


def test_rows_without_a_response_are_counted_and_replaced(tokenizer, tmp_path):
    """Every other prompt fills the whole length: enough of the others must be found."""
    rows = [
        {"prompt": f"{k} " + "colour " * (2 + 60 * (k % 2)), "completion": "size"}
        for k in range(200)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(path="rows.jsonl", category="c")
    corpus = Ingested(run_config(tmp_path, source), tmp_path / "corpus").corpus
    draw = seeded_draw(corpus, tokenizer, 40)
    found, dropped = draw("train", "c", 30, 5)
    assert found.num_rows == 30
    assert dropped["no-response-token"] > 10
    few, _ = draw("train", "c", 5, 5)
    assert few["id"].to_pylist() == found["id"].to_pylist()[:5]


def test_too_few_held_out_rows_are_named(corpus, tokenizer):
    draw = seeded_draw(corpus, tokenizer, 64)

    def starved(split, category, wanted, seed):
        rows, dropped = draw(split, category, wanted, seed)
        return rows.slice(0, 2 if category == "size" else wanted), dropped

    with pytest.raises(DataError, match=r"'size' has 2 usable held-out rows.*expected 12"):
        draw_targets(
            run_seed=0,
            sources=TASKS,
            num_rows=12,
            draw=starved,
            external={},
            tokenizer=tokenizer,
            max_length=64,
        )


def read(root, name="bench", exclude=(), **ingest):
    config = InfluenceConfig(targets={name: f"{name}.jsonl"})
    return read_target(
        config.target_sources[name],
        data_dir=str(root), ingest=IngestConfig(**ingest), exclude=exclude,
    )  # fmt: skip


def test_an_external_target_is_a_target_without_a_source(corpus, tokenizer, tmp_path):
    lines = [{"question": f"How many is {k}?", "answer": f"It is {k}."} for k in range(30)]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table, left_out = read(tmp_path)
    rows, found, _ = targets(corpus, tokenizer, external={"bench": table})
    assert left_out == {} and found[-1].name == "bench" and found[-1].is_external
    assert rows["category"].to_pylist()[-12:] == ["bench"] * 12


def test_marks_of_an_external_target_are_kept(tmp_path):
    quiet = {"role": "assistant", "content": "a", "weight": 0}
    asked = [{"role": "user", "content": "q"}, quiet, {"role": "user", "content": "r"}]
    answer = {"role": "assistant", "content": "b", "thinking": "hm"}
    (tmp_path / "bench.jsonl").write_text(json.dumps({"messages": [*asked, answer]}))
    kept, _ = read(tmp_path)
    dropped, _ = read(tmp_path, reasoning="drop")
    (turns,), (bare,) = kept["messages"].to_pylist(), dropped["messages"].to_pylist()
    assert [turn["loss"] for turn in turns] == [None, False, None, None]
    assert [turn["reasoning"] for turn in turns] == [None, None, None, "hm"]
    assert {turn["reasoning"] for turn in bare} == {None}


def test_rows_that_are_trained_on_are_taken_out_of_a_target(corpus, root, tmp_path):
    source = (root / "data" / "size.jsonl").read_text().splitlines()[:40]
    (tmp_path / "bench.jsonl").write_text("\n".join(source))
    trained = {
        name
        for table in corpus.iter_tables("train", "size", ["id"])
        for name in table["id"].to_pylist()
    }
    table, left_out = read(tmp_path, exclude=trained)
    assert left_out["trained-on"] > 10
    assert not trained & set(table["id"].to_pylist())
    assert table.num_rows + left_out["trained-on"] == 40


def test_the_two_sides_of_a_target_share_no_question(tmp_path):
    """As many as asked for; the matrix sees one side, evaluation the other; adding moves no row."""
    lines = [
        {"question": f"What is {k // 2}?", "answer": f"It is {'odd' if k % 2 else 'even'}."}
        for k in range(400)
    ]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def ids(side, test_share=0.5):
        target = {"path": str(tmp_path / "bench.jsonl"), "test_share": test_share}
        config = run_config(tmp_path, SourceConfig(path="x", category="c"))
        influence = InfluenceConfig.model_validate({"targets": {"bench": target}})
        config = config.model_copy(update={"influence": influence})
        tables, left_out = read_targets(config, side)
        assert left_out == {}
        asked = {messages[0]["content"] for messages in tables["bench"]["messages"].to_pylist()}
        return set(tables["bench"]["id"].to_pylist()), asked

    (measured, asked), (judged, other) = ids("estimate"), ids("test")
    assert len(measured | judged) == 400 and not measured & judged and not asked & other
    assert 140 < len(judged) < 260
    fewer, _ = ids("test", 0.1)
    assert fewer < judged and 10 < len(fewer) < 80
    assert len(ids("estimate", 0.0)[0]) == 400 and not ids("test", 0.0)[0]


def test_rows_that_a_model_was_trained_on_do_not_judge_it(tmp_path):
    lines = [{"question": f"How many is {k}?", "answer": f"It is {k}."} for k in range(60)]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = run_config(tmp_path, SourceConfig(path="x", category="c"))
    targets = InfluenceConfig(targets={"bench": str(tmp_path / "bench.jsonl")})
    config = config.model_copy(update={"influence": targets})
    tables, _ = untrained_rows(config, [])
    ids = tables["bench"]["id"].to_pylist()
    plans = [pa.chunked_array([ids[:2]]), pa.chunked_array([["f" * 32], [ids[1], ids[4]]])]
    left, left_out = untrained_rows(config, plans)
    assert left["bench"]["id"].to_pylist() == [ids[2], ids[3], *ids[5:]]
    assert left_out == {"bench: trained-on": 3}


def test_a_broken_target_file_is_refused(tmp_path):
    rows = [json.dumps({"question": "q", "answer": "a"})] * 3 + ["{broken"] * 3
    (tmp_path / "bench.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"'bench'.*3 of 6 rows"):
        read(tmp_path)


def test_seeds_do_not_collide_and_do_not_change():
    seeds = {seed_of(run, "influence", index) for run in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert seed_of(0, "influence", 0) == seed_of(0, "influence", 0)
    assert all(0 <= seed < 2**31 for seed in seeds)
