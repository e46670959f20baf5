"""A row is the same row, with the same id, whatever container it lies in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from ingest_builders import ingest, write_lines

from system.config import SourceConfig
from system.data.read.readers import FileRange, read_rows

datasets.disable_progress_bars()

CALL = {
    "type": "function",
    "function": {"name": "find", "arguments": {"title": None, "year": 1938, "tags": [None, "x"]}},
}
OTHER_CALL = {"type": "function", "function": {"name": "find", "arguments": {"title": "Emma"}}}


def chat(k: int) -> dict[str, Any]:
    """Turns that have different keys, so that a struct must fill some with nulls."""
    return {
        "messages": [
            {"role": "user", "content": f"Which book is number {k}?", "name": None},
            {"role": "assistant", "tool_calls": [CALL if k % 2 else OTHER_CALL]},
            {"role": "tool", "content": "Emma", "function_call": None},
            {"role": "assistant", "content": f"It is Emma {k}."},
        ],
        "source": None if k % 3 else "books",
    }


ROWS = [chat(k) for k in range(40)]


def write_json(folder: Path) -> str:
    write_lines(folder / "rows.jsonl", ROWS)
    return "rows.jsonl"


def write_array(folder: Path) -> str:
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return "rows.json"


def write_struct_parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return "rows.parquet"


def write_struct_arrow(folder: Path) -> str:
    table = pa.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(folder / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return "rows.arrow"


def json_features() -> datasets.Features:
    turn = {
        "role": datasets.Value("string"),
        "content": datasets.Value("string"),
        "tool_calls": datasets.List(datasets.Json()),
    }
    return datasets.Features({"messages": datasets.List(turn), "source": datasets.Value("string")})


def with_json_columns(features: datasets.Features) -> datasets.Dataset:
    rows = [
        {
            **row,
            "messages": [
                {key: turn.get(key) for key in ("role", "content", "tool_calls")}
                for turn in row["messages"]
            ],
        }
        for row in ROWS
    ]
    return datasets.Dataset.from_list(rows, features=features)


def whole_messages() -> datasets.Features:
    return datasets.Features(
        {"messages": datasets.List(datasets.Json()), "source": datasets.Value("string")}
    )


def write_json_parquet(folder: Path) -> str:
    with_json_columns(json_features()).to_parquet(folder / "rows.parquet")
    return "rows.parquet"


def write_saved(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return "saved"


def write_saved_json(folder: Path) -> str:
    with_json_columns(json_features()).save_to_disk(folder / "saved")
    return "saved"


def write_saved_turns(folder: Path) -> str:
    with_json_columns(whole_messages()).save_to_disk(folder / "saved")
    return "saved"


def write_saved_column(folder: Path) -> str:
    rows = [{"messages": row["messages"]} for row in ROWS]
    features = datasets.Features({"messages": datasets.Json()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return "saved"


def write_text(folder: Path) -> str:
    rows = [{"messages": json.dumps(row["messages"]), "source": row["source"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return "rows.parquet"


def write_arguments(folder: Path) -> str:
    """Calls whose arguments are JSON text, as the API of OpenAI gives them."""
    rows = json.loads(json.dumps(ROWS))
    for row in rows:
        function = row["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
    write_lines(folder / "arguments.jsonl", rows)
    return "arguments.jsonl"


CONTAINERS = (
    write_text, write_arguments,
    write_array, write_struct_parquet, write_struct_arrow, write_json_parquet, write_saved,
    write_saved_json, write_saved_turns, write_saved_column,
)  # fmt: skip


@pytest.mark.parametrize("write", CONTAINERS, ids=lambda write: write.__name__)
def test_rows_of_every_container_are_duplicates_of_the_same_lines(tmp_path, write):
    sources = [SourceConfig(path=make(tmp_path)) for make in (write_json, write)]
    done = ingest(tmp_path, *sources)
    assert (done.manifest.read, done.manifest.kept, done.manifest.duplicates) == (80, 40, 40)
    calls = [turns[1][1] for turns in done.turns()]
    assert '{"tool_calls": [{"arguments": {"title": "Emma"}, "name": "find"}]}' in calls
    assert (
        '{"tool_calls": [{"arguments": {"tags": [null, "x"], "year": 1938}, "name": "find"}]}'
        in calls
    )


def raw(path: Path) -> list[Any]:
    return [row for _, row in read_rows(FileRange(file=0, uri=str(path), stamp=""))]


def test_maps_are_objects_and_binary_json_is_no_text(tmp_path):
    kind = pa.map_(pa.string(), pa.float64())
    table = pa.table({"m": pa.array([[("a", 1.0), ("b", None), ("c", float("nan"))], None], kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    assert raw(tmp_path / "x.parquet") == [{"m": {"a": 1.0}}, {"m": None}]


def test_nan_is_missing_in_json_and_in_tables(tmp_path):
    text = '{"t": NaN, "inner": {"x": NaN, "y": [NaN, 1.5]}, "z": null}\n'
    (tmp_path / "x.jsonl").write_text(text + '{"t": "null"}\n')
    nan = float("nan")
    rows = [{"t": nan, "inner": {"x": nan, "y": [nan, 1.5]}, "z": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = {"t": None, "inner": {"y": [None, 1.5]}, "z": None}
    assert raw(tmp_path / "x.jsonl") == [expected, {"t": "null"}]
    assert raw(tmp_path / "x.parquet") == [expected]


def test_broken_json_in_a_json_column_costs_its_row(tmp_path):
    texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{broken", '{"a": null}', None]))
    pq.write_table(pa.table({"j": texts}), tmp_path / "x.parquet")
    bad, *good = raw(tmp_path / "x.parquet")
    assert bad.reason == "bad-json"
    assert good == [{"j": {}}, {"j": None}]


def test_class_labels_give_their_names(tmp_path):
    features = datasets.Features(
        {"topic": datasets.ClassLabel(names=["zero", "one"]), "prompt": datasets.Value("string")}
    )
    saved = datasets.Dataset.from_dict(
        {"topic": [0, 1, -1, None], "prompt": list("abcd")}, features=features
    )
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "x.parquet")
    for name in ("saved", "x.parquet"):
        assert [row["topic"] for row in raw(tmp_path / name)] == ["zero", "one", None, None]


@pytest.mark.parametrize(
    "metadata", [b"[]", b"{", b'{"info": {"features": 5}}', b"\xff", b"[" * 9999]
)
def test_other_metadata_of_that_name_is_ignored(tmp_path, metadata):
    table = pa.table({"topic": [0, 1]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    assert [row["topic"] for row in raw(tmp_path / "x.parquet")] == [0, 1]


def test_an_empty_saved_data_set_has_no_rows(tmp_path):
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).save_to_disk(tmp_path / "saved")
    assert raw(tmp_path / "saved") == []
    with pytest.raises(ValueError, match="expected rows, found none"):
        ingest(tmp_path, SourceConfig(path="saved"))


def test_an_empty_split_beside_the_train_split_does_no_harm(tmp_path):
    train = datasets.Dataset.from_dict({"prompt": ["q"], "completion": ["a"]})
    empty = datasets.Dataset.from_dict({"prompt": [], "completion": []})
    datasets.DatasetDict({"train": train, "test": empty}).save_to_disk(tmp_path / "saved")
    assert raw(tmp_path / "saved") == [{"prompt": "q", "completion": "a"}]


@pytest.mark.parametrize("state", ["{}", "[]", "null", "5", "{", '{"_data_files": 5}',
                                   '{"_data_files": [{"filename": "../x.arrow"}]}'])  # fmt: skip
def test_a_damaged_record_of_a_saved_data_set_is_one_paragraph(tmp_path, state):
    train = datasets.Dataset.from_dict({"prompt": ["q"], "completion": ["a"]})
    train.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(ValueError, match=r"saved.*(expected|found)"):
        raw(tmp_path / "saved")
