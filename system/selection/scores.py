"""What `quality` goes by: one score a row, or the reason why it has none.

    shard ── blocks of rows ──> the user's function or the scoring engine ──> scores/*.parquet
          └─ the corpus' own column is read where it is

A row without a score (`no-score`), and one whose instruction does not help (`ifd-not-below-one`),
comes behind all rows with one.  A score that is not a finite number is poison: the row is
quarantined, which means counted, listed and never chosen.

Blocks are cut by rows, so the number of workers changes nothing; each leaves one file, its commit.
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
"""Rows that one call of a scorer looks at."""
FUNCTION_ROWS = 8192
"""Rows that the user's function gets at most at a time."""
FUNCTION_COLUMNS = ("id", "category", "source", "messages", "answer", "score")
"""What the user's function gets to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some neighbouring rows of a shard."""

    shard: Shard
    start: int
    rows: int

    @property
    def path(self) -> str:
        """Where its scores lie; the shard's content names it."""
        return f"scores/{self.shard.split}-{self.shard.sha256[:24]}-{self.start:08d}.parquet"


def score_function(settings: SelectConfig) -> UserFunction | None:
    """The user's function, where the scores come from one."""
    if not settings.uses_score or ":" not in settings.score:
        return None
    return UserFunction.here(settings.score, "select.score")


def score_blocks(corpus: Corpus, settings: SelectConfig) -> list[Block]:
    """The units of work: nothing for scores that the corpus holds itself."""
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
    """Whether a block's scores are there."""
    return storage.exists(storage.join(attempt, block.path))


def write_scores(attempt: str, block: Block, scores: pa.Table) -> None:
    """Writes a block's scores (SELECTION_SCORES): the block's commit."""
    assert scores.num_rows == block.rows, (scores.num_rows, block.rows)
    storage.write_table(storage.join(attempt, block.path), scores)


def read_scores(corpus: Corpus, shard: Shard, settings: SelectConfig, attempt: str) -> pa.Table:
    """SELECTION_SCORES of a shard's rows, in their order.

    Args:
        corpus: the shard's.
        shard: of split train.
        settings: where the scores come from.
        attempt: of stage `select`, where scores lie that are not the corpus' own.

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
    """SELECTION_SCORES of raw scores: nulls come last, what is not finite is quarantined.

    Args:
        values: [N] float64, null where there is no score.
        score: `ifd` puts rows at 1 and above behind the others (Li et al. 2023, section 2.3: such
            an instruction does not help to predict its response).
    """
    given = pa.array(values, pa.float64()) if isinstance(values, np.ndarray) else values
    is_null = np.asarray(given.is_null())
    raw = np.asarray(given.fill_null(0.0), np.float64)
    is_usable = np.isfinite(raw)
    is_helped = (raw < 1.0) | (score != "ifd")
    found = np.select([is_null, ~is_usable, ~is_helped], [1, 2, 3], 0)
    reasons = pa.array([None, NO_SCORE, NOT_FINITE, NOT_HELPED], pa.string())
    columns = {
        "score": pa.array(raw, pa.float64(), mask=is_null | ~is_usable),
        "reason": reasons.take(pa.array(found)),
        "is_usable": pa.array(is_usable),
    }
    return pa.table(columns, schema=SELECTION_SCORES)


def score_with(function: UserFunction, corpus: Corpus, block: Block) -> pa.Table:
    """SELECTION_SCORES by the user's function.

    Raises:
        ConfigError: the function cannot be loaded, fails, or gives something else than one number
            a row.
    """
    table = corpus.read_shard(block.shard, list(FUNCTION_COLUMNS)).slice(block.start, block.rows)
    where = f"rows {block.start:,} to {block.start + block.rows - 1:,} of {block.shard.path}"
    call = function.load()
    try:
        found = call(table)
    except Exception as error:
        raise function.failed(f"raised {type(error).__name__}: {error} (on {where})") from error
    return judge(_numbers(function, found, block.rows, where))


def _numbers(function: UserFunction, found: Any, rows: int, where: str) -> pa.Array:
    """What a function returned, as float64 with nulls."""
    if isinstance(found, pa.Array | pa.ChunkedArray):
        found = found.to_pylist()
    elif hasattr(found, "__array__"):  # numpy, torch, pandas
        found = np.asarray(found).tolist()
    if not isinstance(found, list | tuple):
        raise function.failed(
            f"expected a list or array of {rows:,} scores, found {type(found).__name__} (on "
            f"{where})"
        )
    if len(found) != rows:
        raise function.failed(
            f"expected {rows:,} scores, one a row, found {len(found):,} (on {where})"
        )
    try:
        return pa.array([None if item is None else float(item) for item in found], pa.float64())
    except (TypeError, ValueError) as error:
        raise function.failed(f"expected numbers or None: {error} (on {where})") from error
