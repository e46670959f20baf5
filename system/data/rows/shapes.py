"""One function for each format: from a raw row to its turns.

Each takes a raw row (a dict from any reader) and returns turns `(role, text)` with the roles
system, user, assistant and tool, or rejects the row with a reason.  A row may hold anything that
JSON or Arrow can hold.  A value that does not fit the format rejects that row and never ends the
run.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from system.data.rows.conversation import RowRejected, Turn
from system.foreign_tables import without_nulls

Row = Mapping[str, Any]
Shape = Callable[[Row], list[Turn]]

_ROLES = {
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
ALPACA_RESPONSES = ("output", "response", "completion")
COMPLETIONS = ("completion", "response", "output")
ANSWERS = ("answer", "response", "output")
CONVERSATIONS = ("conversations", "conversation")
_BESIDE = frozenset({"system", "system_prompt", "tools"})
_HUMAN_ASSISTANT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")


def text_of(row: Row, key: str) -> str:
    """A text field that must be there."""
    value = row.get(key)
    if type(value) is str:
        return value
    if value is None:
        raise RowRejected("missing-field", f"no {key!r}; the row has {sorted(row)}")
    return _as_text(value, key)


def optional_text_of(row: Row, key: str) -> str:
    """A text field that may be missing or null; empty then."""
    value = row.get(key)
    if type(value) is str:
        return value
    return "" if value is None else _as_text(value, key)


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, bool | int | float):
        return str(value)
    raise RowRejected("missing-field", f"{where!r} holds a {type(value).__name__}, not text")


def _first_key(row: Row, keys: Sequence[str]) -> str:
    """The first of the keys that has a value, else the first that is there, else the first."""
    for key in keys:
        if row.get(key) not in (None, ""):
            return key
    return next((key for key in keys if key in row), keys[0])


def _system_turns(row: Row, *keys: str) -> list[Turn]:
    """System text and tool definitions that stand beside the conversation."""
    if row.keys().isdisjoint(_BESIDE):
        return []
    text = next((value for key in keys if (value := optional_text_of(row, key))), "")
    tools = row.get("tools")
    if tools:
        listed = _canonical_json({"tools": _decoded(tools, "tools")}, "tools")
        text = f"{text}\n\n{listed}" if text.strip() else listed
    return [("system", text)] if text else []


def alpaca(row: Row) -> list[Turn]:
    """`instruction`, perhaps with `input`, `output`, and `history` before them."""
    turns = _system_turns(row, "system", "system_prompt")
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowRejected("missing-field", "'history' is not a list of [question, answer]")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRejected("missing-field", "'history' is not a list of [question, answer]")
        turns += [("user", _content(pair[0])), ("assistant", _content(pair[1]))]
    instruction = text_of(row, "instruction")
    extra = optional_text_of(row, "input") or optional_text_of(row, "context")
    if extra and not extra.isspace():
        instruction = f"{instruction.rstrip()}\n\n{extra}" if instruction.strip() else extra
    turns.append(("user", instruction))
    turns.append(("assistant", text_of(row, _first_key(row, ALPACA_RESPONSES))))
    return turns


def prompt_completion(row: Row) -> list[Turn]:
    """`prompt` and `completion`, each a text or a list of messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    is_plain = row.keys().isdisjoint(_BESIDE)
    if is_plain and type(prompt) is str and type(completion) is str and completion:
        return [("user", prompt), ("assistant", completion)]
    answer_key = _first_key(row, COMPLETIONS)
    turns = _system_turns(row, "system", "system_prompt")
    turns += _chat(prompt) if isinstance(prompt, list) else [("user", text_of(row, "prompt"))]
    answer = row.get(answer_key)
    if isinstance(answer, list):
        return turns + _chat(answer)
    return [*turns, ("assistant", text_of(row, answer_key))]


def question_answer(row: Row) -> list[Turn]:
    """`question`, perhaps with `context` before it, and `answer`."""
    question = text_of(row, "question")
    context = optional_text_of(row, "context")
    if context and not context.isspace():
        question = f"{context.rstrip()}\n\n{question}"
    return [
        *_system_turns(row, "system", "system_prompt"),
        ("user", question),
        ("assistant", text_of(row, _first_key(row, ANSWERS))),
    ]


def sharegpt(row: Row) -> list[Turn]:
    """`conversations` of `from` and `value`."""
    key = _first_key(row, CONVERSATIONS)
    return _system_turns(row, "system", "system_prompt") + _chat(row.get(key), key)


def messages(row: Row) -> list[Turn]:
    """`messages` of `role` and `content`."""
    return _system_turns(row, "system", "system_prompt") + _chat(row.get("messages"), "messages")


def _chat(messages: Any, where: str = "messages") -> list[Turn]:
    """Turns from a list of OpenAI messages or of ShareGPT turns, mixed spellings allowed."""
    messages = _decoded(messages, where)
    if not isinstance(messages, list):
        found = "nothing" if messages is None else type(messages).__name__
        raise RowRejected("missing-field", f"{where!r}: expected a list of turns, found {found}")
    turns: list[Turn] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RowRejected("missing-field", f"{where!r} holds a {type(message).__name__}")
        name = message.get("from") or message.get("role") or message.get("user")
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise RowRejected("wrong-role-order", f"unknown role {reprlib.repr(name)} in {where!r}")
        turns.append((role, _message_text(message)))
    return turns


