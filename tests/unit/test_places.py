"""Where data lies: names with special characters, remote data sets, archives of any window."""

from __future__ import annotations

import fsspec
import pytest
from ingest_builders import ingest, numbered

from system.config import SourceConfig
from system.data import sources
from system.data.readers import Piece, read_rows


def rows_of(uri: str) -> list:
    return [row for _, row in read_rows(Piece(file=0, uri=uri, stamp=""))]


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
