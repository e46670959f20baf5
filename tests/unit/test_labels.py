"""Labels of rows: numbers as names, missing values, and columns that no row has."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_builders import ingest, numbered, run_config, write_lines
from pydantic import ValidationError

from system.config import SourceConfig
from system.config.load import load_config
from system.data.rows.category_maps import read_category_map
from system.data.rows.labels import Labels
from system.errors import ConfigError, DataError
from system.influence.design.external_targets import read_target

NAN = math.nan


def labels_of(row: dict, uri: str = "x.jsonl", **source: Any) -> Any:
    labels = Labels(
        SourceConfig(
            path="x",
            **{"category_column": "c", "answer_column": "v", "score_column": "s"} | source,
            embedding_column="e",
        )
    )
    labels.open_file(uri)
    columns, rejected = labels.of([row], [])
    return rejected[0][1].reason if rejected else [column[0] for column in columns]


def test_nan_is_a_missing_label():
    assert labels_of({"c": NAN, "v": NAN, "s": NAN, "e": NAN}) == [None] * 5
    assert labels_of({"s": "nan"})[3] is None
    assert labels_of({"c": math.inf}) == "missing-field"
    assert labels_of({"s": math.inf})[3] == math.inf


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, "0"), (0.0, "0"), (-0.0, "0"), (7.0, "7"), (2.5, "2.5"), (Decimal("7.00"), "7"),
        (Decimal("1E+2"), "100"), ("7.0", "7.0"), (" 7 ", "7"), (1e300, "1e+300"),
    ],
)  # fmt: skip
def test_whole_numbers_have_one_name(value, name):
    assert labels_of({"c": value})[0] == name


def test_text_of_csv_that_looks_like_a_number_is_one():
    assert [labels_of({"c": text}, "x.csv.gz")[0] for text in ("0", "0.0", "1.5", "v1.0")] == [
        "0", "0", "1.5", "v1.0",
    ]  # fmt: skip


def test_a_map_in_yaml_may_have_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: 'builtin:tiny'}}\nsolve: {{budget: 10}}\n"
        "sources: [{path: x.jsonl, category_column: c, category_map: {0: zero, 1: 2, 2.0: two}}]\n"
    )
    (source,) = load_config(str(path)).sources
    assert source.category_map == {"0": "zero", "1": "2", "2": "two"}
    labels = Labels(source)
    labels.open_file("x.jsonl")
    rows = [{"c": value} for value in (0, 0.0, "0", 1, "2")]
    assert labels.of(rows, [])[0].category == ["zero", "zero", "zero", "2", "two"]
    path.write_text(path.read_text().replace("0: zero", "no: Norwegian"))
    with pytest.raises(ConfigError, match=r"found false.*quotes"):
        load_config(str(path))


def test_a_map_with_two_names_for_one_number_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="one category for '0'"):
        SourceConfig(path="x", category_column="c", category_map={"0": "a", 0: "b"})
    (tmp_path / "map.yaml").write_text("0: zero\n1.0: one\n")
    assert read_category_map(str(tmp_path / "map.yaml")) == {"0": "zero", "1": "one"}
    (tmp_path / "map.yaml").write_text("no: Norwegian\n")
    with pytest.raises(DataError, match="in quotes"):
        read_category_map(str(tmp_path / "map.yaml"))


def test_numbers_of_every_container_are_one_category(tmp_path):
    rows = numbered(120)
    labelled = [{**row, "c": k % 2} for k, row in enumerate(rows)]
    write_lines(tmp_path / "a.jsonl", labelled[:40])
    floats = [{**row, "c": float(row["c"])} for row in labelled[40:80]]
    pq.write_table(pa.Table.from_pylist(floats), tmp_path / "b.parquet")
    lines = [f"{row['prompt']},{row['completion']},{row['c']:.1f}" for row in labelled[80:]]
    (tmp_path / "c.csv").write_text("prompt,completion,c\n" + "\n".join(lines) + "\n")
    source = {"category_column": "c", "category_map": {0: "zero"}}
    done = ingest(tmp_path, *(SourceConfig(path=p, **source) for p in ("a.*", "b.*", "c.*")))
    assert done.manifest.categories == ("1", "zero")
    assert done.manifest.kept == 120


ROWS = [{**row, "topic": "t", "quality": 1.0, "gold": None} for row in numbered(40)]


@pytest.mark.parametrize(
    ("settings", "key", "nearest"),
    [
        ({"category_column": "topik"}, "category_column", "'topic'"),
        ({"score_column": "qualty"}, "score_column", "'quality'"),
        ({"answer_column": "Gold"}, "answer_column", "'gold'"),
        ({"embedding_column": "zzz"}, "embedding_column", "'completion', 'gold'"),
        (
            {"format": "columns", "columns": {"prompt": "prompt", "response": "completions"}},
            r"columns\.response",
            "'completion'",
        ),
        (
            {
                "format": "columns",
                "columns": {"prompt": "prompt", "response": "completion", "system": "topics"},
            },
            r"columns\.system",
            "'topic'",
        ),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [500, 2**20])
def test_a_column_that_no_row_has_stops_the_ingest(tmp_path, settings, key, nearest, chunk_bytes):
    write_lines(tmp_path / "rows.jsonl", ROWS)
    source = SourceConfig(path="rows.jsonl", **settings)
    with pytest.raises(ConfigError, match=rf"'rows'.*{key}.*{nearest}"):
        ingest(tmp_path, source, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_column_of_nulls_or_of_few_rows_is_a_column(tmp_path, name):
    rows = [{**row, "rare": 1.0} if k == 30 else row for k, row in enumerate(ROWS)]
    if name == "rows.jsonl":
        write_lines(tmp_path / name, [b"{broken", *rows])
    else:
        pq.write_table(pa.Table.from_pylist(ROWS + rows[30:31]), tmp_path / name)
    for column in ("gold", "rare") if name == "rows.jsonl" else ("gold",):
        source = SourceConfig(path=name, score_column=column)
        assert ingest(tmp_path, source, chunk_bytes=500).manifest.kept == 40


def test_a_target_without_its_answer_column_is_refused(tmp_path):
    write_lines(tmp_path / "t.jsonl", ROWS)
    source = SourceConfig(path="t.jsonl", name="bench", answer_column="golds")
    settings = run_config(tmp_path).ingest
    with pytest.raises(ConfigError, match=r"'bench'.*answer_column.*Did you mean 'gold'"):
        read_target(source, data_dir=str(tmp_path), ingest=settings, exclude=())


def test_dates_are_no_names():
    assert labels_of({"c": datetime.date(2024, 1, 1)}) == "missing-field"
