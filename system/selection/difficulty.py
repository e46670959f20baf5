"""Scores rows by how hard their response is for the base model, with and without the instruction.

    loss = mean over response tokens of -log p(token | instruction, tokens before it)     nats
    IFD  = loss / the same mean with the instruction taken away

Instruction-following difficulty is near 1 where the instruction tells the model nothing that helps
to write the response, and small where it does most of the work.  Source: Li et al. 2023 (arXiv
2308.12032), section 2.2.

"Without the instruction" means: the text that the chat template writes right before an answer, then
the response.  Each assistant turn of a conversation is scored alone in this way, and the losses are
added up.  `actors.scorer` calls `measure_rows` for each block of `system.selection.scores`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from system.errors import ModelError
from system.models.chat import encode_rows
from system.models.template import Encoded, render, template_profile
from system.schema import SELECTION_SCORES, TOKENS
from system.scoring.score import score_tokens
from system.selection.scores import judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from system.scoring.engine import Engine


def measure_rows(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    table: pa.Table,
    score: Literal["loss", "ifd"],
    max_length: int,
) -> pa.Table:
    """Computes the SELECTION_SCORES of rows, in their order.

    Args:
        engine: engine with the base model's weights.
        tokenizer: tokenizer of the base model.
        table: columns `id`, `category`, `messages`.
        score: which of the two scores.
        max_length: largest number of tokens of a row; longer rows are truncated, as in training.

    Raises:
        StageError: no row at all has a finite loss.
    """
    encoded, kept, lost = encode_rows(table, tokenizer, max_length)
    rejected = dict(lost)
    losses, reasons = _losses(engine, table, dict(zip(kept, encoded, strict=True)), None)
    rejected |= reasons
    values = losses
    if score == "ifd":
        opening = opening_ids(tokenizer)
        rows = {place: row for place, row in zip(kept, encoded, strict=True) if place in losses}
        losses_alone, reasons = _losses(engine, table, rows, opening)
        rejected |= reasons
        # A loss of exactly 0 gives a score that is not finite, which `judge` quarantines.
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {
                place: np.divide(losses[place], losses_alone[place]) for place in losses_alone
            }
    scores = np.full(table.num_rows, np.nan)
    for place, value in values.items():
        scores[place] = value
    return _with_reasons(judge(scores, score), rejected)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the chat template writes right before an answer.

    If it writes none, the token that begins (or else ends) a text.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    text = profile.opening
    if profile.opens_as_prompted:
        question = [{"role": "user", "content": "Which city is the capital of France?"}]
        bare, prompt = (render(tokenizer, question, prompt=on) for on in (False, True))
        text = prompt[len(bare) :] if prompt.startswith(bare) else ""
    encoded: Any = tokenizer(text, add_special_tokens=False, return_attention_mask=False)
    ids: list[int] = encoded["input_ids"]
    if not ids:
        first: Any = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        ids = [] if first is None else [int(first)]
    if not ids:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} writes nothing before an answer and "
            "the tokenizer has no token that begins a text, so a response cannot be scored without "
            "its instruction. Use select.score: loss, or give a template in model.chat_template."
        )
    return ids


def _losses(
    engine: Engine, table: pa.Table, rows: dict[int, Encoded], opening: list[int] | None
) -> tuple[dict[int, float], dict[int, str]]:
    """Mean loss of each row by its place, and the reject reasons of rows without a loss.

    With an opening, each response is scored alone after it, without its instruction.
    """
    ids, categories = table["id"].to_pylist(), table["category"].to_pylist()
    places: dict[str, int] = {}
    inputs, masks, groups = [], [], []
    for place, row in rows.items():
        for part, (tokens, mask) in enumerate(_parts(row, opening)):
            name = f"{ids[place]}/{part}"
            places[name] = place
            inputs.append(tokens)
            masks.append(mask)
            groups.append(categories[place])
    if not places:
        return {}, {}
    columns = {
        "id": list(places), "category": groups, "input_ids": inputs, "response_mask": masks,
    }  # fmt: skip
    scored = score_tokens(engine, pa.table(columns, schema=TOKENS))
    rejected = {places[name]: reason for name, reason in scored.rejected.items()}
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    parts = (scored.table[name].to_pylist() for name in ("id", "nll", "num_tokens"))
    for name, nll, num_tokens in zip(*parts, strict=True):
        place = places[name]
        sums[place] = sums.get(place, 0.0) + nll
        counts[place] = counts.get(place, 0) + num_tokens
    means = {place: sums[place] / counts[place] for place in sums if place not in rejected}
    return means, rejected


def _parts(row: Encoded, opening: list[int] | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and response masks: of the whole row, or of each of its responses alone."""
    if opening is None:
        return [(row.input_ids, row.response_mask)]
    mask = row.response_mask.copy()
    mask[0] = False  # nothing predicts token 0, so it counts in neither loss
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    head = np.array(opening, np.int32)
    parts = []
    for start, end in edges.reshape(-1, 2).tolist():
        response = row.input_ids[start:end]
        is_response = np.concatenate([np.zeros(len(head), bool), np.ones(len(response), bool)])
        parts.append((np.concatenate([head, response]), is_response))
    return parts


def _with_reasons(scores: pa.Table, reasons: dict[int, str]) -> pa.Table:
    """The scores, with the reject reasons of the engine and of the template filled in."""
    if not reasons:
        return scores
    column = scores["reason"].to_pylist()
    for place, reason in reasons.items():
        column[place] = reason
    index = SELECTION_SCORES.get_field_index("reason")
    return scores.set_column(index, SELECTION_SCORES.field("reason"), pa.array(column, pa.string()))
