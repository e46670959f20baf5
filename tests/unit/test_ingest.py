from __future__ import annotations

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_builders import (
    BROKEN,
    Ingested,
    ingest,
    messy_rows,
    numbered,
    run_config,
    write_lines,
)

from system import storage
from system.config import SourceConfig
from system.data.ingest.ingest import (
    bucket_inputs,
    check_rejected,
    finish_ingest,
    ingest_chunk,
    ingest_local,
    plan_ingest,
    plan_shards,
    read_outcome,
    reduce_bucket,
    source_fingerprint,
    write_shards,
)
from system.data.rows.conversation import SPLITS
from system.errors import DataError

BROKEN_MESSAGES = [
    ({"messages": [{"role": "user", "content": "q"}]}, "no-assistant-turn"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "starts-with-assistant"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_each_kind_of_broken_row_is_rejected_with_its_reason_file_and_line(tmp_path, row, reason):
    path = write_lines(tmp_path / "rows.jsonl", [*numbered(5), b"", row, *numbered(3, 10)])
    done = ingest(tmp_path, max_chars=1000)
    assert done.manifest.rejected == {reason: 1}
    assert done.manifest.kept == 8
    (found,) = done.rejected()
    assert (found["source"], found["file"], found["row"], found["reason"]) == (
        "rows", str(path), 6, reason,
    )  # fmt: skip
    assert found["detail"]


@pytest.mark.parametrize(("row", "reason"), BROKEN_MESSAGES)
def test_broken_conversations_are_rejected_too(tmp_path, row, reason):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write_lines(tmp_path / "rows.jsonl", [good, row])
    assert ingest(tmp_path).manifest.rejected == {reason: 1}


def test_every_row_ends_in_exactly_one_place(tmp_path):
    rows = messy_rows(1)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    done = ingest(tmp_path, max_chars=1000)
    lines = {k for k, row in enumerate(rows) if row != b""}
    rejected = [row["row"] for row in done.rejected()]
    duplicates = [row["row"] for row in done.duplicates()]
    assert done.manifest.read == len(lines)
    assert len(done.rows()) == done.manifest.kept
    assert len(rejected) == sum(done.manifest.rejected.values())
    assert len(duplicates) == done.manifest.duplicates
    assert not set(rejected) & set(duplicates)
    assert set(rejected) | set(duplicates) < lines
    assert done.manifest.kept == len(lines) - len(rejected) - len(duplicates)
    kept_texts = {turns[0][1] for turns in done.turns()}
    for k in lines - set(rejected) - set(duplicates):
        assert rows[k]["prompt"] in kept_texts
    by_line = path.read_bytes().split(b"\n")
    kept_ids = {row["id"] for row in done.rows()}
    for row in done.duplicates():
        assert row["id"] in kept_ids
        assert json.loads(by_line[row["row"]])["prompt"] in kept_texts


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), chunk_bytes=st.integers(400, 4000), rows=st.integers(5, 60))
def test_the_cut_never_shows_in_the_result(tmp_path_factory, seed, chunk_bytes, rows):
    tmp_path = tmp_path_factory.mktemp("cut")
    write_lines(tmp_path / "rows.jsonl", messy_rows(seed, 120))
    (tmp_path / "more").mkdir()
    write_lines(tmp_path / "more" / "x.jsonl", messy_rows(seed + 1, 30))
    write_lines(tmp_path / "more" / "y.jsonl", messy_rows(seed + 2, 30))
    sources = [SourceConfig(path="rows.jsonl", category_column="task"), SourceConfig(path="more")]
    common = {"max_chars": 1000, "shard_rows": rows, "min_heldout_rows": 1}
    whole = ingest(tmp_path, *sources, **common).files()
    cut = ingest(tmp_path, *sources, **common, chunk_bytes=chunk_bytes).files()
    assert whole == cut


