"""Tools, tool calls and marks as the fields that other trainers document.

The corpus keeps the definitions of tools, and the calls of a turn, as one line of JSON at the end
of the turn's text (`system/data/rows/turns.py`).  Chat templates write tools in a syntax of their
own.  They can do so only if a trainer hands them over as fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from system.data.rows.turns import canonical_json


class Structured(NamedTuple):
    """A conversation with its tools in fields."""

    tools: list[Any]
    """JSON schemas of the functions that the model may call."""
    messages: list[dict[str, Any]]
    """Messages with the keys that OpenAI and transformers document: role, content, and where they
    apply reasoning_content, tool_calls, tool_call_id, name; and `train` false without a loss."""


def structured(turns: Iterable[Mapping[str, Any]]) -> Structured:
    """The conversation with tools and calls taken out of its texts.

    Args:
        turns: turns as the column `messages` of SELECTION holds them.
    """
    tools: list[Any] = []
    messages: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    """Calls of the last assistant turn that no result has answered yet."""
    for turn in turns:
        role, text = turn["role"], turn["content"]
        ids = turn.get("call_ids") or []
        message: dict[str, Any] = {"role": role, "content": text}
        if role == "system":
            text, listed = _take_line(text, "tools")
            tools += listed
            if listed and not text:
                continue
            message["content"] = text
        elif role == "assistant":
            message, calls = _assistant(turn)
        elif role == "tool":
            message |= _answered(calls, ids[0] if ids else "")
        messages.append(message)
    return Structured(tools, messages)


def _assistant(turn: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    text, functions = _take_line(turn["content"], "tool_calls")
    ids = turn.get("call_ids") or []
    ids = [*ids, *[""] * (len(functions) - len(ids))]
    calls = [
        ({"id": name} if name else {}) | {"type": "function", "function": function}
        for name, function in zip(ids, functions, strict=False)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if turn.get("reasoning"):
        message["reasoning_content"] = turn["reasoning"]
    if calls:
        message["tool_calls"] = calls
    if turn.get("loss") is False:
        message["train"] = False
    return message, list(calls)


def _answered(calls: list[dict[str, Any]], call_id: str) -> dict[str, Any]:
    """Which call a result answers: the one with its id, else the first without a result."""
    call = next((call for call in calls if call_id and call.get("id") == call_id), None)
    if call is None and not call_id and calls:
        call = calls[0]
    if call is None:
        return {"tool_call_id": call_id} if call_id else {}
    calls.remove(call)
    answered = {"tool_call_id": call["id"]} if "id" in call else {}
    return answered | {"name": call["function"]["name"]}


def _take_line(text: str, key: str) -> tuple[str, list[Any]]:
    """The text without its last line, and what this line lists; all of the text and nothing, if it
    does not end with such a line.
    """
    before, _, line = text.rpartition("\n")
    if not line.startswith(f'{{"{key}": '):
        return text, []
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return text, []
    # Only a line that ingest would write again: nothing of another text may get lost.
    if not isinstance(value, dict) or list(value) != [key] or canonical_json(value, key) != line:
        return text, []
    listed = value[key] if isinstance(value[key], list) else [value[key]]
    if key == "tool_calls" and not all(_is_call(item) for item in listed):
        return text, []
    if key == "tools" and not all(isinstance(item, dict) for item in listed):
        return text, []
    return before.rstrip("\n"), listed


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"name", "arguments"}
