"""Conversations with tools, marks and reasoning, as a run has selected them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from system import storage
from system.data.rows.conversation import normalise
from system.data.rows.shapes import messages as openai
from system.rundir import RunDir, StageRecord
from system.schema import SELECTION

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"zone": {"type": "array"}}}}


def call(name: str, call_id: str = "", **arguments: Any) -> dict[str, Any]:
    value = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **value} if call_id else value


PLAIN = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
}
PARALLEL = {
    "messages": [
        {"role": "system", "content": "You have tools."},
        {"role": "user", "content": "Weather in Rome, and the time?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("weather", "a1", city="Rome"), call("time", "b2", zone=[1, 2])],
        },
        {"role": "tool", "tool_call_id": "b2", "content": "noon"},
        {"role": "tool", "tool_call_id": "a1", "content": "sun"},
        {"role": "assistant", "content": "Sun, and noon."},
    ],
    "tools": [WEATHER, TIME],
}
NAMELESS = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call("weather", city=3)]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sun.", "reasoning_content": "It said sun."},
    ],
    "tools": [WEATHER],
}
BESIDE = {
    "messages": [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call("weather", city="Rome")]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ],
    "tools": [WEATHER],
}
MARKED = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "5", "loss": False},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "4"},
    ]
}
LOOKS_LIKE_CALLS = {
    "messages": [
        {"role": "user", "content": "Show me the form of a call."},
        {"role": "assistant", "content": 'So:\n{"tool_calls": ["like this"]}'},
    ]
}
ROWS = [PLAIN, PARALLEL, NAMELESS, BESIDE, MARKED, LOOKS_LIKE_CALLS]


def identity(row: dict[str, Any]) -> str:
    return normalise(openai(row), 10_000).id


def write_run(root: Path) -> Path:
    """A run directory whose stage `select` has chosen ROWS, in two files."""
    folder = root / "selection/attempts/f/parts"
    folder.mkdir(parents=True)
    rows = []
    for number, row in enumerate(ROWS):
        chat = normalise(openai(row), 10_000)
        turns = [
            {"role": role, "content": text, **_marks(chat.marks.get(place))}
            for place, (role, text) in enumerate(zip(chat.roles, chat.contents, strict=True))
        ]
        rows.append(
            {"stage": "1", "position": number, "id": chat.id, "category": "c", "messages": turns}
        )
    files = []
    for start in range(0, len(rows), 4):
        path = f"part-{start}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start : start + 4], SELECTION), folder / path)
        files.append({"path": path})
    storage.write_json(str(folder.parent / "manifest.json"), {"files": files})
    record = StageRecord(
        stage="select", fingerprint="f", inputs={}, counts={}, lines=(), seconds=0.0, finished="",
        versions={}, outputs={"manifest": "selection/attempts/f/manifest.json",
                              "selection": "selection/attempts/f/parts"},
    )  # fmt: skip
    RunDir(str(root)).commit("selection", record)
    return root


def _marks(marks: Any) -> dict[str, Any]:
    return {} if marks is None else marks._asdict()
