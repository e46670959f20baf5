from __future__ import annotations

import hashlib
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_builders import ingest, numbered, write_lines

from system.config import SelectConfig, SourceConfig
from system.data.corpus import Corpus, make_manifest, write_manifest, write_shard
from system.errors import DataError
from system.schema import SELECTION, check_table
from system.selection import candidates
from system.selection import parts as selection
from system.selection.choose import Chosen, choose_rows
from system.selection.select import StageQuota, arrange, read_quotas, select_arm, totals

RANDOM = SelectConfig()
QUALITY = SelectConfig(method="quality")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    tmp_path = tmp_path_factory.mktemp("select")
    rows = [{**row, "score": k % 17} for k, row in enumerate(numbered(500))]
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "b.jsonl", numbered(120, 5000))
    sources = [
        SourceConfig(path="a.jsonl", category="a", score_column="score"),
        SourceConfig(path="b.jsonl", category="b"),
    ]
    return ingest(tmp_path, *sources, shard_rows=60).corpus


def resharded(corpus: Corpus, folder: str, rows: int) -> Corpus:
    """The same rows in shards of another size."""
    shards = []
    for category in corpus.categories:
        table = pa.concat_tables(corpus.iter_tables("train", category))
        for start in range(0, table.num_rows, rows):
            path = f"{category}-{start}.arrow"
            shards.append(write_shard(folder, path, table.slice(start, rows), "train", category))
    write_manifest(f"{folder}/manifest.json", make_manifest(shards))
    return Corpus.open(f"{folder}/manifest.json")


def in_seeded_order(corpus: Corpus, category: str, seed: int) -> list[str]:
    ids = [i for t in corpus.iter_tables("train", category, ["id"]) for i in t["id"].to_pylist()]
    return sorted(ids, key=lambda row_id: hashlib.sha256(f"{seed}:{row_id}".encode()).digest())


def curriculum(*stages: dict[str, int]) -> dict:
    return {
        "stages": [
            {"name": f"stage-{k}", "size": sum(counts.values()), "counts": counts}
            for k, counts in enumerate(stages)
        ]
    }


def reference(corpus: Corpus, content: dict, seed: int) -> list[tuple[str, str, str]]:
    """The definition, row by row."""
    taken: dict[str, int] = {}
    found = []
    for stage in content["stages"]:
        rows = []
        for category, count in stage["counts"].items():
            order = in_seeded_order(corpus, category, seed)
            for turn in range(taken.get(category, 0), taken.get(category, 0) + count):
                row_id, repeat = order[turn % len(order)], turn // len(order)
                key = hashlib.sha256(f"{seed}:{stage['name']}:{row_id}:{repeat}".encode()).digest()
                rows.append((key, row_id, category))
            taken[category] = taken.get(category, 0) + count
        found += [(stage["name"], row_id, category) for _, row_id, category in sorted(rows)]
    return found


def summary(table: pa.Table) -> list[tuple[str, str, str]]:
    return [(row["stage"], row["id"], row["category"]) for row in table.to_pylist()]


@pytest.mark.parametrize("seed", [0, 5])
def test_selection_is_what_its_definition_says(corpus, seed):
    content = curriculum({"a": 100, "b": 3}, {"a": 150, "b": 60}, {"b": 90})
    table = select_arm(corpus, totals(read_quotas(content)), seed, curriculum=content)
    assert summary(table) == reference(corpus, content, seed)
    assert table["position"].to_pylist() == list(range(403))
    check_table(table, SELECTION, "selection")


def test_bodies_are_those_of_the_ids(corpus):
    table = select_arm(corpus, {"a": 40, "b": 20}, 1)
    bodies = {
        row["id"]: row["messages"]
        for category in corpus.categories
        for part in corpus.iter_tables("train", category)
        for row in part.to_pylist()
    }
    assert all(bodies[row["id"]] == row["messages"] for row in table.to_pylist())
    assert set(table["stage"].to_pylist()) == {"shuffled"}


def test_no_row_comes_twice_before_every_row_came_once(corpus):
    supply = corpus.num_rows("train", "b")
    content = curriculum({"b": supply - 5}, {"b": 10}, {"b": 2 * supply})
    quotas = read_quotas(content)
    chosen = {"b": choose_rows(corpus, "b", 10 * supply, RANDOM, 0)}
    assert chosen["b"].supply == supply == len(chosen["b"].row)
    arranged = arrange(corpus, quotas, chosen, 0)
    assert arranged.repeats == {"b": 2 * supply + 5}
    rows = list(zip(arranged.shard.tolist(), arranged.row.tolist(), strict=True))
    assert len(set(rows)) == supply
    assert len(set(rows[: supply - 5])) == supply - 5
    table = select_arm(corpus, totals(quotas), 0, curriculum=content)
    assert summary(table) == reference(corpus, content, 0)


def test_with_one_seed_a_smaller_quota_takes_a_part_of_the_larger_ones_rows(corpus):
    small = set(select_arm(corpus, {"a": 50}, 3)["id"].to_pylist())
    large = set(select_arm(corpus, {"a": 90, "b": 10}, 3)["id"].to_pylist())
    assert small < large
    assert small != set(select_arm(corpus, {"a": 50}, 4)["id"].to_pylist())


def test_pruning_never_changes_the_choice(corpus, monkeypatch):
    monkeypatch.setattr(candidates, "_PRUNE_SLACK", 0)
    chosen = choose_rows(corpus, "a", 30, RANDOM, 9)
    ids = [bytes(row).hex() for row in chosen.ids]
    assert ids == in_seeded_order(corpus, "a", 9)[:30]


