"""Categories that a file tells."""

from __future__ import annotations

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_builders import ingest, numbered, run_config, write_lines
from pydantic import ValidationError

from system.config import SourceConfig
from system.data.ingest.ingest import source_fingerprint
from system.data.rows.category_maps import read_category_map
from system.errors import DataError

MAP = {"0": "even", "1": "odd", "2": "even"}
ROWS = [{"id": value, "category": category} for value, category in MAP.items()]


def write_map(folder, name: str) -> str:
    path = folder / name
    match name.split(".")[1]:
        case "json":
            path.write_text(json.dumps(MAP if name.startswith("map") else ROWS))
        case "yaml":
            path.write_text("".join(f"{value}: {category}\n" for value, category in MAP.items()))
        case "jsonl":
            write_lines(path, [{**row, "id": int(row["id"])} for row in ROWS])
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
        case ending:
            comma = "\t" if ending == "tsv" else ","
            lines = [("id", "category"), *MAP.items()]
            path.write_text("".join(f"{comma.join(line)}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["map.json", "rows.json", "map.yaml", "map.jsonl", "map.parquet", "map.csv", "map.tsv"],
)
def test_a_map_is_read_from_any_kind_of_file(tmp_path, name):
    assert read_category_map(write_map(tmp_path, name)) == MAP


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "id,category,more\n1,a,b\n", "one other column"),
        ("m.csv", "id,name\n1,a\n", "one other column"),
        ("m.csv", "id,category\n1,a\n1,b\n", "one category for '1'"),
        ("m.json", "{", "cannot be read"),
        ("m.json", '{"a": [1]}', "a text for a text"),
        ("m.yaml", "- 1\n", "no mapping"),
        ("m.json", "{}", "found nothing"),
    ],
)
def test_what_is_no_map_is_described(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"m\..*{words}"):
        read_category_map(str(tmp_path / name))


@pytest.mark.parametrize("policy", ["keep", "untagged", "reject"])
def test_values_that_the_map_lacks_follow_the_policy(tmp_path, policy):
    rows = [{**row, "id": k % 4} for k, row in enumerate(numbered(40))]
    write_lines(tmp_path / "rows.jsonl", [*rows, {"prompt": "no id", "completion": "a"}])
    write_map(tmp_path, "map.csv")
    source = SourceConfig(
        path="rows.jsonl", category_column="id", category_map="map.csv", category_unmapped=policy
    )
    done = ingest(tmp_path, source)
    found = [row["category"] for row in done.rows()]
    assert (found.count("even"), found.count("odd")) == (20, 10)
    assert found.count("3") == (10 if policy == "keep" else 0)
    assert found.count(None) == (11 if policy == "untagged" else 1)
    assert done.manifest.rejected == ({"unknown-category": 10} if policy == "reject" else {})


def test_a_map_in_a_file_needs_the_policy_said():
    with pytest.raises(ValidationError, match="category_unmapped"):
        SourceConfig(path="x", category_column="id", category_map="map.csv")


def test_the_maps_content_is_part_of_the_fingerprint(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(3))
    fsspec.filesystem("memory").pipe_file("/maps/m.json", b'{"a": "b"}')
    source = SourceConfig(
        path="rows.jsonl",
        category_column="id",
        category_map="memory://maps/m.json",
        category_unmapped="keep",
    )
    config = run_config(tmp_path, source)
    before = source_fingerprint(config)
    assert source_fingerprint(config) == before
    fsspec.filesystem("memory").pipe_file("/maps/m.json", b'{"a": "c"}')
    assert source_fingerprint(config) != before
    fsspec.filesystem("memory").rm("/maps/m.json")
    with pytest.raises(DataError, match=r"category_map.*m\.json"):
        source_fingerprint(config)


def test_an_unknown_category_in_a_path_is_an_error_with_the_file(tmp_path):
    write_lines(tmp_path / "maths.jsonl", numbered(3))
    source = SourceConfig(
        path="maths.jsonl",
        category_pattern=r"(?P<category>\w+)\.jsonl",
        category_map={"law": "law"},
        category_unmapped="reject",
    )
    with pytest.raises(DataError, match=r"maths\.jsonl.*does not have 'maths'"):
        ingest(tmp_path, source)
