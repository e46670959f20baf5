"""Whatever a row holds, it becomes a conversation or is rejected with a reason."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from case_counts import CaseCount
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_builders import ingest, numbered, write_lines

from system.config import SourceConfig
from system.data.rows.conversation import RowRejected
from system.data.rows.formats import FORMATS, columns_format
from system.data.rows.labels import Labels
from system.data.rows.normal_batch import normalise_batch

SHAPES = [*FORMATS, columns_format({"prompt": "q", "response": "a", "system": "s"})]
DEEP = "[" * 100_000
GOOD = {"role": "user", "content": "q"}


def rejected(name: str, row: dict) -> RowRejected:
    turns = next(shape.turns for shape in FORMATS if shape.name == name)
    batch = normalise_batch([row], turns, 10_000)
    ((place, why),) = batch.rejected
    assert place == 0 and not batch.places
    return why


def call(arguments: Any) -> dict:
    answer = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    return {"messages": [GOOD, answer]}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("messages", call(DEEP), "bad-json"),
        ("messages", {"messages": DEEP}, "bad-json"),
        ("messages", {"messages": [{"role": [[]], "content": "q"}]}, "wrong-role-order"),
        ("alpaca", {"instruction": "q", "output": "a", "tools": DEEP}, "bad-json"),
        ("alpaca", {"instruction": "q", "output": "a", "tools": [b"x"]}, "missing-field"),
        (
            "prompt-completion",
            {"prompt": "q", "completion": "a", "tools": [datetime.datetime(2024, 1, 1)]},
            "missing-field",
        ),
        ("threads", {"prompt": {"role": "prompter", "text": "q", "replies": 5}}, "missing-field"),
        ("threads", {"prompt": {"role": {}, "text": "q"}}, "wrong-role-order"),
    ],
)
def test_values_that_no_shape_expects_cost_one_row(name, row, reason):
    assert rejected(name, row).reason == reason


def test_ranks_of_any_size_are_compared():
    replies = [
        {"role": "assistant", "text": text, "rank": rank}
        for text, rank in (("late", 10**400), ("best", 1), ("unranked", None))
    ]
    (shape,) = (shape for shape in FORMATS if shape.name == "threads")
    row = {"prompt": {"role": "prompter", "text": "q", "replies": replies}}
    assert shape.turns(row)[1] == ("assistant", "best")


def labels_of(row: dict) -> tuple[Any, list]:
    labels = Labels(
        SourceConfig(
            path="x", category_column="c", answer_column="v", score_column="s", embedding_column="e"
        )
    )
    labels.open_file("x")
    return labels.of([row, {"c": "after"}], [])


@pytest.mark.parametrize(
    "row",
    [{"s": 10**400}, {"s": []}, {"e": [10**400]}, {"e": [1e300]}, {"e": "123"}, {"e": [math.nan]}],
)
def test_labels_that_are_no_numbers_cost_one_row(row):
    columns, wrong = labels_of(row)
    assert [(place, why.reason) for place, why in wrong] == [(0, "missing-field")]
    assert columns.category == [None, "after"]


def test_odd_rows_of_files_are_rejected_and_all_others_kept(tmp_path):
    deep = b'{"prompt": "q", "completion": "a", "tools": ' + b"[" * 900 + b"]" * 900 + b"}"
    write_lines(
        tmp_path / "rows.jsonl",
        [
            *numbered(5),
            deep,
            {"prompt": "q", "completion": "a", "tools": DEEP},
            {**numbered(1, 50)[0], "s": 10**400},
        ],
    )
    done = ingest(tmp_path, SourceConfig(path="rows.jsonl", score_column="s"))
    assert done.manifest.rejected["bad-json"] >= 1
    assert done.manifest.rejected["missing-field"] == 1
    assert done.manifest.read == 8 == done.manifest.kept + sum(done.manifest.rejected.values())


def test_tools_of_parquet_that_json_cannot_hold_cost_their_rows(tmp_path):
    moment = datetime.datetime(2024, 1, 1)
    rows = [{**row, "tools": [moment] if k == 2 else []} for k, row in enumerate(numbered(5))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    done = ingest(tmp_path, SourceConfig(path="rows.parquet"))
    assert (done.manifest.kept, done.manifest.rejected) == (4, {"missing-field": 1})


TEXTS = st.text(max_size=6) | st.sampled_from(
    ["user", "assistant", "system", "prompter", "Human: q\n\nAssistant: a", "[1, 2]", '{"a": 1}',
     '[{"role": "user", "content": "q"}]', "\ud800", "\x07", "[" * 2000]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just(10**400)
    | st.sampled_from([b"x", datetime.datetime(2024, 1, 1), Decimal("1.5")])
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "from", "content", "value", "text", "user", "type", "tool_calls", "function_call",
     "function", "name", "arguments", "replies", "rank", "deleted"]
) | st.text(max_size=2)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
ROW_KEYS = {
    "messages": ["messages"],
    "sharegpt": ["conversations", "conversation"],
    "preference": ["chosen", "rejected", "prompt", "question", "instruction"],
    "threads": ["data", "prompt"],
    "alpaca": ["instruction", "input", "context", "output", "response", "history"],
    "prompt-completion": ["prompt", "completion", "response"],
    "question-answer": ["question", "answer", "context"],
    "columns": ["q", "a", "s"],
}


def rows_for(name: str) -> st.SearchStrategy[dict]:
    keys = st.sampled_from([*ROW_KEYS[name], "system", "system_prompt", "tools"])
    return st.dictionaries(keys, VALUES, max_size=5)


def rows_accounted_for(rows: list[dict], turns: Callable) -> None:
    batch = normalise_batch(rows, turns, 1000)
    places = [*batch.places, *(place for place, _ in batch.rejected)]
    assert sorted(places) == list(range(len(rows)))
    for _, why in batch.rejected:
        assert why.reason and why.detail


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_no_row_of_any_shape_is_lost_or_stops_its_batch(shape):
    assert set(ROW_KEYS) == {known.name for known in SHAPES}

    @settings(max_examples=50, deadline=None)
    @given(st.lists(rows_for(shape.name), max_size=3))
    def rows_become_turns_or_reasons(rows):
        for row in rows:
            for known in SHAPES:
                assert known.recognises(row) in (True, False)
        rows_accounted_for(rows, shape.turns)

    rows_become_turns_or_reasons()


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("cvse"), VALUES, max_size=4))
def test_no_label_stops_its_batch(row):
    columns, wrong = labels_of(row)
    assert all(len(column) == 2 for column in columns)
    assert [place for place, _ in wrong] in ([], [0])
    pa.array(columns.embedding, pa.list_(pa.float32()))
    pa.array(columns.category, pa.string())
    pa.array(columns.answer, pa.string())
    pa.array(columns.score, pa.float64())


@pytest.mark.parametrize("name", ["csv", "jsonl"])
def test_counts_add_up_whatever_the_file_holds(tmp_path_factory, name):
    read = CaseCount()

    @settings(max_examples=15, deadline=None)
    @given(lines=st.lists(st.text(max_size=30), max_size=6))
    def check(lines):
        folder = tmp_path_factory.mktemp("fuzz")
        first = "prompt,completion\nq,a\n" if name == "csv" else json.dumps(numbered(1)[0]) + "\n"
        text = first + "\n".join(lines)
        (folder / f"rows.{name}").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            done = ingest(folder, SourceConfig(path=f"rows.{name}"))
        except ValueError as error:
            assert f"rows.{name}" in str(error)
            read.add(False)
            return
        read.add(True)
        manifest = done.manifest
        counted = manifest.kept + manifest.duplicates + sum(manifest.rejected.values())
        assert manifest.read == counted
        if name == "jsonl":
            # Blank is what bytes call blank: a line of other spaces or controls is a bad row.
            lines = text.encode("utf-8", "surrogatepass").split(b"\n")
            assert manifest.read == sum(1 for line in lines if line.strip())

    check()
    read.require(0.6)
