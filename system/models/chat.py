"""Conversations to token ids, with the exact mask of what the assistant says.

Prompt and response are tokenised apart, as they are when the model answers: no token ever spans
the border, and training sees the very prompt tokens that `encode_prompt` gives at inference.
Where the border lies is read from the chat template (`system.models.template`).

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
    render,
    response_spans,
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
    """One conversation, truncated at the end to `max_length` tokens.

    Raises:
        ModelError: the chat template cannot be trained on (see `template_profile`).
        DataError: the template refuses this conversation, or it has no assistant turn.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    pieces = cut_conversation(tokenizer, profile, messages)
    return next(tokenise(tokenizer, profile, [pieces], max_length))


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
    text = render(tokenizer, turns, prompt=True)
    cuts = [0]
    if profile.cuts_text and profile.opens_as_prompted and profile.keeps_history:
        for start, end in response_spans(tokenizer, profile, turns, text):
            cuts += [start, end]
    ids: list[int] = []
    for low, high in pairwise([*cuts, len(text)]):
        ids += token_ids(tokenizer, [text[low:high]])[0]
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
                pieces.append(cut_conversation(tokenizer, profile, messages))
                numbers.append(number)
            except DataError:
                lost[number] = "template-refused"
            except ModelError:  # the probe was stable, so this is about what the row says
                lost[number] = "not-prefix-stable"
        first += batch.num_rows
        encoded = tokenise(tokenizer, profile, pieces, max_length)
        for number, row in zip(numbers, encoded, strict=True):
            if row.response_mask[1:].any():
                rows.append(row)
                kept.append(number)
            else:
                lost[number] = "no-response-token"
    return rows, kept, lost
