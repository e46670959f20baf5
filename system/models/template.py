"""Renders conversations with a chat template and finds the assistant's part of the text.

The assistant's part is found by *prefix differences*.  What the template writes for `messages[:k]`
plus the generation prompt is what the model has read when it starts turn k; the rest is turn k.  A
turn ends with its end-of-turn token.  White space that the template writes after this token is
never generated, so it is not part of the turn.

Some tokenizers mark the start of every text (the dummy prefix of SentencePiece), so a text cannot
be tokenised in segments.  For them the text is tokenised as a whole and the mask follows character
offsets; a token that crosses the border counts as prompt.

Some templates rewrite earlier turns when a new turn is added (reasoning models drop old thoughts).
With them only the last response appears unchanged in the whole conversation, so only the last
assistant turn is in the mask.

A turn with `loss: false` is read but not in the mask.  Reasoning is given to the template under the
key that it knows; what it writes of the reasoning belongs to the response.

`system.models.chat` is the interface to this module.

L = tokens of a conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from system.errors import ConfigError, DataError, ModelError
from system.models.jinja_limits import LimitedTemplate, TemplateLimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""A turn as in `system.schema.MESSAGES`; only `role` and `content` must be there."""

_PROBE = (
    {"role": "user", "content": "Which city is the capital of France?"},
    {"role": "assistant", "content": "Paris is the capital."},
    {"role": "user", "content": "Of Italy?"},
    {"role": "assistant", "content": "Rome is."},
)
_OTHER_ANSWER = "Quite another answer, for comparison."
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Under these names chat templates take what the assistant thought before its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One conversation as the model sees it."""

    input_ids: np.ndarray
    """[L] int32."""
    response_mask: np.ndarray
    """[L] bool; true on tokens that the assistant produces, end-of-turn token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateProfile:
    """Properties of a tokenizer and its chat template, found with a probe conversation."""

    cuts_text: bool
    """Prompt and response can be tokenised separately without changing the text."""
    opens_as_prompted: bool
    """The generation prompt is a prefix of the rendered turn."""
    opening: str
    """What the template writes between the conversation so far and the answer; used only if
    `opens_as_prompted` is false."""
    keeps_history: bool
    """Adding a turn does not change the text of earlier turns."""
    reasoning_key: str
    """Under which name the template takes a turn's reasoning; empty: it does not render any."""
    keeps_reasoning: bool
    """Adding a turn does not change the text of earlier turns with reasoning."""
    end_marks: tuple[str, ...]
    """Special tokens; one of them may end a turn."""


