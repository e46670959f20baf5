"""Which files a path stands for; no file with rows is left out without a word."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ingest_builders import ingest, numbered, write_lines

from system.config import SourceConfig
from system.data.read import sources
from system.data.read.listing import mixed_splits, resolve
from system.errors import DataError


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def found(folder: Path, path: str = "d") -> list[str]:
    return [os.path.relpath(name, folder / "d") for name in resolve(path, str(folder))]


@pytest.mark.parametrize("path", ["d", "d/**", "d/**/*.*"])
def test_files_of_programs_are_no_data(tmp_path, path):
    make(
        tmp_path / "d",
        "_temporary/0/part-0.parquet", "_delta_log/00000000000000000000.json", "_SUCCESS",
        "part-0.parquet", "_year=2024/b.jsonl", ".cache/c.jsonl", "sub/_tmp/d.jsonl",
        "sub/metadata/v1.metadata.json", "sub/e.jsonl", "saved/dataset_info.json",
        "saved/state.json", "saved/data-00000-of-00001.arrow", "saved/cache-12ab.arrow",
        "state.json.jsonl",
    )  # fmt: skip
    assert found(tmp_path, path) == [
        "_year=2024/b.jsonl", "part-0.parquet", "saved/data-00000-of-00001.arrow",
        "state.json.jsonl", "sub/e.jsonl",
    ]  # fmt: skip


def test_a_directory_that_is_named_is_read_whatever_its_name(tmp_path):
    make(tmp_path / "d", "_temporary/part-0.parquet")
    assert found(tmp_path, "d/_temporary") == ["_temporary/part-0.parquet"]
    assert found(tmp_path, "d/_temporary/*.parquet") == ["_temporary/part-0.parquet"]


def test_every_compression_that_is_read_is_listed(tmp_path):
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.csv.bz2", "e.json.zst", "f.csv.zip",
             "g.zip", "H.JSONL.GZ"]  # fmt: skip
    make(tmp_path / "d", *names)
    assert sorted(found(tmp_path)) == sorted(names)


@pytest.mark.parametrize(
    "name", ["b.jsonl.lz4", "b.csv.br", "b.7z", "b.rar", "b.tar.gz", "b.tgz", "b.JSON.Z", "b.tar"]
)
def test_archives_that_are_not_read_are_named(tmp_path, name):
    make(tmp_path / "d", "a.jsonl", name, "README.md.br", "picture.png")
    with pytest.raises(DataError, match=rf"found 1 archives.*{name}"):
        found(tmp_path)
    assert found(tmp_path, "d/*.jsonl") == ["a.jsonl"]


@pytest.mark.parametrize("path", ["d", "d/*.parquet"])
def test_a_delta_table_whose_files_are_all_valid_is_read(tmp_path, path):
    make(tmp_path / "d", "a.parquet", "_delta_log/00000000000000000000.json")
    assert found(tmp_path, path) == ["a.parquet"]
    log = tmp_path / "d" / "_delta_log" / "00000000000000000001.json"
    log.write_text(json.dumps({"remove": {"path": "a.parquet"}}))
    with pytest.raises(DataError, match="Delta table from which files were removed"):
        found(tmp_path, path)


@pytest.mark.parametrize("path", ["d", "d/**", "d/**/*.jsonl", "d/*/**"])
def test_links_in_a_circle_end(tmp_path, path):
    make(tmp_path / "d", "x/a.jsonl", "y/b.jsonl")
    for k in range(12):
        (tmp_path / "d" / "x" / f"up{k}").symlink_to(tmp_path / "d")
        (tmp_path / "d" / "y" / f"over{k}").symlink_to("../x")
    (tmp_path / "d" / "self").symlink_to("self")
    assert found(tmp_path, path) == ["x/a.jsonl", "y/b.jsonl"]
    assert sources.stat(str(tmp_path / "d"))[0] == 4


def test_links_out_of_the_directory_are_followed_once(tmp_path):
    make(tmp_path / "elsewhere", "a.jsonl", "sub/b.jsonl")
    make(tmp_path / "d", "c.jsonl")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "link2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "file.jsonl").symlink_to(tmp_path / "elsewhere" / "a.jsonl")
    assert found(tmp_path) == ["c.jsonl", "file.jsonl", "link/a.jsonl", "link/sub/b.jsonl"]


@pytest.mark.parametrize("path", ["d", "d/*.jsonl", "d/**"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, path):
    make(tmp_path / "d", "a.jsonl")
    (tmp_path / "d" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: expected a file, found a link"):
        found(tmp_path, path)


@pytest.mark.parametrize(
    ("names", "is_mixed"),
    [
        (["train.jsonl", "test.jsonl"], True),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"], True),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], True),
        (["m/train/a.jsonl", "m/test/b.jsonl", "c.jsonl"], True),
        (["m/train/a.jsonl", "n/test/b.jsonl"], False),
        (["math_train.jsonl", "code_test.jsonl"], False),
        (["latest.jsonl", "training_of_dogs.jsonl"], False),
        (["train-0.jsonl", "train-1.jsonl"], False),
        (["contest.jsonl", "strain.jsonl"], False),
    ],
)
def test_train_and_test_files_of_one_data_set_are_noticed(names, is_mixed):
    for root in ("/data/train-set/x/", "s3://bucket/test/"):
        note = mixed_splits([root + name for name in names])
        assert (note is not None) == is_mixed
        assert note is None or ("train" in note and "narrow `path`" in note)


def test_a_note_about_train_and_test_files_is_in_the_manifest(tmp_path):
    for number, name in enumerate(("train", "test")):
        (tmp_path / "d").mkdir(exist_ok=True)
        write_lines(tmp_path / "d" / f"{name}.jsonl", numbered(20, 20 * number))
    done = ingest(tmp_path, SourceConfig(path="d"))
    (note,) = done.manifest.details["notes"]
    assert "train files (train.jsonl) and test files (test.jsonl)" in note
    two = (SourceConfig(path="d/train.jsonl"), SourceConfig(path="d/test.jsonl"))
    assert "notes" not in ingest(tmp_path, *two).manifest.details
