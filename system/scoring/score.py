"""Losses of held-out examples from the log-probabilities of their response tokens.

The response mask decides which tokens count.  Token 0 never counts, because nothing predicts it.

L = tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from system import schema
from system.errors import DataError, StageError
from system.scoring.engine import Engine
from system.scoring.parity import token_log_probs

NOT_FINITE = "log-likelihood is not finite"
"""Reject reason of a row whose loss is NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The scores of a table of rows under one model."""

    table: pa.Table
    """SCORES, in the order of the rows, without the rejected ones."""
    rejected: dict[str, str]
    """id of a row that could not be scored -> reason."""


def score_tokens(engine: Engine, tokens: pa.Table) -> Scored:
    """Negative log-likelihood of the response tokens of every row, under the engine's weights.

    Args:
        engine: with the weights to score.
        tokens: TOKENS schema.

    Raises:
        DataError: a row is longer than the model's context or has no response token.
        StageError: no row has a finite loss, so the weights are broken.
    """
    rows, masks = _rows(schema.check_table(tokens, schema.TOKENS, "rows to score"))
    ids = tokens.column("id").to_pylist()
    starts = [_first_scored(mask, name) for mask, name in zip(masks, ids, strict=True)]
    scored = engine.log_probs(rows, starts, ids)
    rejected = {ids[item.index]: item.reason for item in scored.rejected}
    nll = np.full(len(rows), np.nan)
    for b, values in enumerate(scored.rows):
        if values is None:
            continue
        nll[b] = -float(values[masks[b][starts[b] :]].sum())
        if not np.isfinite(nll[b]):
            rejected[ids[b]] = NOT_FINITE
    if rows and not np.isfinite(nll).any():
        raise StageError(
            f"none of {len(rows)} rows has a finite log-likelihood (first: {ids[0]}, "
            f"{rejected[ids[0]]}): the weights hold NaN, which training that diverged leaves. "
            "Lower the learning rate of the stage that trained them."
        )
    return Scored(table=_scores(tokens, nll, masks), rejected=rejected)


def score_reference(model: Any, tokens: pa.Table) -> Scored:
    """The same with transformers, one row at a time: the reference for tests of the engine.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: TOKENS schema.

    Raises:
        DataError: a row has no response token.
    """
    rows, masks = _rows(schema.check_table(tokens, schema.TOKENS, "rows to score"))
    ids = tokens.column("id").to_pylist()
    nll = np.full(len(rows), np.nan)
    rejected = {}
    for b, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        _first_scored(mask, ids[b])
        nll[b] = -float(token_log_probs(model, row)[mask[1:]].sum())
        if not np.isfinite(nll[b]):
            rejected[ids[b]] = NOT_FINITE
    return Scored(table=_scores(tokens, nll, masks), rejected=rejected)


def _rows(tokens: pa.Table) -> tuple[list[list[int]], list[np.ndarray]]:
    rows = tokens.column("input_ids").to_pylist()
    masks = [np.array(mask, dtype=bool) for mask in tokens.column("response_mask").to_pylist()]
    for name, row, mask in zip(tokens.column("id").to_pylist(), rows, masks, strict=True):
        if len(row) != len(mask):
            raise DataError(
                f"row {name} has {len(row)} tokens but {len(mask)} mask values; the file was "
                "damaged or written by something else: run the stage that made it with --redo"
            )
    return rows, masks


def _first_scored(mask: np.ndarray, name: str) -> int:
    places = np.flatnonzero(mask[1:])
    if len(places) == 0:
        raise DataError(
            f"row {name} has no response token to score (the mask is empty beyond token 0); rows "
            "like it are dropped when conversations are encoded, so encode it again"
        )
    return int(places[0]) + 1


def _scores(tokens: pa.Table, nll: np.ndarray, masks: list[np.ndarray]) -> pa.Table:
    kept = pa.array(np.flatnonzero(np.isfinite(nll)), type=pa.int64())
    counts = np.array([int(mask[1:].sum()) for mask in masks], dtype=np.int32)
    table = pa.table(
        {
            "id": tokens.column("id"),
            "category": tokens.column("category"),
            "nll": pa.array(nll, type=pa.float64()),
            "num_tokens": pa.array(counts, type=pa.int32()),
        },
        schema=schema.SCORES,
    )
    return table.take(kept)
