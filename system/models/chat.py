"""Conversations to token ids, with the exact mask of what the assistant says.

The template renders text; the assistant's part of it is found by *prefix differences*: what the
template writes for `messages[:k]` plus the generation prompt is exactly what the model has read
when it starts turn k, so turn k is the rest.  A turn ends with its end-of-turn token; white space
that the template puts behind that token is never generated and never counts.

Prompt and response are tokenised apart, as they are when the model answers: no token ever spans
the border, and training sees the very prompt tokens that `encode_prompt` gives at inference.
Tokenizers that mark the start of every text (SentencePiece's dummy prefix) cannot be cut that way;
for them the text is tokenised once and the mask follows character offsets, a token across the
border counting as prompt.

Templates that rewrite earlier turns when a new one arrives (reasoning models drop old thoughts)
have no response that the whole conversation contains word for word but the last: only the last
assistant turn is masked in for them.

L = tokens of a conversation.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow as pa

from system import schema
from system.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

_BATCH_ROWS = 2048
_PROBE = (
    {"role": "user", "content": "Which city is the capital of France?"},
    {"role": "assistant", "content": "Paris is the capital."},
    {"role": "user", "content": "Of Italy?"},
    {"role": "assistant", "content": "Rome is."},
)
_OTHER_ANSWER = "Quite another answer, for comparison."


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One conversation as the model sees it."""

    input_ids: np.ndarray
    """[L] int32."""
    response_mask: np.ndarray
    """[L] bool; true on tokens that the assistant produces, end-of-turn token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateProfile:
    """What the probe conversation told about a tokenizer and its chat template."""

    cuts_text: bool
    """Prompt and response can be tokenised apart without changing the text."""
    opens_as_prompted: bool
    """The generation prompt is a prefix of the rendered turn."""
    opening: str
    """What the template writes before the answer in the last turn, beyond the conversation so far;
    used only where `opens_as_prompted` is false."""
    keeps_history: bool
    """A later turn leaves earlier ones as they were."""
    end_marks: tuple[str, ...]
    """Special tokens: a turn ends with one of these, if with any."""


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> Encoded:
    """One conversation, truncated at the end to `max_length` tokens.

    Raises:
        ModelError: the chat template cannot be trained on (see `template_profile`).
        DataError: the template refuses this conversation, or it has no assistant turn.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    pieces = _pieces(tokenizer, profile, messages)
    return next(_tokenise(tokenizer, profile, [pieces], max_length))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> list[int]:
    """What the model reads before it writes the last assistant turn: the turns before it and the
    generation prompt.  A prompt longer than `max_length` keeps its end.

    Raises:
        ModelError, DataError: as `encode`.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    turns = [dict(message) for message in messages]
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    text = _render(tokenizer, turns, prompt=True)
    cuts = [0]
    if profile.cuts_text and profile.opens_as_prompted and profile.keeps_history:
        for start, end in _spans(tokenizer, profile, turns, text):
            cuts += [start, end]
    ids: list[int] = []
    for low, high in pairwise([*cuts, len(text)]):
        ids += _ids(tokenizer, [text[low:high]])[0]
    return ids[-max_length:]


def encode_table(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[pa.Table, dict[str, int]]:
    """A CORPUS or SELECTION table as a TOKENS table, and what had to be left out.

    Args:
        table: columns `id`, `category`, `messages`; order is kept.
        tokenizer: with a chat template.
        max_length: tokens of a row, prompt and response together; longer ones lose their end.

    Returns:
        The TOKENS table and counts by reason: `template-refused` (the template raised, as on a
        system turn it does not know), `not-prefix-stable` (it rewrites this conversation's text)
        and `no-response-token` (truncation left nothing of the response).

    Raises:
        ModelError: the chat template cannot be trained on.
    """
    rows, kept, lost = encode_rows(table, tokenizer, max_length)
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    empty = np.zeros(0, dtype=np.int32)
    ids = np.concatenate([row.input_ids for row in rows] or [empty])
    masks = np.concatenate([row.response_mask for row in rows] or [empty.astype(bool)])
    index = pa.array(kept, type=pa.int64())
    columns = [
        table.column("id").take(index),
        table.column("category").take(index),
        pa.ListArray.from_arrays(offsets, pa.array(ids)),
        pa.ListArray.from_arrays(offsets, pa.array(masks)),
    ]
    tokens = pa.Table.from_arrays(columns, names=schema.TOKENS.names)
    return schema.check_table(tokens, schema.TOKENS, "encoded conversations"), dict(
        Counter(lost.values())
    )


def encode_rows(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Encoded], list[int], dict[int, str]]:
    """As `encode_table`, row by row: encodings, their row numbers, reasons of the others."""
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    lost: dict[int, str] = {}
    rows: list[Encoded] = []
    kept: list[int] = []
    first = 0
    for batch in table.select(["messages"]).to_batches(max_chunksize=_BATCH_ROWS):
        pieces, numbers = [], []
        for number, messages in enumerate(batch.column(0).to_pylist(), start=first):
            try:
                pieces.append(_pieces(tokenizer, profile, messages))
                numbers.append(number)
            except DataError:
                lost[number] = "template-refused"
            except ModelError:  # the probe was stable, so this is about what the row says
                lost[number] = "not-prefix-stable"
        first += batch.num_rows
        encoded = _tokenise(tokenizer, profile, pieces, max_length)
        for number, row in zip(numbers, encoded, strict=True):
            if row.response_mask[1:].any():
                rows.append(row)
                kept.append(number)
            else:
                lost[number] = "no-response-token"
    return rows, kept, lost


@functools.lru_cache(maxsize=16)
def template_profile(tokenizer: PreTrainedTokenizerBase, chat_template: object) -> TemplateProfile:
    """What a probe conversation tells about the template, checked to give a usable mask.

    Args:
        tokenizer: with a chat template.
        chat_template: `tokenizer.chat_template`; part of the key under which this is cached.

    Raises:
        ModelError: no chat template; rendered turns are not prefixes of one another, so no mask
            would be exact; the mask of the probe is all true or has no true token.
    """
    if not chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: without one it is "
            "unknown where a response starts. Name a Jinja file in model.chat_template."
        )
    question, answer = _PROBE[:1], _PROBE[:2]
    prompt = _render(tokenizer, question, prompt=True)
    single = _render(tokenizer, answer)
    other = _render(tokenizer, [*question, {"role": "assistant", "content": _OTHER_ANSWER}])
    opening = single[: _common_prefix(single, other)]
    bare = _render(tokenizer, question)
    keeps_history = _render(tokenizer, _PROBE).startswith(single)
    opens_as_prompted = single.startswith(prompt)
    if not opens_as_prompted and not (opening.startswith(bare) and len(opening) > len(bare)):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} is not prefix-stable: what it writes "
            "for a question is not how it starts the question with its answer, so no response mask "
            f"would be exact. The question alone renders as {prompt!r}, with the answer as "
            f"{single!r}. Give another template in model.chat_template."
        )
    start = len(prompt) if opens_as_prompted else len(opening)
    marks = {str(token) for token in tokenizer.all_special_tokens}
    marks |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    profile = TemplateProfile(
        cuts_text=_can_cut(tokenizer, [single[:start], single[start:]]),
        opens_as_prompted=opens_as_prompted,
        opening=opening[len(bare) :],
        keeps_history=keeps_history,
        end_marks=tuple(sorted(marks)),
    )
    mask = next(
        _tokenise(tokenizer, profile, [_pieces(tokenizer, profile, answer)], 2**20)
    ).response_mask
    if mask.all() or not mask.any():
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} gives a response mask with "
            f"{int(mask.sum())} of {len(mask)} tokens for the rendered sample {single!r}: expected "
            "some tokens of prompt and some of response. Give another template in "
            "model.chat_template."
        )
    return profile


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False
) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        roles = [message.get("role") for message in messages]
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a conversation with the "
            f"roles {roles}: {error}. Leave such rows out or give another template in "
            "model.chat_template."
        ) from error
    return text


def _common_prefix(left: str, right: str) -> int:
    for place, (one, two) in enumerate(zip(left, right, strict=False)):
        if one != two:
            return place
    return min(len(left), len(right))


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A rendered conversation cut at the borders of its responses."""

    texts: list[str]
    is_response: list[bool]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, profile: TemplateProfile, messages: Sequence[Message]
) -> _Pieces:
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            "a conversation to train on needs an assistant turn; found the roles "
            f"{[message['role'] for message in messages]}"
        )
    text = _render(tokenizer, messages)
    texts, is_response, place = [], [], 0
    for start, end in _spans(tokenizer, profile, messages, text):
        texts += [text[place:start], text[start:end]]
        is_response += [False, True]
        place = end
    if place < len(text):
        texts.append(text[place:])
        is_response.append(False)
    return _Pieces(texts, is_response)


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    messages: Sequence[Message],
    text: str,
) -> list[tuple[int, int]]:
    """Character ranges of the assistant's turns in the rendered text, in order."""
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not profile.keeps_history:
        turns = turns[-1:]
    spans = []
    for k in turns:
        closed = text if k == len(messages) - 1 else _render(tokenizer, messages[: k + 1])
        start = len(_opened(tokenizer, profile, messages[:k], closed))
        if not text.startswith(closed):
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path!r} is not prefix-stable: the first "
                f"{k + 1} turns alone render as {closed!r}, but the whole conversation as "
                f"{text!r}. Give another template in model.chat_template."
            )
        said = text[start : len(closed)]
        bare = said.rstrip()
        if len(bare) < len(said) and bare.endswith(profile.end_marks):
            said = bare
        spans.append((start, start + len(said)))
    return spans


