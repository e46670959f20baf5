"""How hard a response is for the base model, with its instruction and without.

    loss = mean over response tokens of -log p(token | instruction, tokens before it)     nats
    IFD  = loss / the same mean with the instruction taken away

Instruction-following difficulty is near 1 where the instruction tells the model nothing that helps
to write the response, and small where it does most of the work.  Source: Li et al. 2023 (arXiv
2308.12032), section 2.2.

Without the instruction means: what the chat template writes right before an answer, then the
response.  Each assistant turn of a conversation stands alone so; their losses are added up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from system.errors import ModelError
from system.models.chat import encode_rows
from system.models.template import Encoded, template_profile
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
    """SELECTION_SCORES of rows, in their order.

    Args:
        engine: with the base model's weights.
        tokenizer: the model's.
        table: columns `id`, `category`, `messages`.
        score: which of the two.
        max_length: tokens of a row; longer ones lose their end, as in training.

    Raises:
        StageError: no row at all has a finite loss.
    """
    encoded, kept, lost = encode_rows(table, tokenizer, max_length)
    rejected = dict(lost)
    given, found = _losses(engine, table, dict(zip(kept, encoded, strict=True)), None)
    rejected |= found
    values = given
    if score == "ifd":
        opening = opening_ids(tokenizer)
        rows = {place: row for place, row in zip(kept, encoded, strict=True) if place in given}
        alone, found = _losses(engine, table, rows, opening)
        rejected |= found
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {place: np.divide(given[place], alone[place]) for place in alone}
    scores = np.full(table.num_rows, np.nan)
    for place, value in values.items():
        scores[place] = value
    return _with_reasons(judge(scores, score), rejected)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model reads right before an answer: the turn's head in the chat template.

    A template without one gets the token that begins (or ends) a text.

    Raises:
        ModelError: there is no such token either.
    """
    profile = template_profile(tokenizer, str(tokenizer.chat_template or ""))
    text = profile.opening
    if profile.opens_as_prompted:
        question = [{"role": "user", "content": "Which city is the capital of France?"}]
        bare, prompt = (
            str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=on))
            for on in (False, True)
        )
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
    """Mean loss of each row by its place, and reasons of those that have none.

    With an opening the response tokens stand behind it alone, turn by turn.
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
    """Token ids and response masks: the row itself, or each of its responses alone."""
    if opening is None:
        return [(row.input_ids, row.response_mask)]
    mask = row.response_mask.copy()
    mask[0] = False  # nothing predicts token 0, so it counts in neither loss
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    head = np.array(opening, np.int32)
    parts = []
    for start, end in edges.reshape(-1, 2).tolist():
        said = row.input_ids[start:end]
        is_response = np.concatenate([np.zeros(len(head), bool), np.ones(len(said), bool)])
        parts.append((np.concatenate([head, said]), is_response))
    return parts


def _with_reasons(scores: pa.Table, reasons: dict[int, str]) -> pa.Table:
    """The scores, rows that the engine or the template refused under their own reasons."""
    if not reasons:
        return scores
    column = scores["reason"].to_pylist()
    for place, reason in reasons.items():
        column[place] = reason
    index = SELECTION_SCORES.get_field_index("reason")
    return scores.set_column(index, SELECTION_SCORES.field("reason"), pa.array(column, pa.string()))