def _message_text(message: Row) -> str:
    """The text of a message; tool calls follow it as one line of JSON."""
    value = message.get("value")
    if value is None:
        value = message.get("content")
    if value is None:
        value = message.get("text")
    calls = message.get("tool_calls") or message.get("function_call")
    text = value if type(value) is str else _content(value, allow_none=bool(calls))
    if not calls:
        return text
    calls = _decoded(calls, "tool_calls")
    listed = [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    line = _canonical_json({"tool_calls": listed}, "tool_calls")
    return f"{text}\n{line}" if text.strip() else line


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowRejected("missing-field", "a tool call has no function name")
    arguments = _decoded(function.get("arguments", {}), "arguments")
    return {"name": function["name"], "arguments": arguments}


def _decoded(value: Any, where: str) -> Any:
    """The value of a JSON text (some writers put lists into strings); other values as they are."""
    if isinstance(value, str):
        try:
            return without_nulls(json.loads(value))
        except ValueError:
            return value
        except RecursionError:
            raise RowRejected("bad-json", f"{where!r} is nested too deeply") from None
    return value


def _canonical_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(", ", ": "))
    except RecursionError:
        raise RowRejected("bad-json", f"{where!r} is nested too deeply") from None
    except TypeError as error:
        raise RowRejected(
            "missing-field", f"{where!r} cannot be written as JSON: {error}"
        ) from None


def _content(value: Any, allow_none: bool = False) -> str:
    """The text of a message's content: a string, or a list of text parts."""
    if type(value) is str:
        return value
    if value is None:
        if allow_none:
            return ""
        raise RowRejected("missing-field", "a turn has no text")
    if isinstance(value, list):
        parts = []
        for part in value:
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, Mapping) else None
                kind = kind if isinstance(kind, str) else type(part).__name__
                raise RowRejected("missing-field", f"a turn holds a part that is not text: {kind}")
            parts.append(text)
        return "\n".join(parts)
    return _as_text(value, "content")


def threads(row: Row) -> list[Turn]:
    """UltraChat's `data` (user first, alternating) or the best path of an OpenAssistant tree."""
    if "data" in row:
        texts = row["data"]
        if not isinstance(texts, list):
            raise RowRejected("missing-field", "'data' is not a list of turns")
        if texts and isinstance(texts[0], Mapping):
            return _chat(texts, "data")
        return [(("user", "assistant")[k % 2], _content(text)) for k, text in enumerate(texts)]
    turns: list[Turn] = []
    node = row.get("prompt")
    while isinstance(node, Mapping):
        name = node.get("role")
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise RowRejected("wrong-role-order", f"unknown role {reprlib.repr(name)} in a thread")
        turns.append((role, text_of(node, "text")))
        node = _best_reply(node.get("replies") or [])
    if not turns:
        found = "one message of a tree" if "parent_id" in row else "no thread"
        raise RowRejected("missing-field", f"{found} in the row; it has {sorted(row)}")
    return turns


def _best_reply(replies: Any) -> Any:
    """The reply that people ranked best; unranked ones come after, in their order."""
    if not isinstance(replies, list):
        raise RowRejected(
            "missing-field", f"'replies' holds a {type(replies).__name__}, not a list"
        )
    living = [reply for reply in replies if isinstance(reply, Mapping) and not reply.get("deleted")]

    def rank(reply: Row) -> float:
        value = reply.get("rank")
        return value if isinstance(value, int | float) else math.inf

    return min(living, key=rank) if living else None


def preference(row: Row) -> list[Turn]:
    """The chosen side of a preference pair."""
    chosen = _listed_turns(row.get("chosen"))
    beside = _system_turns(row, "system", "system_prompt")
    prompt = row.get("prompt", row.get("question", row.get("instruction")))
    if isinstance(chosen, list):
        turns = _chat(chosen, "chosen")
        if prompt is None or any(role == "user" for role, _ in turns):
            return beside + turns
    elif prompt is None:
        return beside + _human_assistant(text_of(row, "chosen"))
    else:
        turns = [("assistant", text_of(row, "chosen"))]
    before = _chat(prompt, "prompt") if isinstance(prompt, list) else [("user", _content(prompt))]
    return [*beside, *before, *turns]


def _listed_turns(value: Any) -> Any:
    """Turns as a list, where the value is one turn or the JSON text of several.

    Any other JSON text is what was answered, and stays as it is.
    """
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            turns = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if turns and all(
            isinstance(item, Mapping) and {"role", "from"} & set(item) for item in turns
        ):
            return turns
    return value


def _human_assistant(text: str) -> list[Turn]:
    """Turns of a dialogue written as `Human: ... Assistant: ...` paragraphs."""
    parts = _HUMAN_ASSISTANT.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RowRejected("missing-field", "'chosen' is not a dialogue, and there is no 'prompt'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[name], text) for name, text in zip(parts[1::2], parts[2::2], strict=True)]
