"""Encodes conversations as token ids, with an exact mask of the assistant's tokens.

Prompt and response are tokenised separately, as they are when the model generates an answer.  So no
token crosses the border between them, and training sees the same prompt tokens as `encode_prompt`
gives at inference.  `system.models.template` finds the border in the chat template.

L = tokens of a conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from system import schema
from system.errors import DataError, ModelError
from system.models.template import (
    Encoded,
    Message,
    cut_conversation,
    keeps_turns,
    render,
    response_spans,
    shown_turns,
    template_profile,
    token_ids,
    tokenise,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 2048


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> Encoded:
    """Encodes one conversation; tokens after the first `max_length` are cut off.

    Raises:
        ModelError: the chat template cannot be trained on (see `template_profile`).
        DataError: the template refuses the conversation or does not render its reasoning, or it
            has no assistant turn.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    segments = cut_conversation(tokenizer, profile, messages)
    if not segments.shows_reasoning:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} does not render the reasoning of a "
            "turn. Give another template in model.chat_template, or set ingest.reasoning: drop."
        )
    return next(tokenise(tokenizer, profile, [segments], max_length))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> list[int]:
    """Encodes what the model reads before it generates the last assistant turn.

    That is all earlier turns and the generation prompt.  Of a prompt with more than `max_length`
    tokens the last ones are kept.

    Raises:
        ModelError, DataError: as `encode`.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    turns = list(messages)
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    text = render(tokenizer, shown_turns(profile, turns), prompt=True)
    # Cut at earlier responses, where training cuts too; otherwise tokens could differ there.
    cuts = [0]
    if profile.cuts_text and profile.opens_as_prompted and keeps_turns(profile, turns):
        for _, start, end in response_spans(tokenizer, profile, turns, text):
            cuts += [start, end]
    ids: list[int] = []
    for low, high in pairwise([*cuts, len(text)]):
        ids += token_ids(tokenizer, [text[low:high]])[0]
    return ids[-max_length:]


def encode_table(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[pa.Table, dict[str, int]]:
    """Encodes a CORPUS or SELECTION table as a TOKENS table.

    Args:
        table: columns `id`, `category`, `messages`; order is kept.
        tokenizer: with a chat template.
        max_length: most tokens of a row, prompt and response together; the rest is cut off.

    Returns:
        The TOKENS table, and the number of rows left out by reason: `template-refused` (the
        template raised an error, for example on a system turn), `not-prefix-stable` (the template
        rewrites the text of this conversation), `reasoning-not-rendered` (the template does not
        write the reasoning) and `no-response-token` (the response was cut off).

    Raises:
        ModelError: the chat template cannot be trained on.
    """
    rows, kept_rows, reason_of = encode_rows(table, tokenizer, max_length)
    # Built from flat arrays: a Python list for each token would be many times slower.
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    empty = np.zeros(0, dtype=np.int32)
    ids = np.concatenate([row.input_ids for row in rows] or [empty])
    masks = np.concatenate([row.response_mask for row in rows] or [empty.astype(bool)])
    index = pa.array(kept_rows, type=pa.int64())
    columns = [
        table.column("id").take(index),
        table.column("category").take(index),
        pa.ListArray.from_arrays(offsets, pa.array(ids)),
        pa.ListArray.from_arrays(offsets, pa.array(masks)),
    ]
    tokens = pa.Table.from_arrays(columns, names=schema.TOKENS.names)
    return schema.check_table(tokens, schema.TOKENS, "encoded conversations"), dict(
        Counter(reason_of.values())
    )


def encode_rows(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Encoded], list[int], dict[int, str]]:
    """As `encode_table`, but returns the encoded rows, their numbers, and number -> reason."""
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    reason_of: dict[int, str] = {}
    rows: list[Encoded] = []
    kept_rows: list[int] = []
    first = 0
    for batch in table.select(["messages"]).to_batches(max_chunksize=_BATCH_ROWS):
        segments, numbers = [], []
        for number, messages in enumerate(batch.column(0).to_pylist(), start=first):
            try:
                cut = cut_conversation(tokenizer, profile, messages)
            except DataError:
                reason_of[number] = "template-refused"
            except ModelError:  # the probe passed, so the text of this row is the cause
                reason_of[number] = "not-prefix-stable"
            else:
                if cut.shows_reasoning:
                    segments.append(cut)
                    numbers.append(number)
                else:
                    reason_of[number] = "reasoning-not-rendered"
        first += batch.num_rows
        encoded = tokenise(tokenizer, profile, segments, max_length)
        for number, row in zip(numbers, encoded, strict=True):
            # The first token has no prediction, so it cannot be learned.
            if row.response_mask[1:].any():
                rows.append(row)
                kept_rows.append(number)
            else:
                reason_of[number] = "no-response-token"
    return rows, kept_rows, reason_of