def test_quality_takes_the_highest_scores_and_orders_ties_by_seed(corpus):
    scores = {
        row["id"]: row["score"]
        for table in corpus.iter_tables("train", "a")
        for row in table.to_pylist()
    }
    expected = sorted(
        scores,
        key=lambda row_id: (
            -scores[row_id],
            hashlib.sha256(f"2:{row_id}".encode()).digest(),
        ),
    )
    chosen = choose_rows(corpus, "a", 80, QUALITY, 2)
    assert [bytes(row).hex() for row in chosen.ids] == expected[:80]
    unscored = choose_rows(corpus, "b", 10, QUALITY, 2)
    assert [bytes(row).hex() for row in unscored.ids] == in_seeded_order(corpus, "b", 2)[:10]


def write_all(corpus: Corpus, content: dict, seed: int, attempt: str, shuffle: int = 0) -> dict:
    quotas = read_quotas(content)
    chosen = {
        category: choose_rows(corpus, category, count, RANDOM, seed)
        for category, count in totals(quotas).items()
    }
    arranged = arrange(corpus, quotas, chosen, seed)
    groups = selection.plan_gather(arranged)
    draw = random.Random(shuffle)
    outcomes = [
        selection.gather_group(corpus, group, attempt) for group in draw.sample(groups, len(groups))
    ]
    inputs = selection.part_inputs(len(arranged.row), outcomes)
    for given in draw.sample(inputs, len(inputs)):
        selection.write_part(given, attempt)
    parts = [selection.read_part(attempt, given.index) for given in inputs]
    return selection.write_selection_manifest(attempt, arranged, parts, chosen, RANDOM)


def test_bytes_do_not_depend_on_shards_groups_or_order_of_work(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "PART_ROWS", 50)
    content = curriculum({"a": 100, "b": 3}, {"a": 150, "b": 60}, {"b": 90})
    first = write_all(corpus, content, 0, str(tmp_path / "one"))
    monkeypatch.setattr(selection, "GROUP_ROWS", 40)
    other = resharded(corpus, str(tmp_path / "other"), 33)
    second = write_all(other, content, 0, str(tmp_path / "two"), shuffle=4)
    assert first == second
    assert len(first["files"]) == 9
    names = [item["path"] for item in first["files"]]
    for item in first["files"]:
        data = (tmp_path / "one" / "parts" / item["path"]).read_bytes()
        assert data == (tmp_path / "two" / "parts" / item["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == item["sha256"]
    tables = [pq.read_table(tmp_path / "one" / "parts" / name) for name in names]
    assert max(table.num_rows for table in tables) == 50
    assert summary(pa.concat_tables(tables)) == reference(corpus, content, 0)
    assert first["counts"] == {
        "stage-0": {"a": 100, "b": 3},
        "stage-1": {"a": 150, "b": 60},
        "stage-2": {"b": 90},
    }
    assert not (tmp_path / "one" / "work").exists()


@pytest.mark.parametrize("spill_bytes", [2**28, 1])
def test_a_group_writes_one_batch_for_each_part(corpus, tmp_path, monkeypatch, spill_bytes):
    monkeypatch.setattr(selection, "PART_ROWS", 100)
    monkeypatch.setattr(selection, "SPILL_BYTES", spill_bytes)
    other = resharded(corpus, str(tmp_path / "other"), 20)
    quotas = read_quotas(curriculum({"a": 300, "b": 60}))
    chosen = {
        category: choose_rows(other, category, count, RANDOM, 0)
        for category, count in totals(quotas).items()
    }
    (group,) = selection.plan_gather(arrange(other, quotas, chosen, 0))
    assert len(group.shards) > 15
    outcome = selection.gather_group(other, group, str(tmp_path / "attempt"))
    batches = [len(numbers) for numbers in outcome.batches.values()]
    assert len(batches) == 4
    assert batches == [1] * 4 if spill_bytes > 1 else min(batches) > 10
    (first, *_) = selection.part_inputs(360, [outcome])
    assert selection.write_part(first, str(tmp_path / "attempt")).rows == 100


def test_the_order_mixes_categories_within_a_stage(corpus):
    table = select_arm(corpus, {"a": 90, "b": 90}, 0)
    places = np.flatnonzero(np.array(table["category"].to_pylist()) == "a")
    assert abs(places.mean() - 89.5) < 15


def test_a_category_without_rows_is_an_error(corpus, tmp_path):
    quotas = (StageQuota(name="s", counts={"a": 1}),)
    empty = choose_rows(corpus, "a", 0, RANDOM, 0)
    chosen = {"a": Chosen(category="a", supply=0, ids=empty.ids, shard=empty.shard, row=empty.row)}
    with pytest.raises(DataError, match="'a', which has no usable train rows"):
        arrange(corpus, quotas, chosen, 0)
    with pytest.raises(DataError, match="no category 'zzz'"):
        select_arm(corpus, {"zzz": 1}, 0)
    with pytest.raises(DataError, match="found none in any stage"):
        select_arm(corpus, {}, 0)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"stages": [{"name": "x", "counts": {"a": 1.5}}]}, "whole number"),
        ({"stages": [{"name": "x", "counts": {"a": -1}}]}, "whole number"),
        ({"stages": [{"name": "x", "counts": {}}, {"name": "x", "counts": {}}]}, "different names"),
    ],
)
def test_a_broken_curriculum_is_an_error(content, match):
    with pytest.raises(DataError, match=match):
        read_quotas(content)


def test_stages_that_do_not_add_up_to_the_counts_are_an_error(corpus):
    with pytest.raises(DataError, match="add up"):
        select_arm(corpus, {"a": 11}, 0, curriculum=curriculum({"a": 10}))