@functools.lru_cache(maxsize=16)
def template_profile(tokenizer: PreTrainedTokenizerBase, chat_template: object) -> TemplateProfile:
    """Finds the properties of a template with a probe conversation, and checks its mask.

    Args:
        tokenizer: with a chat template.
        chat_template: `tokenizer.chat_template`; a part of the cache key.

    Raises:
        ModelError: there is no chat template; a rendered turn is not a prefix of the next, so no
            mask would be exact; or the mask of the probe is all true or all false.
    """
    if not chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: expected one, "
            "because without it nothing says where a response starts. Name a Jinja file in "
            "model.chat_template."
        )
    question, answer = _PROBE[:1], _PROBE[:2]
    prompt = render(tokenizer, question, prompt=True)
    single = render(tokenizer, answer)
    # What two different answers have in common is what the template writes before an answer.
    other = render(tokenizer, [*question, {"role": "assistant", "content": _OTHER_ANSWER}])
    opening = single[: _common_prefix(single, other)]
    bare = render(tokenizer, question)
    keeps_history = render(tokenizer, _PROBE).startswith(single)
    reasoning_key = next((k for k in _REASONING_KEYS if _shows_reasoning(tokenizer, k)), "")
    thought = [_with_thought(turn, reasoning_key) for turn in _PROBE]
    keeps_reasoning = render(tokenizer, thought).startswith(render(tokenizer, thought[:2]))
    opens_as_prompted = single.startswith(prompt)
    if not opens_as_prompted and not (opening.startswith(bare) and len(opening) > len(bare)):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} is not prefix-stable: expected the "
            "text of a question to be the start of the text of the question with its answer; "
            f"otherwise no response mask is exact. The question alone renders as {prompt!r}, with "
            f"the answer as {single!r}. Give another template in model.chat_template."
        )
    start = len(prompt) if opens_as_prompted else len(opening)
    # Some tokenizers list end-of-turn tokens only among the added tokens.
    marks = {str(token) for token in tokenizer.all_special_tokens}
    marks |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    profile = TemplateProfile(
        cuts_text=_can_cut(tokenizer, [single[:start], single[start:]]),
        opens_as_prompted=opens_as_prompted,
        opening=opening[len(bare) :],
        keeps_history=keeps_history,
        reasoning_key=reasoning_key,
        keeps_reasoning=keeps_history and keeps_reasoning,
        end_marks=tuple(sorted(marks)),
    )
    # Try the profile on the probe itself: a mistake shows here, once, and not in every row.
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
    """Renders the conversation; with `prompt`, up to the point where the next answer starts.

    Raises:
        DataError: the template refuses the conversation.
        ModelError: the template cannot be compiled.
        ConfigError: the template goes beyond a limit (see `system.models.jinja_limits`).
    """
    name = tokenizer.name_or_path
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise ModelError(f"the chat template of {name!r} cannot be chosen: {error}") from error
    template = compile_template(source, f"the chat template of {name!r}")
    if not messages:
        raise DataError(f"the chat template of {name!r} needs a conversation with a first turn")
    try:
        return template.render(
            [dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateLimitError as error:
        # Not an error of the row: no row may be rejected for a template that never ends.
        raise _beyond(f"the chat template of {name!r}", error) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever the code of the template raises
        roles = [message.get("role") for message in messages]
        raise DataError(
            f"the chat template of {name!r} refuses a conversation with the roles {roles}: "
            f"{type(error).__name__}: {error}. Leave such rows out or give another template in "
            "model.chat_template."
        ) from error


def _beyond(name: str, error: TemplateLimitError) -> ConfigError:
    return ConfigError(
        f"{name} {error}: expected one that renders a conversation in a few steps. Give another "
        "template in model.chat_template."
    )


@functools.lru_cache(maxsize=16)
def compile_template(source: str, name: str) -> LimitedTemplate:
    """Compiles a chat template.

    Args:
        source: text of the template.
        name: what it is, for the message.

    Raises:
        ModelError: the text is not a template, or is too long or nested too deeply.
    """
    try:
        return LimitedTemplate(source)
    except MemoryError:
        raise
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in line {line}"
        raise ModelError(
            f"{name} is not a Jinja template that can be used: {type(error).__name__}{where}: "
            f"{error}. Give another template in model.chat_template."
        ) from error


def check_template(source: str, name: str) -> None:
    """Renders a sample without a tokenizer, to find templates that fail on every conversation.

    Args:
        source: text of the template.
        name: what it is, for the message.

    Raises:
        ModelError: the text is not a template, or it fails on the sample.
        ConfigError: the template goes beyond a limit.
    """
    template = compile_template(source, name)
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    try:
        template.render(_PROBE, tools=None, documents=None, add_generation_prompt=True, **tokens)
    except TemplateLimitError as error:
        raise _beyond(name, error) from error
    except (jinja2.UndefinedError, MemoryError):
        return  # a special token that only the tokenizer knows
    except Exception as error:
        raise ModelError(
            f"{name} fails on a plain conversation: {type(error).__name__}: {error}. Give another "
            "template in model.chat_template."
        ) from error


def _with_thought(turn: dict[str, str], key: str) -> dict[str, str]:
    return turn | {key: _OTHER_ANSWER} if key and turn["role"] == "assistant" else turn


def _shows_reasoning(tokenizer: PreTrainedTokenizerBase, key: str) -> bool:
    try:
        text = render(tokenizer, [_with_thought(turn, key) for turn in _PROBE[:2]])
    except DataError:
        return False
    return _OTHER_ANSWER in text


def shown_turns(profile: TemplateProfile, messages: Sequence[Message]) -> list[dict[str, str]]:
    """The turns as the template gets them: role, text, and reasoning where it takes any."""
    shown = []
    for message in messages:
        turn = {"role": message["role"], "content": message["content"]}
        if profile.reasoning_key and message.get("reasoning"):
            turn[profile.reasoning_key] = message["reasoning"]
        shown.append(turn)
    return shown


def keeps_turns(profile: TemplateProfile, messages: Sequence[Message]) -> bool:
    """Whether the template writes earlier responses of these turns as it did at their time."""
    has_reasoning = any(message.get("reasoning") for message in messages)
    return profile.keeps_reasoning if has_reasoning else profile.keeps_history


def _common_prefix(left: str, right: str) -> int:
    for place, (one, two) in enumerate(zip(left, right, strict=False)):
        if one != two:
            return place
    return min(len(left), len(right))


@dataclass(frozen=True, slots=True)
class Segments:
    """A rendered conversation, cut at the start and end of each response."""

    texts: list[str]
    is_response: list[bool]
    """As long as `texts`; false on responses without a loss, too."""
    shows_reasoning: bool
    """Whether the reasoning of the learned turns, if there is any, is in the text."""


def cut_conversation(
    tokenizer: PreTrainedTokenizerBase, profile: TemplateProfile, messages: Sequence[Message]
) -> Segments:
    """The rendered conversation, cut where the assistant starts and ends.

    Raises:
        DataError: no assistant turn, or the template refuses the conversation.
        ModelError: the template rewrites what it wrote for the turns before.
    """
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            "expected a conversation with an assistant turn, found the roles "
            f"{[message['role'] for message in messages]}"
        )
    learned = [k for k in turns if messages[k].get("loss") is not False]
    if learned and learned[-1] < turns[-1]:
        # Nothing after the last learned turn is learned; a template may rewrite what is before.
        messages = messages[: learned[-1] + 1]
    text = render(tokenizer, shown_turns(profile, messages))
    texts, is_response, place = [], [], 0
    shows_reasoning = bool(profile.reasoning_key) or not any(m.get("reasoning") for m in messages)
    for k, start, end in response_spans(tokenizer, profile, messages, text):
        texts += [text[place:start], text[start:end]]
        is_response += [False, k in learned]
        reasoning = messages[k].get("reasoning") if k in learned else None
        shows_reasoning &= (reasoning or "").strip() in text[start:end]
        place = end
    if place < len(text):
        texts.append(text[place:])
        is_response.append(False)
    return Segments(texts, is_response, shows_reasoning)


def response_spans(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    messages: Sequence[Message],
    text: str,
) -> list[tuple[int, int, int]]:
    """The assistant's turns in the rendered text, in order: number, first character, end.

    Raises:
        DataError, ModelError: as `cut_conversation`.
    """
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not keeps_turns(profile, messages):
        turns = turns[-1:]
    shown = shown_turns(profile, messages)
    spans = []
    for k in turns:
        # `closed` is the text up to the end of turn k, rendered without the later turns.
        closed = text if k == len(messages) - 1 else render(tokenizer, shown[: k + 1])
        start = len(_opened(tokenizer, profile, shown[:k], closed))
        if not text.startswith(closed):
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path!r} is not prefix-stable: the first "
                f"{k + 1} turns alone render as {closed!r}, but the whole conversation as "
                f"{text!r}. Give another template in model.chat_template."
            )
        response = text[start : len(closed)]
        # White space after the end-of-turn token is never generated.
        bare = response.rstrip()
        if len(bare) < len(response) and bare.endswith(profile.end_marks):
            response = bare
        spans.append((k, start, start + len(response)))
    return spans


