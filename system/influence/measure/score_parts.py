"""Divides the scoring of one checkpoint into parts, so that several scorers can share it.

A part is a range of held-out rows: several whole categories if they fit, or one large category or a
piece of it.  Parts depend only on the rows, so the batches are the same for any number of scorers.
With few rows there is a single part.
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
"""Largest number of held-out rows in a part: minutes of a small engine, seconds of a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePart:
    """A range of held-out rows to be scored with the checkpoint of one run."""

    run: InterventionRun
    index: int
    rows: range

    @property
    def name(self) -> str:
        """Name of its file in the folder of the run; names sort in the order of the rows."""
        return f"{self.index:05d}.parquet"


def score_parts(
    run: InterventionRun, categories: Sequence[str], most: int | None = None
) -> list[ScorePart]:
    """The parts of a run, in the order of the rows.

    Args:
        run: the run whose checkpoint is scored.
        categories: of the held-out rows, in order.
        most: largest number of rows in a part; None: `PART_ROWS`.
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
    """Joins the scores of the parts, in order, to the scores of all rows."""
    rejected: dict[str, str] = {}
    for part in parts:
        rejected |= part.rejected
    table = pa.concat_tables([schema.SCORES.empty_table(), *(part.table for part in parts)])
    return Scored(table=table, rejected=rejected)
