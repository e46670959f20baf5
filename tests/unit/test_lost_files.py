"""A file of which nothing would be used stops the ingest, however small its share of the rows."""

from __future__ import annotations

import json

import pytest
from ingest_builders import ingest, numbered, write_lines

from system.config import SourceConfig
from system.data.read.readers import file_kind
from system.errors import DataError

DIRECTORY = SourceConfig(path="d")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    write_lines(tmp_path / "d" / "a.jsonl", numbered(200))
    return tmp_path / "d"


@pytest.mark.parametrize("name", ["part-7.jsonl", "part-7.csv", "part-7.parquet", "part-7.json.gz"])
def test_a_pointer_file_is_named_as_one(tmp_path, folder, name):
    (folder / name).write_bytes(POINTER)
    with pytest.raises(DataError, match=rf"{name}.*Git LFS pointer.*git lfs pull"):
        ingest(tmp_path, DIRECTORY)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.parquet", "b.arrow", "b.csv.zst", "b.json.bz2"])
def test_an_archive_or_table_of_no_bytes_is_damaged(tmp_path, folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}.*0 bytes"):
        ingest(tmp_path, DIRECTORY)


def test_a_text_file_of_no_bytes_has_no_rows(tmp_path, folder):
    (folder / "b.jsonl").write_bytes(b"")
    assert file_kind(str(folder / "b.jsonl")).name == "lines"
    assert ingest(tmp_path, DIRECTORY).manifest.read == 200


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_around_the_rows_is_an_error_that_shows_the_way_out(tmp_path, folder, indent):
    (folder / "b.json").write_text(json.dumps({"v": 1, "data": numbered(50, 300)}, indent=indent))
    with pytest.raises(DataError) as error:
        ingest(tmp_path, DIRECTORY)
    message = str(error.value)
    assert "b.json (its only row, the first one wrong-role-order" in message
    assert "a list of 50 objects under 'data'" in message
    assert """jq -c '.["data"][]'""" in message


@pytest.mark.parametrize("chunk_bytes", [100, 10**6])
def test_a_file_without_a_usable_row_is_an_error_or_counted(tmp_path, folder, chunk_bytes):
    write_lines(folder / "b.jsonl", [b"", b"{oops", *[{"prompt": "q", "completion": " "}] * 30])
    write_lines(folder / "c.jsonl", [b"{oops"] * 30 + numbered(1, 300))
    with pytest.raises(DataError) as error:
        ingest(tmp_path, DIRECTORY, chunk_bytes=chunk_bytes)
    message = str(error.value)
    assert "found none in 1 of 3 files" in message
    assert "b.jsonl (all 31 rows, the first one bad-json: " in message
    assert "ingest.unusable_files: count" in message
    assert not (tmp_path / "attempt" / "manifest.json").exists()
    done = ingest(tmp_path, DIRECTORY, chunk_bytes=chunk_bytes, unusable_files="count")
    assert done.manifest.rejected == {"bad-json": 31, "empty-turn": 30}
    assert done.manifest.kept == 201


def test_rows_rejected_for_their_labels_are_not_usable(tmp_path, folder):
    write_lines(folder / "b.jsonl", [{**row, "score": "high"} for row in numbered(3, 300)])
    with pytest.raises(DataError, match=r"b\.jsonl \(all 3 rows, the first one missing-field: 'sc"):
        ingest(tmp_path, SourceConfig(path="d", score_column="score"))


def test_a_file_of_repeats_or_of_benchmark_questions_is_not_lost(tmp_path, folder):
    write_lines(folder / "b.jsonl", numbered(5))
    long = {"prompt": " ".join(f"word{k}" for k in range(40)), "completion": "yes"}
    write_lines(folder / "c.jsonl", [long])
    write_lines(tmp_path / "bench.jsonl", [long])
    shares = {"estimate_share": 0.0, "test_share": 0.0, "min_heldout_rows": 1}
    done = ingest(tmp_path, DIRECTORY, benchmarks=("bench.jsonl",), **shares)
    assert done.manifest.rejected == {"benchmark-overlap": 1}
    assert done.manifest.duplicates == 5
