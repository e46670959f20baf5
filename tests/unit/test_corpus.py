from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from ingest_builders import ingest, numbered, write_lines

from system import storage
from system.config import SourceConfig
from system.data.corpus import (
    FORMAT,
    Corpus,
    make_manifest,
    moved_shards,
    read_manifest,
    relative_path,
    resolve_path,
    shard_directory,
    write_manifest,
    write_shard,
)
from system.data.rows.canonical import canonical_table
from system.data.rows.conversation import normalise
from system.errors import DataError
from system.schema import CORPUS, MESSAGES


def corpus_rows(ids: list[str], category: str | None = "c") -> pa.Table:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return pa.table(
        {
            "id": ids,
            "category": [category] * len(ids),
            "source": ["s"] * len(ids),
            "messages": [turns] * len(ids),
            "answer": [None] * len(ids),
            "answer_pattern": [None] * len(ids),
            "score": [None if k % 2 else k / 2 for k in range(len(ids))],
            "embedding": [None] * len(ids),
        },
        schema=CORPUS,
    )


def hex_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("corpus")
    write_lines(tmp_path / "a.jsonl", numbered(700))
    write_lines(tmp_path / "b.jsonl", numbered(300, 5000))
    sources = [SourceConfig(path=f"{name}.jsonl", category=f"{name} cat") for name in "ab"]
    return ingest(tmp_path, *sources, shard_rows=100)


def test_counts_shards_and_rows_agree(done):
    corpus = done.corpus
    assert corpus.categories == ("a cat", "b cat")
    for split in ("train", "estimate", "test"):
        for category in corpus.categories:
            tables = list(corpus.iter_tables(split, category))
            rows = sum(table.num_rows for table in tables)
            assert rows == corpus.num_rows(split, category) == corpus.counts(split)[category]
            assert rows == sum(shard.rows for shard in corpus.shards(split, category))
            assert all(table.schema.equals(CORPUS) for table in tables)
    assert len(corpus.shards("train", "a cat")) > 3


def test_rows_come_in_the_order_of_their_ids_and_ids_are_the_contents_hash(done):
    ids, contents = [], []
    for table in done.corpus.iter_tables("train", "a cat"):
        ids += table["id"].to_pylist()
        contents += table["messages"].to_pylist()
    assert ids == sorted(ids)
    assert ids == [
        normalise([(m["role"], m["content"]) for m in turns], 10**6).id for turns in contents
    ]


def test_shard_digests_are_those_of_the_files(done):
    for shard in done.manifest.shards:
        data = Path(done.corpus.shard_uri(shard)).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256


def test_columns_can_be_chosen(done):
    table = next(done.corpus.iter_tables("train", "a cat", ["category", "source"]))
    assert table.column_names == ["category", "source"]


def test_a_sample_is_the_smallest_seeded_hashes_and_grows_by_appending(done):
    everything = pa.concat_tables(done.corpus.iter_tables("train", "a cat"))
    expected = sorted(
        everything["id"].to_pylist(),
        key=lambda row_id: hashlib.sha256(f"7:{row_id}".encode()).digest(),
    )
    sample = done.corpus.sample("train", "a cat", 50, 7)
    assert sample["id"].to_pylist() == expected[:50]
    assert done.corpus.sample("train", "a cat", 20, 7)["id"].to_pylist() == expected[:20]
    assert done.corpus.sample("train", "a cat", 10_000, 7)["id"].to_pylist() == expected
    assert done.corpus.sample("train", "a cat", 20, 8)["id"].to_pylist() != expected[:20]
    row = sample.slice(3, 1)
    assert row.to_pylist()[0] in everything.to_pylist()
    assert done.corpus.sample("train", "a cat", 0, 7).num_rows == 0


def test_unknown_categories_ids_and_missing_manifests_are_errors(done, tmp_path):
    with pytest.raises(DataError, match="no category 'x'"):
        done.corpus.num_rows("train", "x")
    with pytest.raises(DataError, match="not there"):
        done.corpus.rows_by_id("train", "a cat", ["0" * 32])
    with pytest.raises(DataError, match="run `ingest` first"):
        Corpus.open(str(tmp_path / "manifest.json"))
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 1, found 99"):
        Corpus.open(str(tmp_path / "manifest.json"))