def test_buckets_and_order_of_work_never_show_in_the_rows(tmp_path, monkeypatch):
    write_lines(tmp_path / "rows.jsonl", messy_rows(3))
    one = ingest(tmp_path, max_chars=1000)
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 2500)
    config = run_config(tmp_path, max_chars=1000, chunk_bytes=1500)
    plan = plan_ingest(config, str(tmp_path / "other"))
    assert plan.num_buckets > 8 and len(plan.chunks) > 15
    for chunk in random.Random(5).sample(plan.chunks, len(plan.chunks)):
        ingest_chunk(plan, chunk.index)
    outcomes = [read_outcome(plan, chunk.index) for chunk in plan.chunks]
    inputs = bucket_inputs(plan, outcomes)
    buckets = [reduce_bucket(plan, given) for given in random.Random(6).sample(inputs, len(inputs))]
    units = plan_shards(plan, buckets)
    written = [write_shards(plan, unit) for unit in random.Random(7).sample(units, len(units))]
    manifest = finish_ingest(plan, outcomes, buckets, written)
    other = Ingested(config, tmp_path / "third")
    assert (manifest.kept, manifest.duplicates, manifest.rejected) == (
        one.manifest.kept, one.manifest.duplicates, one.manifest.rejected,
    )  # fmt: skip
    assert other.rows() == one.rows()
    for other_attempt in ("other", "third"):
        root = tmp_path / other_attempt
        assert {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted((root / "shards").rglob("*.arrow"))
        } == {name: data for name, data in one.files().items() if name.startswith("shards/")}


def test_more_buckets_than_rows_are_no_error(tmp_path, monkeypatch):
    write_lines(tmp_path / "rows.jsonl", numbered(5))
    rows = ingest(tmp_path).rows()
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 4)
    assert plan_ingest(run_config(tmp_path), "").num_buckets > 50
    assert ingest(tmp_path).rows() == rows


def test_a_chunk_writes_one_batch_for_each_bucket(tmp_path, monkeypatch):
    rows = [{"prompt": f"{k} " + "x" * 10_000, "completion": "y"} for k in range(2000)]
    write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 2 * 2**20)
    plan = plan_ingest(run_config(tmp_path), str(tmp_path / "attempt"))
    (chunk,) = plan.chunks
    outcome = ingest_chunk(plan, chunk.index)
    assert [len(numbers) for numbers in outcome.batches.values()] == [1] * plan.num_buckets
    assert plan.num_buckets > 8


def test_shards_are_full_whatever_the_number_of_buckets(tmp_path, monkeypatch):
    rows = [{**row, "task": "ab"[k % 2]} for k, row in enumerate(numbered(900))]
    write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 2000)
    monkeypatch.setattr("system.data.ingest.shards.UNIT_BYTES", 3000)
    source = SourceConfig(path="rows.jsonl", category_column="task")
    done = ingest(tmp_path, source, shard_rows=100)
    sizes: dict = {}
    for shard in done.manifest.shards:
        sizes.setdefault((shard.split, shard.category), []).append(shard.rows)
    assert len(sizes) == 6
    for found in sizes.values():
        assert found[:-1] == [100] * (len(found) - 1)
    assert len(sizes["train", "a"]) > 2
    ids = [row["id"] for row in done.rows() if (row["split"], row["category"]) == ("train", "a")]
    assert ids == sorted(ids)


def test_shards_of_long_rows_have_fewer(tmp_path, monkeypatch):
    rows = [{"prompt": f"{k}", "completion": "y" * 1000} for k in range(100)]
    write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("system.data.ingest.shards.SHARD_BYTES", 20_000)
    monkeypatch.setattr("system.data.ingest.bucket._KEPT_BYTES", 7000)
    done = ingest(tmp_path, estimate_share=0.0, test_share=0.0)
    assert [shard.rows for shard in done.manifest.shards][:-1] == [19] * 5
    assert done.manifest.kept == 100


def test_of_equal_rows_the_first_source_and_line_wins(tmp_path):
    pair = {"prompt": "same", "completion": "same"}
    write_lines(tmp_path / "a.jsonl", [*numbered(3), {**pair, "task": "first"}])
    write_lines(tmp_path / "b.jsonl", [{**pair, "task": "second"}, {**pair, "task": "third"}])
    sources = [SourceConfig(path=f"{name}.jsonl", category_column="task") for name in "ab"]
    done = ingest(tmp_path, *sources)
    (kept,) = [row for row in done.rows() if row["messages"][0]["content"] == "same"]
    assert (kept["category"], kept["source"]) == ("first", "a")
    assert [(row["source"], row["row"]) for row in done.duplicates()] == [("b", 0), ("b", 1)]
    turned = ingest(tmp_path, *sources[::-1])
    assert {row["category"] for row in turned.rows() if row["id"] == kept["id"]} == {"second"}


