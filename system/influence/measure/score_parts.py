"""The scoring of one checkpoint in parts, so that several scorers can share it.

A part is a span of the held-out rows: whole categories together while they fit, a larger category
alone or cut.  Parts depend on the rows alone, so a checkpoint is scored in the same batches
whatever the number of scorers; with few rows there is one part, all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import pyarrow as pa

from system import schema
from system.influence.design.design import InterventionRun
from system.scoring.score import Scored

PART_ROWS = 4096
"""Most held-out rows of a part: minutes of a small engine, seconds of a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePart:
    """One span of held-out rows under one checkpoint."""

    run: InterventionRun
    index: int
    rows: range

    @property
    def name(self) -> str:
        """Of its file, below the run's folder; names sort in the order of the rows."""
        return f"{self.index:05d}.parquet"


def score_parts(
    run: InterventionRun, categories: Sequence[str], most: int | None = None
) -> list[ScorePart]:
    """The parts of a run, in the order of the rows.

    Args:
        run: whose checkpoint is scored.
        categories: of the held-out rows, in their order.
        most: rows of a part; None: `PART_ROWS`.
    """
    most = PART_ROWS if most is None else most
    ends: list[int] = [0]
    place = 0
    for _, rows in groupby(categories):
        size = sum(1 for _ in rows)
        if place > ends[-1] and place + size - ends[-1] > most:
            ends.append(place)
        place += size
        while place - ends[-1] > most:
            ends.append(ends[-1] + most)
    bounds = [*ends, place]
    spans = [range(*pair) for pair in pairwise(bounds)]
    spans = [span for span in spans if span] or [range(0)]
    return [ScorePart(run=run, index=k, rows=span) for k, span in enumerate(spans)]


def join_parts(parts: Sequence[Scored]) -> Scored:
    """The scores of all rows from those of the parts, in their order."""
    rejected: dict[str, str] = {}
    for part in parts:
        rejected |= part.rejected
    table = pa.concat_tables([schema.SCORES.empty_table(), *(part.table for part in parts)])
    return Scored(table=table, rejected=rejected)