def _opened(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    before: Sequence[Message],
    closed: str,
) -> str:
    """What the model has read when it starts the turn that completes `closed`."""
    if profile.opens_as_prompted:
        opened = _render(tokenizer, before, prompt=True)
    else:
        opened = _render(tokenizer, before) + profile.opening
    if not closed.startswith(opened):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} is not prefix-stable: before the "
            f"answer it writes {opened!r}, with the answer {closed!r}. Give another template in "
            "model.chat_template."
        )
    return opened


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return encoded["input_ids"]


def _can_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> bool:
    apart = [token for ids in _ids(tokenizer, texts) for token in ids]
    whole = _ids(tokenizer, ["".join(texts)])[0]
    return _decoded(tokenizer, apart) == _decoded(tokenizer, whole)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def _tokenise(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    rows: Sequence[_Pieces],
    max_length: int,
) -> Iterator[Encoded]:
    if not rows:
        return
    if not profile.cuts_text:
        yield from _tokenise_by_offsets(tokenizer, rows, max_length)
        return
    pieces = iter(_ids(tokenizer, [text for row in rows for text in row.texts]))
    for row in rows:
        ids: list[int] = []
        mask: list[bool] = []
        for is_response in row.is_response:
            piece = next(pieces)
            ids += piece
            mask += [is_response] * len(piece)
        yield Encoded(
            input_ids=np.array(ids[:max_length], dtype=np.int32),
            response_mask=np.array(mask[:max_length], dtype=bool),
        )


def _tokenise_by_offsets(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[_Pieces], max_length: int
) -> Iterator[Encoded]:
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} marks the start of a text and gives no "
            "character offsets, so no exact response mask can be made. Use its fast version "
            "(tokenizer.json)."
        )
    encoded: Any = tokenizer(
        ["".join(row.texts) for row in rows],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    for row, ids, pairs in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        offsets = np.array(pairs[:max_length], dtype=np.int64).reshape(-1, 2)
        ends = np.cumsum([len(text) for text in row.texts])
        piece = np.searchsorted(ends, offsets[:, 0], side="right").clip(max=len(ends) - 1)
        yield Encoded(
            input_ids=np.array(ids[:max_length], dtype=np.int32),
            response_mask=np.array(row.is_response, dtype=bool)[piece],
        )
