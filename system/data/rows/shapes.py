"""One function for each format: from a raw row to its turns.

Each takes a raw row (a dict from any reader) and returns turns with the roles system, user,
assistant and tool, or rejects the row with a reason.  A row may hold anything that JSON or Arrow
can hold.  A value that does not fit the format rejects that row and never ends the run.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from system.data.rows.conversation import Marks, RowRejected, Turn
from system.data.rows.turns import (
    Row,
    as_text,
    canonical_json,
    chat,
    content_text,
    given,
    is_json_text,
    listed_turns,
    reasoning_of,
    role_of,
)

Shape = Callable[[Row], list[Turn]]

ALPACA_RESPONSES = ("output", "response", "completion")
COMPLETIONS = ("completion", "response", "output")
ANSWERS = ("answer", "response", "output")
CONVERSATIONS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_REASONING = ("reasoning_content", "thinking")
_BESIDE = frozenset([*_SYSTEM, *_TOOLS, *_REASONING])
_HUMAN_ASSISTANT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")


def text_of(row: Row, key: str) -> str:
    """A text field that must be there."""
    value = row.get(key)
    if type(value) is str:
        return value
    if value is None:
        raise RowRejected("missing-field", f"no {key!r}; the row has {sorted(row)}")
    return as_text(value, key)


def optional_text_of(row: Row, key: str) -> str:
    """A text field that may be missing or null; empty then."""
    value = row.get(key)
    if type(value) is str:
        return value
    return "" if value is None else as_text(value, key)


def _first_key(row: Row, keys: Sequence[str]) -> str:
    """The first of the keys that has a value, else the first that is there, else the first."""
    for key in keys:
        if row.get(key) not in (None, ""):
            return key
    return next((key for key in keys if key in row), keys[0])


def _framed(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns with the system text and the tool definitions that stand beside them.

    They become one system turn later: the text beside, the system turns, the tools.
    """
    if row.keys().isdisjoint(_BESIDE):
        return turns
    text = next((value for key in _SYSTEM if (value := optional_text_of(row, key))), "")
    tools = next((value for key in _TOOLS if (value := given(row.get(key), key)) is not None), None)
    system = _system_turns(turns)
    beside: list[Turn] = [("system", text)] if text else []
    listed: list[Turn] = []
    if tools is not None:
        line = canonical_json({"tools": tools}, "tools")
        if text.strip() and not system:
            # White space at the end of the text stays before the tools: it is part of known ids.
            beside = [("system", f"{text}\n\n{line}")]
        else:
            listed = [("system", line)]
    return [*beside, *system, *listed, *turns[len(system) :]]


