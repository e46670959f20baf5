"""Random rows of all formats, each with some odd values: all are accounted for, at any cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ingest_builders import Ingested, ingest, write_lines

from system.config import SourceConfig
from system.data.rows.formats import FORMATS

ODD: list[Any] = [
    None, True, False, 0, -1, 10**400, 1e308, float("nan"), "", " \n", "null", "[]", "[", "{}",
    "\ud800", "\x07", "a" * 3000, "a" + "\u0301\u0323" * 70, "x\r\ny\x0b", "[[", '{"role": "user"}',
    '[{"role": "user", "content": "q"}]', "[{'role': 'user'}]", [], {}, [None], [[]], {"a": None},
    [{"role": "assistant", "content": "a"}], {"type": "image"}, [{"type": "text", "text": "t"}],
]  # fmt: skip
KEYS = [
    "tools", "functions", "system", "system_prompt", "weight", "train", "loss", "thinking", "label",
    "reasoning_content", "image", "tool_calls", "function_call", "tool_call_id", "chosen",
    "kto_tag",
]  # fmt: skip


def text(draw: random.Random) -> str:
    return " ".join(draw.choice(["one", "två", "三", "4\n", "`f(x)`"]) for _ in range(4))


def chat(draw: random.Random, role: str, content: str) -> list[dict[str, Any]]:
    names = [draw.choice([("user", "human"), ("assistant", "gpt")][k % 2]) for k in range(4)]
    turns: list[dict[str, Any]] = [{role: name, content: text(draw)} for name in names]
    if draw.random() < 0.3:
        turns.insert(0, {role: draw.choice(["system", "developer"]), content: text(draw)})
    if draw.random() < 0.3:
        call = {"id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}
        turns[-1:] = [
            {role: "assistant", "tool_calls": draw.choice([[call], json.dumps([call, call])])},
            *[{role: "tool", content: text(draw), "tool_call_id": "c"}] * draw.randint(1, 2),
            {role: "assistant", content: text(draw), "weight": draw.choice([0, 1])},
        ]
    return turns


def tree(draw: random.Random) -> dict[str, Any]:
    reply = {"role": "assistant", "text": text(draw), "rank": 0, "replies": []}
    return {"role": "prompter", "text": text(draw), "replies": [reply] * draw.randint(0, 2)}


ROWS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "messages": lambda draw: {"messages": chat(draw, "role", "content")},
    "sharegpt": lambda draw: {"conversations": chat(draw, "from", "value")},
    "preference": lambda draw: {
        **draw.choice(
            [
                {"prompt": text(draw)},
                {"conversations": chat(draw, "from", "value")[:-1]},
                {"instruction": text(draw), "input": text(draw), "history": [["q", "a"]]},
                {},
            ]
        ),
        "chosen": draw.choice([text(draw), {"from": "gpt", "value": text(draw)}]),
        "rejected": text(draw),
    },
    "threads": lambda draw: draw.choice(
        [{"prompt": tree(draw)}, {"data": [text(draw) for _ in range(4)]}]
    ),
    "alpaca": lambda draw: {
        "instruction": text(draw),
        "input": draw.choice(["", text(draw)]),
        "output": text(draw),
        "history": draw.choice([[], [[text(draw), text(draw)]]]),
    },
    "prompt-completion": lambda draw: {
        "prompt": draw.choice([text(draw), json.dumps(chat(draw, "role", "content")[:-1])]),
        "completion": text(draw),
    },
    "question-answer": lambda draw: {"question": text(draw), "answer": text(draw)},
}


def spoil(draw: random.Random, value: Any) -> Any:
    """The value with something odd somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        if draw.random() < 0.4:
            return value | {draw.choice(KEYS): draw.choice(ODD)}
        key = draw.choice(list(value))
        return value | {key: spoil(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], spoil(draw, value[place]), *value[place + 1 :]]
    return draw.choice(ODD)


def write_rows(folder: Path, seed: int, num_rows: int) -> list[SourceConfig]:
    draw = random.Random(seed)
    sources = []
    for name, build in ROWS.items():
        rows = [build(draw) for _ in range(num_rows)]
        rows = [spoil(draw, row) if draw.random() < 0.4 else row for row in rows]
        write_lines(
            folder / f"{name}.jsonl", [row if isinstance(row, dict) else {} for row in rows]
        )
        sources.append(SourceConfig(path=f"{name}.jsonl", format=name))
    return sources


def result(done: Ingested) -> tuple[Any, ...]:
    manifest = done.manifest
    return manifest.content_digest, manifest.rejected, manifest.duplicates, done.rejected()


def check(folder: Path, seed: int, num_rows: int) -> None:
    sources = write_rows(folder, seed, num_rows)
    settings = {"max_chars": 2000, "reasoning": ("keep", "drop")[seed % 2]}
    whole = ingest(folder, *sources, **settings)
    manifest = whole.manifest
    assert manifest.read == num_rows * len(ROWS)
    counted = manifest.kept + manifest.duplicates + sum(manifest.rejected.values())
    assert manifest.read == counted
    assert 0.5 < manifest.kept / manifest.read < 0.95
    for row in whole.rows():
        turns = row["messages"]
        assert turns[-1]["role"] == "assistant"
        assert all(turn["content"] or turn["role"] == "tool" for turn in turns)
        assert any(turn["role"] == "assistant" and turn["loss"] is None for turn in turns)
    assert result(ingest(folder, *sources, **settings, chunk_bytes=3000)) == result(whole)


def test_odd_rows_of_all_formats_are_accounted_for_at_any_cut(tmp_path):
    assert set(ROWS) == {shape.name for shape in FORMATS}
    check(tmp_path, seed=0, num_rows=150)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_many_odd_rows_are_accounted_for_at_any_cut(tmp_path, seed):
    check(tmp_path, seed, num_rows=5000)
