"""Where data lies: names with special characters, remote data sets, archives of any window."""

from __future__ import annotations

import fsspec
import pytest
import zstandard
from ingest_builders import ingest, numbered, write_lines

from system.config import SourceConfig
from system.data.read import sources
from system.data.read.readers import FileRange, read_rows
from system.errors import DataError


def rows_of(uri: str) -> list:
    return [row for _, row in read_rows(FileRange(file=0, uri=uri, stamp=""))]


@pytest.mark.parametrize("kind", ["set", "dict"])
def test_remote_saved_data_sets_are_read_and_stamped(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(numbered(40))
    uri = f"memory://sets/{kind}"
    (datasets.DatasetDict({"train": saved}) if kind == "dict" else saved).save_to_disk(uri)
    assert sources.resolve(uri, "/nowhere") == [uri]
    size, stamp = sources.stat(uri)
    assert size > 1000 and (size, stamp) == sources.stat(uri)
    done = ingest(tmp_path, SourceConfig(path=uri))
    assert (done.manifest.read, done.manifest.kept) == (40, 40)
    remote = fsspec.filesystem("memory")
    (name,) = [name for name in remote.find(f"/sets/{kind}") if name.endswith(".arrow")]
    remote.pipe_file(name, remote.cat_file(name))
    assert sources.stat(uri)[1] != stamp


def test_a_remote_file_that_is_not_there_is_no_data_set():
    with pytest.raises(FileNotFoundError):
        rows_of("memory://sets/nothing.jsonl")


@pytest.mark.parametrize("path", ["data[1]", "data[1]/*.jsonl", "."])
def test_brackets_in_the_names_of_directories_are_no_patterns(tmp_path, path):
    folder = tmp_path / "all[x]" / "data[1]"
    folder.mkdir(parents=True)
    write_lines(folder / "a.jsonl", numbered(1))
    if "*" in path:
        write_lines(folder.parent / "data1.jsonl", numbered(1))
        path = path.replace("[1]", "[[]1]")
    assert sources.resolve(path, str(folder.parent)) == sorted(
        str(name) for name in folder.rglob("*.jsonl")
    )


def test_brackets_in_the_names_of_remote_directories_are_no_patterns():
    fsspec.filesystem("memory").pipe_file("/b/data[1]/sub/a.jsonl", b"{}\n")
    (found,) = sources.resolve("memory://b/data[1]", "/nowhere")
    assert found.endswith("/b/data[1]/sub/a.jsonl")
    assert rows_of(found) == [{}]


def test_zstd_archives_with_long_windows_are_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=28, hash_log=12, chain_log=12
    )
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = writer.compress(b'{"a": 1}\n' * 3) + writer.flush()
    (tmp_path / "rows.jsonl.zst").write_bytes(data)
    assert rows_of(str(tmp_path / "rows.jsonl.zst")) == [{"a": 1}] * 3


def test_row_groups_without_bytes_at_the_end_are_read(tmp_path, monkeypatch):
    class Group:
        def __init__(self, size: int) -> None:
            self.total_byte_size = size

    class Metadata:
        num_row_groups = 4

        def row_group(self, number: int) -> Group:
            return Group([60, 60, 0, 0][number])

    monkeypatch.setattr(sources, "_parquet_metadata", lambda uri: Metadata())
    assert list(sources._row_group_ranges("x", 100)) == [(0, 1), (1, 4)]
    Metadata.row_group = lambda self, number: Group(0)
    assert list(sources._row_group_ranges("x", 100)) == [(0, 4)]


def test_a_hub_data_set_that_cannot_be_generated_is_an_error_without_a_traceback(
    tmp_path, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"a": 1}\n{"a": {"b": [}\n')
    with pytest.raises(DataError, match=r"hf://.*cannot be loaded"):
        rows_of(f"hf://{tmp_path / 'set'}")
