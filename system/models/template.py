"""What a chat template makes of a conversation: its text, cut where the assistant speaks.

The template renders text; the assistant's part of it is found by *prefix differences*: what the
template writes for `messages[:k]` plus the generation prompt is exactly what the model has read
when it starts turn k, so turn k is the rest.  A turn ends with its end-of-turn token; white space
that the template puts behind that token is never generated and never counts.

Tokenizers that mark the start of every text (SentencePiece's dummy prefix) cannot be given a text
in pieces; for them it is tokenised once and the mask follows character offsets, a token across the
border counting as prompt.

Templates that rewrite earlier turns when a new one arrives (reasoning models drop old thoughts)
have no response that the whole conversation contains word for word but the last: only the last
assistant turn is masked in for them.

L = tokens of a conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from system.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

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
    prompt = render(tokenizer, question, prompt=True)
    single = render(tokenizer, answer)
    other = render(tokenizer, [*question, {"role": "assistant", "content": _OTHER_ANSWER}])
    opening = single[: _common_prefix(single, other)]
    bare = render(tokenizer, question)
    keeps_history = render(tokenizer, _PROBE).startswith(single)
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
        tokenise(tokenizer, profile, [cut_conversation(tokenizer, profile, answer)], 2**20)
    ).response_mask
    if mask.all() or not mask.any():
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} gives a response mask with "
            f"{int(mask.sum())} of {len(mask)} tokens for the rendered sample {single!r}: expected "
            "some tokens of prompt and some of response. Give another template in "
            "model.chat_template."
        )
    return profile


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False
) -> str:
    """What the template writes; with `prompt`, up to where the next answer starts.

    Raises:
        DataError: the template refuses the conversation.
    """
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
class Pieces:
    """A rendered conversation cut at the borders of its responses."""

    texts: list[str]
    is_response: list[bool]
    """As long as `texts`."""


def cut_conversation(
    tokenizer: PreTrainedTokenizerBase, profile: TemplateProfile, messages: Sequence[Message]
) -> Pieces:
    """The rendered conversation, cut where the assistant starts and ends.

    Raises:
        DataError: no assistant turn, or the template refuses the conversation.
        ModelError: the template rewrites what it wrote for the turns before.
    """
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            "a conversation to train on needs an assistant turn; found the roles "
            f"{[message['role'] for message in messages]}"
        )
    text = render(tokenizer, messages)
    texts, is_response, place = [], [], 0
    for start, end in response_spans(tokenizer, profile, messages, text):
        texts += [text[place:start], text[start:end]]
        is_response += [False, True]
        place = end
    if place < len(text):
        texts.append(text[place:])
        is_response.append(False)
    return Pieces(texts, is_response)


def response_spans(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    messages: Sequence[Message],
    text: str,
) -> list[tuple[int, int]]:
    """Character ranges of the assistant's turns in the rendered text, in order.

    Raises:
        DataError, ModelError: as `cut_conversation`.
    """
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not profile.keeps_history:
        turns = turns[-1:]
    spans = []
    for k in turns:
        closed = text if k == len(messages) - 1 else render(tokenizer, messages[: k + 1])
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
        opened = render(tokenizer, before, prompt=True)
    else:
        opened = render(tokenizer, before) + profile.opening
    if not closed.startswith(opened):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} is not prefix-stable: before the "
            f"answer it writes {opened!r}, with the answer {closed!r}. Give another template in "
            "model.chat_template."
        )
    return opened


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return encoded["input_ids"]


def _can_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> bool:
    apart = [token for ids in token_ids(tokenizer, texts) for token in ids]
    whole = token_ids(tokenizer, ["".join(texts)])[0]
    return _decoded(tokenizer, apart) == _decoded(tokenizer, whole)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    rows: Sequence[Pieces],
    max_length: int,
) -> Iterator[Encoded]:
    """Conversations as the model sees them, cut off at `max_length` tokens; all in one call.

    Raises:
        ModelError: neither pieces nor character offsets give an exact mask.
    """
    if not rows:
        return
    if not profile.cuts_text:
        yield from _tokenise_by_offsets(tokenizer, rows, max_length)
        return
    pieces = iter(token_ids(tokenizer, [text for row in rows for text in row.texts]))
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
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Pieces], max_length: int
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