def _system_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The system turns at the start."""
    return list(itertools.takewhile(lambda turn: turn[0] == "system", turns))


def prompt_side(row: Row, key: str) -> list[Turn]:
    """What was asked: a text, or turns as a list or as its JSON text."""
    value = listed_turns(row.get(key))
    return chat(value, key) if isinstance(value, list) else [("user", text_of(row, key))]


def answer_side(row: Row, key: str) -> list[Turn]:
    """What was answered: a text, perhaps with reasoning beside it, or turns."""
    value = listed_turns(row.get(key))
    if isinstance(value, list):
        return _answered(chat(value, key), key)
    return [_text_answer(row, [key])]


def _answered(turns: list[Turn], key: str) -> list[Turn]:
    # Without an answer here, an earlier answer of the prompt would be trained instead.
    if all(turn[0] != "assistant" for turn in turns):
        raise RowRejected("missing-field", f"{key!r} has no assistant turn")
    return turns


def _text_answer(row: Row, keys: Sequence[str]) -> Turn:
    """What was answered, perhaps with reasoning beside it."""
    text = text_of(row, _first_key(row, keys))
    if row.keys().isdisjoint(_BESIDE):
        return ("assistant", text)
    reasoning = reasoning_of(row, _REASONING)
    return ("assistant", text, Marks(reasoning=reasoning)) if reasoning else ("assistant", text)


def _history(row: Row) -> list[Turn]:
    """Earlier questions and answers."""
    if not row.get("history"):
        return []
    history = given(row.get("history"), "history") or []
    if not isinstance(history, list):
        raise RowRejected("missing-field", "'history' is not a list of [question, answer]")
    turns: list[Turn] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRejected("missing-field", "'history' is not a list of [question, answer]")
        turns += [("user", content_text(pair[0])), ("assistant", content_text(pair[1]))]
    return turns


def _instruction(row: Row) -> Turn:
    """`instruction`, with `input` or `context` after it."""
    instruction = text_of(row, "instruction")
    extra = optional_text_of(row, "input") or optional_text_of(row, "context")
    if extra and not extra.isspace():
        instruction = f"{instruction.rstrip()}\n\n{extra}" if instruction.strip() else extra
    return ("user", instruction)


def _question(row: Row) -> Turn:
    """`question`, with `context` before it."""
    question = text_of(row, "question")
    context = optional_text_of(row, "context")
    if context and not context.isspace():
        question = f"{context.rstrip()}\n\n{question}"
    return ("user", question)


def alpaca(row: Row) -> list[Turn]:
    """`instruction`, perhaps with `input`, `output`, and `history` before them."""
    answer = _text_answer(row, ALPACA_RESPONSES)
    return _framed(row, [*_history(row), _instruction(row), answer])


def prompt_completion(row: Row) -> list[Turn]:
    """`prompt` and `completion`, each a text or turns."""
    prompt, completion = row.get("prompt"), row.get("completion")
    is_plain = row.keys().isdisjoint(_BESIDE)
    if (
        is_plain
        and type(prompt) is str
        and type(completion) is str
        and completion
        and not is_json_text(prompt)
        and not is_json_text(completion)
    ):
        return [("user", prompt), ("assistant", completion)]
    answer = answer_side(row, _first_key(row, COMPLETIONS))
    return _framed(row, prompt_side(row, "prompt") + answer)


def question_answer(row: Row) -> list[Turn]:
    """`question`, perhaps with `context` before it, and `answer`."""
    return _framed(row, [_question(row), _text_answer(row, ANSWERS)])


def sharegpt(row: Row) -> list[Turn]:
    """`conversations` of `from` and `value`; with a `chosen` answer, that is the last."""
    if _has_choice(row):
        return preference(row)
    key = _first_key(row, CONVERSATIONS)
    return _framed(row, chat(row.get(key), key))


def messages(row: Row) -> list[Turn]:
    """`messages` of `role` and `content`; with a `chosen` answer, that is the last."""
    if _has_choice(row):
        return preference(row)
    return _framed(row, chat(row.get("messages"), "messages"))


def _has_choice(row: Row) -> bool:
    return row.get("chosen") is not None and "rejected" in row


def threads(row: Row) -> list[Turn]:
    """UltraChat's `data` (user first, alternating) or the best path of an OpenAssistant tree."""
    if "data" in row:
        texts = row["data"]
        if not isinstance(texts, list):
            raise RowRejected("missing-field", "'data' is not a list of turns")
        if texts and isinstance(texts[0], Mapping):
            return _framed(row, chat(texts, "data"))
        roles = itertools.cycle(("user", "assistant"))
        pairs = zip(roles, map(content_text, texts), strict=False)
        return _framed(row, list(pairs))
    turns: list[Turn] = []
    node = row.get("prompt")
    while isinstance(node, Mapping):
        turns.append((role_of(node.get("role"), "prompt"), text_of(node, "text")))
        node = _best_reply(node.get("replies") or [])
    if not turns:
        found = "one message of a tree" if "parent_id" in row else "no thread"
        raise RowRejected("missing-field", f"{found} in the row; it has {sorted(row)}")
    return _framed(row, turns)


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
    """The chosen side of a preference pair, after what was asked.

    `chosen` is a text, turns that follow what was asked, or the whole conversation.
    """
    chosen = listed_turns(row.get("chosen"))
    asked = _asked(row)
    if isinstance(chosen, list):
        turns = _answered(chat(chosen, "chosen"), "chosen")
    elif asked:
        turns = [("assistant", text_of(row, "chosen"))]
    else:
        return _framed(row, _human_assistant(text_of(row, "chosen")))
    if turns[0][0] in ("assistant", "tool"):
        if asked and asked[-1][0] == "assistant":
            if asked[-1] != turns[0]:
                raise RowRejected(
                    "wrong-role-order", "what stands before 'chosen' ends with another answer"
                )
            del asked[-1]
        return _framed(row, asked + turns)
    # A whole conversation, which may begin with the last question.
    system, talk = _system_turns(asked), asked[len(_system_turns(asked)) :]
    own, body = _system_turns(turns), turns[len(_system_turns(turns)) :]
    if talk and body[: len(talk)] != talk and talk[-1] == body[0]:
        body = talk[:-1] + body
    return _framed(row, system + own + body)


def _asked(row: Row) -> list[Turn]:
    """The prompt side of a preference pair; empty where `chosen` holds all of it."""
    if row.get("prompt") is not None:
        return _history(row) + prompt_side(row, "prompt")
    if row.get("question") is not None:
        return [*_history(row), _question(row)]
    if row.get("instruction") is not None:
        return [*_history(row), _instruction(row)]
    key = _first_key(row, ("messages", *CONVERSATIONS))
    value = given(row.get(key), key)
    return [] if value is None else chat(value, key)


def _human_assistant(text: str) -> list[Turn]:
    """Turns of a dialogue written as `Human: ... Assistant: ...` paragraphs."""
    parts = _HUMAN_ASSISTANT.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RowRejected("missing-field", "'chosen' is not a dialogue, and there is no 'prompt'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[name], text) for name, text in zip(parts[1::2], parts[2::2], strict=True)]