def test_a_shard_that_is_damaged_or_short_is_an_error(tmp_path):
    shard = write_shard(str(tmp_path), "x.arrow", corpus_rows([hex_id(1)]), "train", "c")
    write_manifest(str(tmp_path / "manifest.json"), make_manifest([shard]))
    corpus = Corpus.open(str(tmp_path / "manifest.json"))
    write_shard(str(tmp_path), "x.arrow", corpus_rows(sorted(map(hex_id, (1, 2)))), "train", "c")
    with pytest.raises(DataError, match="expected 1 rows"):
        corpus.read_shard(shard)
    (tmp_path / "x.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(DataError, match="cannot be read"):
        corpus.read_shard(shard)


def test_a_later_manifest_takes_over_shards_and_merges_overlapping_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("system.data.corpus._BATCH_ROWS", 7)
    ids = sorted(map(hex_id, range(90)))
    old_dir, new_dir = tmp_path / "old" / "attempt", tmp_path / "new" / "attempt"
    old = [
        write_shard(str(old_dir), "a.arrow", corpus_rows(ids[0:40:2]), "train", "c"),
        write_shard(str(old_dir), "b.arrow", corpus_rows(ids[40:60]), "train", "c"),
    ]
    write_manifest(str(old_dir / "manifest.json"), make_manifest(old))
    corpus = Corpus.open(str(old_dir / "manifest.json"))
    shards = moved_shards(corpus, str(new_dir))
    assert shards[0].path.startswith("../../old/attempt/")
    shards.append(write_shard(str(new_dir), "c.arrow", corpus_rows(ids[1:40:2]), "train", "c"))
    shards.append(write_shard(str(new_dir), "d.arrow", corpus_rows(ids[60:]), "train", "c"))
    write_manifest(str(new_dir / "manifest.json"), make_manifest(shards))
    merged = Corpus.open(str(new_dir / "manifest.json"))
    tables = list(merged.iter_tables("train", "c"))
    assert [row_id for table in tables for row_id in table["id"].to_pylist()] == ids
    assert max(table.num_rows for table in tables) <= 14
    assert merged.sample("train", "c", 90, 0).num_rows == 90


def test_untagged_rows_are_counted_apart(tmp_path):
    shards = [
        write_shard(str(tmp_path), "a.arrow", corpus_rows([hex_id(1)]), "train", "c"),
        write_shard(str(tmp_path), "b.arrow", corpus_rows([hex_id(2)], None), "test", None),
    ]
    write_manifest(str(tmp_path / "manifest.json"), make_manifest(shards, read=2, kept=2))
    manifest = read_manifest(str(tmp_path / "manifest.json"))
    assert manifest.counts == {"train": {"c": 1}, "estimate": {"c": 0}, "test": {"c": 0}}
    assert manifest.untagged == {"train": 0, "estimate": 0, "test": 1}
    corpus = Corpus.open(str(tmp_path / "manifest.json"))
    assert corpus.num_rows("test", None) == 1
    assert next(corpus.iter_tables("test", None))["id"].to_pylist() == [hex_id(2)]


def test_a_shards_bytes_depend_on_its_rows_alone(tmp_path):
    ids = sorted(map(hex_id, range(20)))
    whole = corpus_rows(ids)
    twisted = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 10), whole.slice(13)])
    mixed = pa.concat_tables([whole, whole]).slice(20)
    one, two, three = (
        write_shard(str(tmp_path), f"{k}.arrow", table, "train", "c")
        for k, table in enumerate((whole, twisted, mixed))
    )
    assert one.sha256 == two.sha256 == three.sha256
    assert canonical_table(twisted).equals(whole)


def test_canonical_tables_keep_nulls_and_nested_values():
    table = pa.table(
        {
            "m": pa.array([[{"role": "a", "content": None}], None, []], MESSAGES),
            "s": pa.array(["x", None, "y"]),
            "f": pa.array([None, 1.5, None]),
        }
    )
    assert canonical_table(table).equals(table)
    assert canonical_table(table.slice(1)).equals(table.slice(1))


def test_categories_never_share_a_directory():
    names = [
        "tool use",
        "tool-use",
        "Tool Use",
        "tool/use",
        "a" * 90,
        "a" * 91,
        "été",
        "日本",
        "..",
        "c",
        "C",
        "c++",
        "c#",
        "类别募一",
        "类别妟一",
    ]
    found = {shard_directory("train", name) for name in [*names, None]}
    assert len(found) == len(names) + 1
    assert all(path.count("/") == 2 and ".." not in path for path in found)
    assert all(len(path.rsplit("/", 1)[1]) < 128 for path in found)


def test_directories_tell_names_apart_by_all_they_leave_out():
    """24 bits of a hash did not: a search of seconds finds two names that share them."""
    for name in ("类别募一", "Math", "a" * 41, "tool use", "-a"):
        assert shard_directory("train", name).endswith(hashlib.sha256(name.encode()).hexdigest())
    # A whole name needs no hash, and its directory is the one that it always had.
    assert shard_directory("train", "math") == "shards/train/math-58a6d6"


def test_a_shard_with_rows_of_another_category_is_not_read(tmp_path):
    done = ingest(
        tmp_path,
        *(SourceConfig(path=write_lines(tmp_path / f"{name}.jsonl", numbered(60, k)).name,
                       category=name) for name, k in (("a", 0), ("b", 500))),
    )  # fmt: skip
    (own,), (other,) = (done.corpus.shards("train", name) for name in ("a", "b"))
    (done.attempt / own.path).write_bytes((done.attempt / other.path).read_bytes())
    with pytest.raises(DataError, match=r"category 'a' only, found \['b'\]"):
        done.corpus.read_shard(own, ["id"])


@pytest.mark.parametrize("scheme", ["", "s3://", "memory://"])
def test_paths_are_relative_for_local_and_remote_places_alike(scheme):
    base, uri = f"{scheme}/run/tags/x", f"{scheme}/run/corpus/y/shard.arrow"
    assert resolve_path(base, relative_path(uri, base)) == uri


@pytest.mark.parametrize("content", [{}, [], {"shards": [{}]}, {"shards": 1, "categories": []}])
def test_a_damaged_manifest_is_one_clear_error(tmp_path, content):
    uri = str(tmp_path / "manifest.json")
    if isinstance(content, dict):
        content = {"format": FORMAT, **content}
    storage.write_json(uri, content)
    with pytest.raises(DataError, match=r"manifest.json: expected a corpus manifest.*--redo"):
        read_manifest(uri)