def test_without_deduplication_equal_rows_get_ids_of_their_own(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(2) * 3)
    done = ingest(tmp_path, deduplicate="none")
    ids = [row["id"] for row in done.rows()]
    assert done.manifest.kept == 6 and done.manifest.duplicates == 0
    assert len(set(ids)) == 6
    assert set(ids) > {row["id"] for row in ingest(tmp_path).rows()}


def test_adding_data_moves_no_row_to_another_split(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(300))
    before = {row["id"]: row["split"] for row in ingest(tmp_path).rows()}
    write_lines(tmp_path / "rows.jsonl", [*numbered(200, 1000), *numbered(300)])
    after = {row["id"]: row["split"] for row in ingest(tmp_path).rows()}
    assert before.items() <= after.items()
    assert set(before.values()) == set(SPLITS)


def test_the_same_question_never_stands_on_both_sides(tmp_path):
    rows = [{"prompt": f"q{k}", "completion": f"a{j}"} for k in range(100) for j in range(4)]
    write_lines(tmp_path / "rows.jsonl", rows)
    sides: dict[str, set[str]] = {}
    for row in ingest(tmp_path).rows():
        sides.setdefault(row["messages"][0]["content"], set()).add(row["split"])
    assert len(sides) == 100
    assert all(len(split) == 1 for split in sides.values())


def test_categories_come_from_a_column_a_constant_or_the_path_and_are_renamed(tmp_path):
    (tmp_path / "by" / "algebra").mkdir(parents=True)
    write_lines(tmp_path / "by" / "algebra" / "x.jsonl", numbered(20))
    labelled = [
        {**row, "t": t} for row, t in zip(numbered(4, 50), ["a", "b", "", None], strict=True)
    ]
    write_lines(tmp_path / "column.jsonl", labelled)
    write_lines(tmp_path / "fixed.jsonl", numbered(20, 100))
    done = ingest(
        tmp_path,
        SourceConfig(
            path="by",
            category_pattern=r"by/(?P<category>\w+)/",
            category_map={"algebra": "math"},
        ),
        SourceConfig(path="column.jsonl", category_column="t", category_map={"b": "a"}),
        SourceConfig(path="fixed.jsonl", category="code"),
    )
    found: dict = {}
    for row in done.rows():
        found.setdefault(row["category"], []).append(row["source"])
    assert {name: len(rows) for name, rows in found.items()} == {
        "math": 20, "a": 2, None: 2, "code": 20,
    }  # fmt: skip
    assert done.corpus.categories == ("a", "code", "math")
    assert sum(done.manifest.untagged.values()) == 2


def test_a_path_that_does_not_match_the_category_pattern_is_an_error(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(2))
    source = SourceConfig(path="rows.jsonl", category_pattern=r"dir/(?P<category>\w+)/")
    with pytest.raises(DataError, match="category_pattern"):
        ingest(tmp_path, source)


def test_answers_and_scores_are_taken_from_columns_or_the_response(tmp_path):
    write_lines(
        tmp_path / "gsm.jsonl",
        [{"question": "q", "answer": "so 3\n#### 1,200"}, {"question": "r", "answer": "none"}],
    )
    write_lines(
        tmp_path / "scored.jsonl",
        [
            {"prompt": "a", "completion": "Yes.", "gold": "yes", "s": "0.5"},
            {"prompt": "b", "completion": "B", "gold": None, "s": None},
            {"prompt": "c", "completion": "C", "gold": 7, "s": "bad"},
        ],
    )
    done = ingest(
        tmp_path,
        SourceConfig(path="gsm.jsonl", answer_pattern=r"####\s*(\S+)"),
        SourceConfig(path="scored.jsonl", answer_column="gold", score_column="s"),
    )
    found = {
        row["messages"][0]["content"]: (row["answer"], row["answer_pattern"], row["score"])
        for row in done.rows()
    }
    assert found == {
        "q": ("1,200", r"####\s*(\S+)", None),
        "r": (None, None, None),
        "a": ("yes", None, 0.5),
        "b": (None, None, None),
    }
    assert done.manifest.rejected == {"missing-field": 1}


