"""The known formats of instruction data, and how the format of a file is detected.

`shapes.py` turns a row of each format into a list of turns.  `conversation.py` checks the turns and
brings their text into its normal form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from system.config import SourceConfig
from system.data.rows import shapes
from system.data.rows.conversation import RowRejected, Turn
from system.data.rows.shapes import Shape
from system.data.rows.turns import MEDIA, Row, check_media, is_false
from system.errors import DataError

_BAD_ANSWER = frozenset(["label", "kto_tag"])
"""Columns in which data sets of single answers say whether the answer is a good one."""
_MESSAGE_OF_A_TREE = {"message_id", "parent_id", "text", "role"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A known shape."""

    name: str
    keys: str
    """What its rows look like, for error messages."""
    recognises: Callable[[Row], bool]
    turns: Shape


def _has_any(row: Row, keys: Sequence[str]) -> bool:
    return any(key in row for key in keys)


def _is_list(row: Row, *keys: str) -> bool:
    values = [row.get(key) for key in keys]
    return any(
        isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
        for value in values
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="preference",
        keys="chosen, rejected [, prompt | messages | ...]",
        recognises=lambda row: "chosen" in row and "rejected" in row,
        turns=shapes.preference,
    ),
    Format(
        name="messages",
        keys="messages: [{role, content}, ...]",
        recognises=lambda row: _is_list(row, "messages"),
        turns=shapes.messages,
    ),
    Format(
        name="sharegpt",
        keys="conversations: [{from, value}, ...]",
        recognises=lambda row: _is_list(row, *shapes.CONVERSATIONS),
        turns=shapes.sharegpt,
    ),
    Format(
        name="threads",
        keys="data: [text, ...] or prompt: {text, role, replies}",
        recognises=lambda row: (
            isinstance(row.get("data"), list)
            or (isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"])
        ),
        turns=shapes.threads,
    ),
    Format(
        name="alpaca",
        keys="instruction [, input], output",
        recognises=lambda row: "instruction" in row and _has_any(row, shapes.ALPACA_RESPONSES),
        turns=shapes.alpaca,
    ),
    Format(
        name="prompt-completion",
        keys="prompt, completion",
        recognises=lambda row: "prompt" in row and _has_any(row, shapes.COMPLETIONS),
        turns=shapes.prompt_completion,
    ),
    Format(
        name="question-answer",
        keys="question, answer",
        recognises=lambda row: "question" in row and _has_any(row, shapes.ANSWERS),
        turns=shapes.question_answer,
    ),
)
"""The known formats; a row that fits several has the first of them."""


def columns_format(columns: Mapping[str, str]) -> Format:
    """The shape in which `columns` names the prompt, the response and perhaps the system text."""
    prompt, response, system = columns["prompt"], columns["response"], columns.get("system")

    def turns(row: Row) -> list[Turn]:
        before = [("system", shapes.optional_text_of(row, system))] if system is not None else []
        return before + shapes.prompt_side(row, prompt) + shapes.answer_side(row, response)

    return Format(
        name="columns",
        keys=", ".join(columns.values()),
        recognises=lambda row: prompt in row and response in row,
        turns=turns,
    )


def choose_format(source: SourceConfig, first_rows: Sequence[Row], where: str) -> Format:
    """The shape that the source names, else the one that most of a file's first rows have.

    Its function also refuses rows with media and rows that are marked as bad answers, unless the
    source uses the column for something else.

    Raises:
        DataError: no known shape fits; the message shows the keys found and the known shapes.
    """
    found = _found_format(source, first_rows, where)
    used = {
        source.category_column,
        source.answer_column,
        source.score_column,
        source.embedding_column,
        *source.columns.values(),
    }
    refused = (MEDIA | _BAD_ANSWER) - used

    def turns(row: Row) -> list[Turn]:
        if not refused.isdisjoint(row):
            check_media(row, MEDIA & refused)
            _check_answer(row, _BAD_ANSWER & refused)
        return found.turns(row)

    return replace(found, turns=turns)


def _check_answer(row: Row, keys: frozenset[str]) -> None:
    for key in keys & row.keys():
        # Numbers in `label` may be classes; the data sets with bad answers write true and false.
        value = row[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_false(value) and not (is_number and key == "label"):
            raise RowRejected("label-false", f"{key!r} says that the answer is a bad one")


def _found_format(source: SourceConfig, first_rows: Sequence[Row], where: str) -> Format:
    if source.format == "columns":
        return columns_format(source.columns)
    if source.format != "auto":
        return next(item for item in FORMATS if item.name == source.format)
    if first_rows and all(row.keys() >= _MESSAGE_OF_A_TREE for row in first_rows):
        raise DataError(
            f"{where}: expected a conversation a row, found one message of a tree a row "
            "(message_id, parent_id, text, role), as OpenAssistant's hub data sets have them. Join "
            "each tree's messages into one row `{prompt: {text, role, replies: [...]}}` (format "
            "`threads`; docs/data.md has the few lines that do it), or take a file of trees."
        )
    votes = Counter(
        next((item.name for item in FORMATS if item.recognises(row)), None) for row in first_rows
    )
    votes.pop(None, None)
    if not votes:
        keys = sorted({key for row in first_rows for key in row})
        known = "; ".join(f"{item.name} ({item.keys})" for item in FORMATS)
        raise DataError(
            f"{where}: unknown format. Its first rows have the keys {keys}, which fit none of the "
            f"known formats: {known}. Set `format` of this source, or `format: columns` with "
            "`columns: {prompt: ..., response: ...}`."
        )
    best = max(votes.values())
    return next(item for item in FORMATS if votes.get(item.name) == best)
