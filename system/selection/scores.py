"""The scores of `select.method: quality`: one score a row, or the reason why it has none.

    shard ── blocks of rows ──> the user's function or the scoring engine ──> scores/*.parquet
          └─ with `select.score: column` the scores are read from the corpus

A row without a score (`no-score`), or whose instruction does not help (`ifd-not-below-one`), comes
after all rows with a score.  A row whose score is not a finite number is quarantined: it is counted
and listed, but never chosen.

A block is a work unit: a fixed number of rows of one shard, so the number of workers changes no
result.  Its file commits it.  `actors.features` computes the scores, `system.selection.choose`
reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from system import storage
from system.config import SelectConfig
from system.data.corpus import Corpus, Shard
from system.errors import DataError
from system.functions import UserFunction
from system.schema import SELECTION_SCORES, check_table

NO_SCORE = "no-score"
NOT_FINITE = "score-not-finite"
NOT_HELPED = "ifd-not-below-one"

ENGINE_ROWS = 1024
"""Rows that a scorer gets in one call."""
FUNCTION_ROWS = 8192
"""Largest number of rows that the user's function gets in one call."""
FUNCTION_COLUMNS = ("id", "category", "source", "messages", "answer", "score")
"""Columns of the table that the user's function gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A work unit: some neighbouring rows of a shard."""

    shard: Shard
    start: int
    rows: int

    @property
    def path(self) -> str:
        """Path of its scores, below the attempt; the hash in it is that of the shard's content."""
        return f"scores/{self.shard.split}-{self.shard.sha256[:24]}-{self.start:08d}.parquet"


def score_function(settings: SelectConfig) -> UserFunction | None:
    """The user's function, or None when the scores come from elsewhere."""
    if not settings.uses_score or ":" not in settings.score:
        return None
    return UserFunction.here(settings.score, "select.score")


def score_blocks(corpus: Corpus, settings: SelectConfig) -> list[Block]:
    """All work units; none when the corpus holds the scores."""
    if not settings.uses_score or settings.score == "column":
        return []
    size = ENGINE_ROWS if settings.score in ("loss", "ifd") else FUNCTION_ROWS
    return [
        block
        for category in corpus.categories
        for shard in corpus.shards("train", category)
        for block in _cut(shard, size)
    ]


def _cut(shard: Shard, size: int) -> Iterator[Block]:
    for start in range(0, shard.rows, size):
        yield Block(shard=shard, start=start, rows=min(size, shard.rows - start))


def is_scored(attempt: str, block: Block) -> bool:
    """Whether the block's scores are committed."""
    return storage.is_whole(storage.join(attempt, block.path))


def write_scores(attempt: str, block: Block, scores: pa.Table) -> None:
    """Writes the block's scores (SELECTION_SCORES); this commits the block."""
    assert scores.num_rows == block.rows, (scores.num_rows, block.rows)
    storage.write_table(storage.join(attempt, block.path), scores)


def read_scores(corpus: Corpus, shard: Shard, settings: SelectConfig, attempt: str) -> pa.Table:
    """Reads the SELECTION_SCORES of a shard's rows, in their order.

    Args:
        corpus: corpus of the shard.
        shard: a shard of the train split.
        settings: their `score` says where the scores are.
        attempt: attempt of stage `select`, which holds all scores but those of the corpus.

    Raises:
        DataError: scores are missing.
    """
    if settings.score == "column":
        return judge(corpus.read_shard(shard, ["score"])["score"])
    size = ENGINE_ROWS if settings.score in ("loss", "ifd") else FUNCTION_ROWS
    tables = []
    for block in _cut(shard, size):
        uri = storage.join(attempt, block.path)
        if not storage.exists(uri):
            raise DataError(
                f"{uri}: expected the scores of {block.rows:,} rows, found no file; run `select` "
                "again with --redo"
            )
        tables.append(check_table(storage.read_table(uri), SELECTION_SCORES, uri))
    return pa.concat_tables(tables)


def judge(values: pa.ChunkedArray | pa.Array | np.ndarray, score: str = "column") -> pa.Table:
    """Turns raw scores into SELECTION_SCORES: nulls come last, non-finite ones are quarantined.

    Args:
        values: [N] float64, null where there is no score.
        score: `ifd` puts rows with 1 or more after the others (Li et al. 2023, section 2.3: such
            an instruction does not help to predict its response).
    """
    column = pa.array(values, pa.float64()) if isinstance(values, np.ndarray) else values
    is_null = np.asarray(column.is_null())
    raw = np.asarray(column.fill_null(0.0), np.float64)
    is_usable = np.isfinite(raw)
    is_helped = (raw < 1.0) | (score != "ifd")
    reason_index = np.select([is_null, ~is_usable, ~is_helped], [1, 2, 3], 0)
    reasons = pa.array([None, NO_SCORE, NOT_FINITE, NOT_HELPED], pa.string())
    columns = {
        "score": pa.array(raw, pa.float64(), mask=is_null | ~is_usable),
        "reason": reasons.take(pa.array(reason_index)),
        "is_usable": pa.array(is_usable),
    }
    return pa.table(columns, schema=SELECTION_SCORES)


def score_with(function: UserFunction, corpus: Corpus, block: Block) -> pa.Table:
    """Computes the SELECTION_SCORES of a block with the user's function.

    Raises:
        ConfigError: the function cannot be loaded, fails, or does not return one number a row.
    """
    table = corpus.read_shard(block.shard, list(FUNCTION_COLUMNS)).slice(block.start, block.rows)
    where = f"rows {block.start:,} to {block.start + block.rows - 1:,} of {block.shard.path}"
    call = function.load()
    try:
        returned = call(table)
    except Exception as error:
        raise function.failed(f"raised {type(error).__name__}: {error} (on {where})") from error
    return judge(_numbers(function, returned, block.rows, where))


def _numbers(function: UserFunction, returned: Any, rows: int, where: str) -> pa.Array:
    """The scores that a function returned, as float64 with nulls."""
    if isinstance(returned, pa.Array | pa.ChunkedArray):
        returned = returned.to_pylist()
    elif hasattr(returned, "__array__"):  # numpy, torch, pandas
        returned = np.asarray(returned).tolist()
    if not isinstance(returned, list | tuple):
        raise function.failed(
            f"expected a list or array of {rows:,} scores, found {type(returned).__name__} (on "
            f"{where})"
        )
    if len(returned) != rows:
        raise function.failed(
            f"expected {rows:,} scores, one a row, found {len(returned):,} (on {where})"
        )
    try:
        return pa.array([None if item is None else float(item) for item in returned], pa.float64())
    except (TypeError, ValueError) as error:
        raise function.failed(f"expected numbers or None: {error} (on {where})") from error