def _opened(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    before: Sequence[Mapping[str, str]],
    closed: str,
) -> str:
    """The text that the model has read when it starts the last turn of `closed`."""
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
    """Token ids of each text, without special tokens added."""
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return encoded["input_ids"]


def _can_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> bool:
    """Whether tokenising the texts separately gives the same text as tokenising them together."""
    apart = [token for ids in token_ids(tokenizer, texts) for token in ids]
    whole = token_ids(tokenizer, ["".join(texts)])[0]
    return _decoded(tokenizer, apart) == _decoded(tokenizer, whole)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    profile: TemplateProfile,
    rows: Sequence[Segments],
    max_length: int,
) -> Iterator[Encoded]:
    """Encodes conversations, each truncated to `max_length` tokens, with one tokenizer call.

    Raises:
        ModelError: neither segments nor character offsets give an exact mask.
    """
    if not rows:
        return
    if not profile.cuts_text:
        yield from _tokenise_by_offsets(tokenizer, rows, max_length)
        return
    segments = iter(token_ids(tokenizer, [text for row in rows for text in row.texts]))
    for row in rows:
        ids: list[int] = []
        mask: list[bool] = []
        for is_response in row.is_response:
            segment = next(segments)
            ids += segment
            mask += [is_response] * len(segment)
        yield Encoded(
            input_ids=np.array(ids[:max_length], dtype=np.int32),
            response_mask=np.array(mask[:max_length], dtype=bool),
        )


def _tokenise_by_offsets(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Segments], max_length: int
) -> Iterator[Encoded]:
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} marks the start of a text and has no "
            "character offsets, so an exact response mask is impossible. Use its fast version "
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
        segment = np.searchsorted(ends, offsets[:, 0], side="right").clip(max=len(ends) - 1)
        yield Encoded(
            input_ids=np.array(ids[:max_length], dtype=np.int32),
            response_mask=np.array(row.is_response, dtype=bool)[segment],
        )
