"""From the messages of a conversation to turns: role, text and marks of each message.

Takes OpenAI messages and ShareGPT turns, mixed spellings allowed.  A message may hold anything that
JSON or Arrow can hold; one that is no turn rejects its row with a reason.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from system.data.rows.conversation import Marks, RowRejected, Turn
from system.foreign_tables import without_nulls

Row = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "question": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names of roles in files -> roles of turns."""
MEDIA = frozenset(
    f"{kind}{ending}"
    for kind in ("image", "img", "video", "audio")
    for ending in (
        "",
        "s",
        "_url",
        "_urls",
        "_path",
        "_paths",
        "_bytes",
        *map("_{}".format, range(10)),
    )
)
"""Columns of a row, and keys of a message or of a part, that hold something else than text."""
TOOLS = ("tools", "functions")
"""Keys of tool definitions; the second is the older one."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold what the assistant thought before it answered."""
_NAMES = ("from", "role")
_TEXTS = ("value", "content", "text")
_LOSS = ("loss", "train", "training", "weight")
_LOSS_OF_PARTS = ("train_detail", "training_detail")
_MEDIA_PART = re.compile("image|video|audio|file|document", re.IGNORECASE)
_REASONING_PART = frozenset(["thinking", "reasoning"])
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_NOTHING = frozenset(["", "none", "null", "nan"])
_JSON_STARTS = frozenset("[{")
_LIKE_TURNS = re.compile(r"\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def chat(messages: Any, where: str = "messages") -> list[Turn]:
    """Turns from a list of messages, or from its JSON text.

    Raises:
        RowRejected: missing-field, wrong-role-order, bad-json, bad-mark or media.
    """
    messages = decoded(messages, where)
    if not isinstance(messages, list):
        found = "nothing" if messages is None else type(messages).__name__
        raise RowRejected("missing-field", f"{where!r}: expected a list of turns, found {found}")
    turns: list[Turn] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RowRejected("missing-field", f"{where!r} holds a {type(message).__name__}")
        role = role_of(message.get("from") or message.get("role") or message.get("user"), where)
        value = message.get("value")
        if value is None:
            value = message.get("content")
        if value is None:
            value = message.get("text")
        if len(message) == 2 and type(value) is str:
            turns.append((role, value))
        else:
            turns.append(_turn(role, value, message))
    return turns


def role_of(name: Any, where: str) -> str:
    """The role of a turn, from its name in a file.

    Raises:
        RowRejected: wrong-role-order.
    """
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowRejected("wrong-role-order", f"unknown role {reprlib.repr(name)} in {where!r}")
    return role


def listed_turns(value: Any) -> Any:
    """Turns as a list, where the value is one turn or the JSON text of turns; else the value.

    Raises:
        RowRejected: bad-json: a text that begins as turns do, and is no JSON.
    """
    if isinstance(value, Mapping):
        return value if value.keys().isdisjoint(_NAMES) else [value]
    if not isinstance(value, str) or value.lstrip()[:1] not in _JSON_STARTS:
        return value
    try:
        turns = without_nulls(json.loads(value))
    except (ValueError, RecursionError):
        if _LIKE_TURNS.match(value.lstrip()):
            raise RowRejected("bad-json", f"turns that are no JSON: {value[:60]!r}") from None
        return value
    if isinstance(turns, Mapping):
        name = turns.get("from") or turns.get("role")
        is_turn = (
            isinstance(name, str) and name.lower() in ROLES and not turns.keys().isdisjoint(_TEXTS)
        )
        return [turns] if is_turn else value
    is_listed = isinstance(turns, list) and all(
        isinstance(item, Mapping) and not item.keys().isdisjoint(_NAMES) for item in turns
    )
    return turns if turns and is_listed else value


def is_json_text(text: str) -> bool:
    """Whether `listed_turns` looks into the text."""
    return text.lstrip()[:1] in _JSON_STARTS


def _turn(role: str, value: Any, message: Row) -> Turn:
    """The turn of a message; tool calls follow its text as one line of JSON."""
    check_media(message, MEDIA)
    calls = given(message.get("tool_calls"), "tool_calls")
    if calls is None:
        calls = given(message.get("function_call"), "function_call")
    tools = tools_line(message) if role == "system" else ""
    text, thoughts = _content(value, allow_none=bool(calls is not None or tools))
    if tools:
        text = f"{text}\n\n{tools}" if text.strip() else tools
    names: tuple[str, ...] | None = None
    if calls is not None:
        listed = calls if isinstance(calls, list) else [calls]
        line = canonical_json({"tool_calls": [_tool_call(call) for call in listed]}, "tool_calls")
        text = f"{text}\n{line}" if text.strip() else line
        names = tuple(_id_text(call.get("id")) for call in listed)
    elif role == "tool":
        names = (_id_text(message.get("tool_call_id")),)
    names = names if names is not None and any(names) else None
    if role != "assistant":
        return (role, text, Marks(call_ids=names)) if names else (role, text)
    marks = Marks(_loss(message), reasoning_of(message, REASONING, thoughts), names)
    return (role, text) if marks == Marks() else (role, text, marks)


def tools_line(row: Row) -> str:
    """The tool definitions of a row or of a system message as one line of JSON; empty: none.

    Raises:
        RowRejected: bad-json or missing-field.
    """
    for key in TOOLS:
        tools = given(row.get(key), key)
        if tools is not None:
            return canonical_json({"tools": tools}, "tools")
    return ""


def _tool_call(call: Any) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowRejected("missing-field", "a tool call has no function name")
    arguments = decoded(function.get("arguments"), "arguments")
    return {"name": function["name"], "arguments": {} if arguments is None else arguments}


def _id_text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _loss(message: Row) -> bool | None:
    """False if the message is marked as one without a loss, else None.

    Raises:
        RowRejected: bad-mark.
    """
    for key in _LOSS_OF_PARTS:
        if not _is_empty(message.get(key)):
            raise RowRejected(
                "bad-mark", f"{key!r} marks parts of a turn; only turns can be marked"
            )
    found = {key: _flag(message[key], key) for key in _LOSS if key in message}
    flags = set(found.values()) - {None}
    if len(flags) > 1:
        raise RowRejected("bad-mark", f"the marks {found} contradict each other")
    return False if False in flags else None


def _flag(value: Any, where: str) -> bool | None:
    """A mark that says yes or no; None where it is empty."""
    if _is_empty(value):
        return None
    flag = _yes_or_no(value)
    if flag is None:
        raise RowRejected(
            "bad-mark", f"{where!r} holds {reprlib.repr(value)}; expected true, false, 1 or 0"
        )
    return flag


def _yes_or_no(value: Any) -> bool | None:
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def is_false(value: Any) -> bool:
    """Whether a mark says no, as false, 0 or text."""
    return _yes_or_no(value) is False


def reasoning_of(row: Row, keys: tuple[str, ...], more: list[str] | None = None) -> str | None:
    """What was thought before the answer: the different texts below these keys, and `more`.

    Raises:
        RowRejected: missing-field or media.
    """
    found = list(more or ())
    for key in keys:
        value = row.get(key)
        # Some rows say with true or false whether the model should think.
        if value is not None and not isinstance(value, bool) and not _is_empty(value):
            found.append(content_text(value))
    distinct = dict.fromkeys(text.strip("\r\n") for text in found if text.strip())
    return "\n\n".join(distinct) or None


def check_media(row: Row, keys: frozenset[str]) -> None:
    """Refuses a row, message or part that holds images, videos or sound.

    Raises:
        RowRejected: media.
    """
    if keys.isdisjoint(row):
        return
    for key in sorted(keys & row.keys()):
        # False and 0 say that there is none.
        if row[key] and not _is_empty(row[key]):
            raise RowRejected(
                "media", f"{key!r} holds something that is no text; drop it if the text is enough"
            )


def content_text(value: Any) -> str:
    """The text of a message's content: a string, or a list of text parts.

    Raises:
        RowRejected: missing-field or media.
    """
    return value if type(value) is str else _content(value)[0]


def _content(value: Any, allow_none: bool = False) -> tuple[str, list[str]]:
    """The text of a message's content, and the reasoning among its parts."""
    if type(value) is str:
        return value, []
    if value is None:
        if allow_none:
            return "", []
        raise RowRejected("missing-field", "a turn has no text")
    if not isinstance(value, list | Mapping):
        return as_text(value, "content"), []
    texts: list[str] = []
    thoughts: list[str] = []
    for part in [value] if isinstance(value, Mapping) else value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        kind = kind if isinstance(kind, str) else ""
        if isinstance(part, Mapping) and "text" not in kind:
            if _MEDIA_PART.search(kind):
                raise RowRejected(
                    "media", f"a turn holds a part of type {kind!r}; only text can be trained"
                )
            check_media(part, MEDIA)
        if kind in _REASONING_PART:
            thoughts.append(_thought(part))
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = kind or type(part).__name__
            raise RowRejected("missing-field", f"a turn holds a part that is not text: {kind}")
        texts.append(text)
    return "\n".join(texts), thoughts


def _thought(part: Row) -> str:
    """The text of a part with reasoning, which may itself be a list of text parts."""
    value = next((part[key] for key in (*REASONING, "text") if part.get(key) is not None), None)
    pieces = value if isinstance(value, list) else [value]
    texts: list[str] = []
    for piece in pieces:
        text = piece.get("text") if isinstance(piece, Mapping) else piece
        if not isinstance(text, str):
            raise RowRejected("missing-field", "a part with reasoning has no text")
        texts.append(text)
    return "\n".join(texts)


def as_text(value: Any, where: str) -> str:
    """A number or truth value as text.

    Raises:
        RowRejected: missing-field.
    """
    if isinstance(value, float) and value != value:
        raise RowRejected("missing-field", f"{where!r} holds no number and no text")
    if isinstance(value, bool | int | float):
        return str(value)
    raise RowRejected("missing-field", f"{where!r} holds a {type(value).__name__}, not text")


def given(value: Any, where: str) -> Any:
    """Tools or tool calls, decoded from JSON text; None where they are empty.

    Raises:
        RowRejected: bad-json.
    """
    value = decoded(value, where)
    if isinstance(value, str) and is_json_text(value):  # encoded twice
        value = decoded(value, where)
    if isinstance(value, list):
        value = [
            decoded(item, where) if isinstance(item, str) and is_json_text(item) else item
            for item in value
            if not _is_empty(item)
        ]
    return None if not value or _is_empty(value) else value


def _is_empty(value: Any, depth: int = 3) -> bool:
    """Whether a value says nothing: null, a blank text, not a number, or a list of such values."""
    if isinstance(value, str):
        return value.strip().lower() in _NOTHING
    if isinstance(value, list | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
        # Within a value only blank texts say nothing: a function may have the name "null".
        return all(
            not item.strip() if isinstance(item, str) else depth > 0 and _is_empty(item, depth - 1)
            for item in items
        )
    return value is None or value != value


def decoded(value: Any, where: str) -> Any:
    """The value of a JSON text (some writers put lists into strings); other values as they are.

    Raises:
        RowRejected: bad-json.
    """
    if isinstance(value, str):
        try:
            return without_nulls(json.loads(value))
        except ValueError:
            return value
        except RecursionError:
            raise RowRejected("bad-json", f"{where!r} is nested too deeply") from None
    return value


def canonical_json(value: Any, where: str) -> str:
    """The value as one line of JSON with sorted keys.

    Raises:
        RowRejected: bad-json or missing-field.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(", ", ": "))
    except RecursionError:
        raise RowRejected("bad-json", f"{where!r} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RowRejected(
            "missing-field", f"{where!r} cannot be written as JSON: {error}"
        ) from None
