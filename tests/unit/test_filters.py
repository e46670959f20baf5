"""The user's own filters at ingest, and vectors that come with the rows."""

from __future__ import annotations

import pytest
from ingest_builders import ingest, numbered, run_config, write_lines

from system.config import SourceConfig
from system.data.ingest.ingest import source_fingerprint
from system.errors import ConfigError

FILTERS = """
import pyarrow as pa

def no_seven(rows):
    texts = [turns[0]["content"] for turns in rows["messages"].to_pylist()]
    return ["has-seven" if "7" in text else None for text in texts]

def no_eight(rows):
    texts = [turns[-1]["content"] for turns in rows["messages"].to_pylist()]
    return pa.array(["has-eight" if "8" in text else None for text in texts], pa.string())

def short(rows):
    return [None]

def shouting(rows):
    return ["Not A Reason"] * rows.num_rows

def broken(rows):
    raise KeyError("x")
"""


@pytest.fixture
def filters(tmp_path, monkeypatch):
    name = f"filters_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FILTERS)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_filter_rejects_rows_under_its_own_reason_however_the_input_is_cut(
    tmp_path, filters, monkeypatch
):
    rows = numbered(300)
    rows[5] = {"prompt": ""}
    rows[90] = {"prompt": ""}
    write_lines(tmp_path / "rows.jsonl", rows)
    names = (f"{filters}:no_seven", f"{filters}:no_eight")
    whole = ingest(tmp_path, filters=names)
    seven = {k for k in range(300) if "7" in str(k) and k not in (5, 90)}
    eight = {k for k in range(300) if "8" in str(2 * k) and k not in (5, 90)} - seven
    counts = whole.manifest.rejected
    assert counts["has-seven"] == len(seven)
    assert counts["has-eight"] == len(eight)
    assert whole.manifest.kept == 300 - len(seven) - len(eight) - 2
    listed = whole.rejected()
    assert [row["row"] for row in listed] == sorted(seven | eight | {5, 90})
    assert all(filters in row["detail"] for row in listed if row["reason"].startswith("has-"))
    first = whole.files()
    monkeypatch.setattr("system.data.ingest.chunk._FLUSH_ROWS", 7)
    monkeypatch.setattr("system.data.ingest.chunk._FLUSH_REJECTED", 5)
    assert ingest(tmp_path, filters=names, chunk_bytes=2000).files() == first


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("short", r"expected a list of 20 answers, one a row, found 1 values"),
        ("shouting", r"found 'Not A Reason'"),
        ("broken", r"raised KeyError"),
        ("absent", r"expected a function 'absent'"),
    ],
)
def test_a_filter_that_does_something_else_is_named(tmp_path, filters, name, match):
    write_lines(tmp_path / "rows.jsonl", numbered(20))
    with pytest.raises(ConfigError, match=match) as caught:
        ingest(tmp_path, filters=(f"{filters}:{name}",))
    assert f"ingest.filters '{filters}:{name}'" in str(caught.value)


def test_a_filter_is_part_of_what_the_ingest_is_made_from(tmp_path, filters):
    write_lines(tmp_path / "rows.jsonl", numbered(20))
    config = run_config(tmp_path, filters=(f"{filters}:short",))
    before = source_fingerprint(config)
    (tmp_path / f"{filters}.py").write_text(FILTERS + "\n# changed")
    assert source_fingerprint(config) != before
    with pytest.raises(ConfigError, match="module 'no_such_module'"):
        source_fingerprint(run_config(tmp_path, filters=("no_such_module:f",)))


def test_embeddings_come_with_their_rows_and_bad_ones_are_rejected(tmp_path):
    rows = [{**row, "v": [k, 0.5]} for k, row in enumerate(numbered(40))]
    rows[1]["v"] = "text"
    rows[2]["v"] = [1.0, float("nan")]
    rows[3]["v"] = None
    write_lines(tmp_path / "rows.jsonl", rows)
    done = ingest(tmp_path, SourceConfig(path="rows.jsonl", embedding_column="v"))
    assert done.manifest.rejected == {"missing-field": 2}
    found = {row["messages"][0]["content"]: row["embedding"] for row in done.rows()}
    assert found["What is 3 plus 3?"] is None
    assert found["What is 7 plus 7?"] == [7.0, 0.5]
