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
    TOOLS,
    Row,
    as_text,
    chat,
    content_text,
    given,
    is_json_text,
    listed_turns,
    reasoning_of,
    role_of,
    tools_line,
)

Shape = Callable[[Row], list[Turn]]

ALPACA_RESPONSES = ("output", "response", "completion")
COMPLETIONS = ("completion", "response", "output")
ANSWERS = ("answer", "response", "output")
CONVERSATIONS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_REASONING = ("reasoning_content", "thinking")
_BESIDE = frozenset([*_SYSTEM, *TOOLS, *_REASONING])
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
    return "" if value is None or value != value else as_text(value, key)


def _first_key(row: Row, keys: Sequence[str]) -> str:
    """The first of the keys that has a value, else the first that is there, else the first."""
    for key in keys:
        if row.get(key) not in (None, ""):
            return key
    return next((key for key in keys if key in row), keys[0])


def _framed(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns with what stands beside them: system text, tool definitions, reasoning.

    The text beside, the system turns and the tools become one system turn later.
    """
    if row.keys().isdisjoint(_BESIDE):
        return turns
    text = next((value for key in _SYSTEM if (value := optional_text_of(row, key))), "")
    tools = tools_line(row)
    system = _system_turns(turns)
    if text.strip() and tools and not system:
        # White space at the end of the text stays before the tools: it is part of known ids.
        text, tools = f"{text}\n\n{tools}", ""
    beside: list[Turn] = [("system", text)] if text else []
    listed: list[Turn] = [("system", tools)] if tools else []
    talk = turns[len(system) :]
    reasoning = reasoning_of(row, _REASONING)
    if reasoning and talk and talk[-1][0] == "assistant":
        last = talk[-1]
        marks = last[2] if len(last) > 2 else Marks()
        talk[-1] = (last[0], last[1], marks._replace(reasoning=marks.reasoning or reasoning))
    return [*beside, *system, *listed, *talk]


def _system_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The system turns at the start."""
    return list(itertools.takewhile(lambda turn: turn[0] == "system", turns))


def prompt_side(row: Row, key: str) -> list[Turn]:
    """What was asked: a text, or turns as a list or as its JSON text."""
    value = listed_turns(row.get(key))
    return chat(value, key) if isinstance(value, list) else [("user", text_of(row, key))]


def answer_side(row: Row, key: str) -> list[Turn]:
    """What was answered: a text, or turns."""
    value = listed_turns(row.get(key))
    if isinstance(value, list):
        return _answered(chat(value, key), key)
    return [("assistant", text_of(row, key))]


def _answered(turns: list[Turn], key: str) -> list[Turn]:
    # Without an answer here, an earlier answer of the prompt would be trained instead.
    if all(turn[0] != "assistant" for turn in turns):
        raise RowRejected("missing-field", f"{key!r} has no assistant turn")
    return turns


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
    answer = text_of(row, _first_key(row, ALPACA_RESPONSES))
    return _framed(row, [*_history(row), _instruction(row), ("assistant", answer)])


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
    answer = text_of(row, _first_key(row, ANSWERS))
    return _framed(row, [_question(row), ("assistant", answer)])


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
    key = _first_key(row, ("messages", *CONVERSATIONS))
    value = given(row.get(key), key)
    turns = [] if value is None else chat(value, key)
    if turns and turns[-1][0] != "assistant":
        return turns
    # Some data sets also have the whole chosen conversation; what was asked is beside it.
    if row.get("prompt") is not None:
        return _history(row) + prompt_side(row, "prompt")
    if row.get("question") is not None:
        return [*_history(row), _question(row)]
    if row.get("instruction") is not None:
        return [*_history(row), _instruction(row)]
    return turns


def _human_assistant(text: str) -> list[Turn]:
    """Turns of a dialogue written as `Human: ... Assistant: ...` paragraphs."""
    parts = _HUMAN_ASSISTANT.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RowRejected("missing-field", "'chosen' is not a dialogue, and there is no 'prompt'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[name], text) for name, text in zip(parts[1::2], parts[2::2], strict=True)]