def test_max_rows_reads_the_first_rows_over_all_files(tmp_path):
    (tmp_path / "d").mkdir()
    write_lines(tmp_path / "d" / "a.jsonl", numbered(3))
    write_lines(tmp_path / "d" / "b.jsonl", numbered(5, 10))
    done = ingest(tmp_path, SourceConfig(path="d", max_rows=5), chunk_bytes=10)
    assert done.manifest.read == 5
    numbers = {turns[0][1].split()[2] for turns in done.turns()}
    assert numbers == {"0", "1", "2", "10", "11"}


def test_too_many_rejected_rows_stop_the_run_with_counts_and_examples(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*numbered(8), b"{oops", {"prompt": "x"}])
    with pytest.raises(DataError) as error:
        ingest(tmp_path, max_rejected_share=0.1)
    message = str(error.value)
    assert "2 of 10" in message and "bad-json 1" in message and "missing-field 1" in message
    assert f"{path} row 8" in message
    assert "ingest.max_rejected_share" in message
    assert not (tmp_path / "attempt" / "manifest.json").exists()
    assert ingest(tmp_path, max_rejected_share=0.2).manifest.kept == 8


def test_row_numbers_of_examples_count_from_the_start_of_the_file(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [*numbered(50), b"{oops"])
    plan = plan_ingest(
        run_config(tmp_path, chunk_bytes=300, max_rejected_share=0.0), str(tmp_path / "a")
    )
    outcomes = [ingest_chunk(plan, chunk.index) for chunk in plan.chunks]
    assert len(outcomes) > 5
    with pytest.raises(DataError, match="row 50: bad-json"):
        check_rejected(plan, outcomes)


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_source_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "nothing.json").write_text(text)
    write_lines(tmp_path / "rows.jsonl", numbered(3))
    with pytest.raises(DataError, match=r"source 'nothing'.*no"):
        ingest(tmp_path, SourceConfig(path="rows.jsonl"), SourceConfig(path="nothing.json"))


def test_a_small_category_is_an_error_with_its_counts_and_the_keys(tmp_path):
    write_lines(tmp_path / "big.jsonl", numbered(400))
    write_lines(tmp_path / "small.jsonl", numbered(5, 1000))
    sources = [SourceConfig(path=f"{name}.jsonl", category=name) for name in ("big", "small")]
    with pytest.raises(DataError) as error:
        ingest(tmp_path, *sources, min_train_rows=32, min_heldout_rows=8)
    message = str(error.value)
    assert "'small' (train" in message and "'big'" not in message
    assert "ingest.min_train_rows" in message and "ingest.min_heldout_rows" in message
    assert not (tmp_path / "attempt" / "manifest.json").exists()


def test_missing_files_are_found_before_anything_runs(tmp_path):
    config = run_config(tmp_path, SourceConfig(path="nope.jsonl"))
    for call in (source_fingerprint, lambda given: plan_ingest(given, str(tmp_path / "x"))):
        with pytest.raises(DataError, match="nope"):
            call(config)


def test_the_fingerprint_changes_with_the_files(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", numbered(3))
    write_lines(tmp_path / "bench.jsonl", numbered(3))
    config = run_config(tmp_path, benchmarks=("bench.jsonl",))
    before = source_fingerprint(config)
    assert list(before) == [str(path), str(tmp_path / "bench.jsonl")]
    os.utime(path, ns=(1, 1))
    assert source_fingerprint(config)[str(path)] != before[str(path)]


def test_a_corpus_can_lie_on_remote_storage(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(200))
    local = ingest(tmp_path)
    ingest_local(run_config(tmp_path), "memory://bucket/attempt")
    for name, data in local.files().items():
        assert storage.read_bytes(f"memory://bucket/attempt/{name}") == data
