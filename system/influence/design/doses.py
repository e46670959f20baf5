"""Several doses of every category on one common schedule; each smaller dose is part of the larger.

    drawn rows of a category   0 ........ 16 ........ 32 .................. 64 ... base rows
    labels in the plan         dose-16     dose-32     dose-64               base
    a run at dose 32 moves     ^^^^^^^^^^^^^^^^^^^^^^

Each row of the largest dose is labelled with the smallest dose that contains it.  So the doses of a
category are nested, all their runs share the schedule and the reference run, and the difference
between two doses is a paired difference.  With a single dose the label is the role alone.

A category with too few rows for a dose uses all the rows it has.  If two doses then have the same
rows, they share one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from system.influence.design.estimators import Run
from system.training.plan import TrainPlan, plan_from_table

SINGLE_SOURCE_KINDS = ("add", "remove")
"""Kinds of runs that add or remove the dose of one category."""


def dose_labels(role: str, num_rows: int, doses: Sequence[int]) -> list[str]:
    """Labels (stage names in the plan) of a category's dose rows, in the order drawn.

    Args:
        role: `dose` or `extra`.
        num_rows: actual rows of the largest dose; fewer than requested if the category is small.
        doses: requested rows of each dose, ascending.
    """
    if len(doses) < 2:
        return [role] * num_rows
    smallest = np.searchsorted(doses, np.arange(num_rows), side="right")
    return [f"{role}-{doses[place]}" for place in smallest]


def is_in_dose(labels: Sequence[str], role: str, dose: int = 0) -> np.ndarray:
    """[rows] bool: whether each row of a plan has the role and belongs to the dose.

    Args:
        labels: stage names of the rows.
        role: `dose` or `extra`.
        dose: requested rows of the dose; 0 accepts any dose.
    """
    matching = {
        name
        for name in set(labels)
        if name == role
        or (name.startswith(f"{role}-") and (not dose or int(name[len(role) + 1 :]) <= dose))
    }
    return np.array([name in matching for name in labels], dtype=bool)


def without_doses(plan: TrainPlan) -> TrainPlan:
    """The same schedule with the role alone as label, so its hash does not depend on the doses."""
    labels = plan.table.column("stage").to_pylist()
    roles = [name.partition("-")[0] for name in labels]
    if roles == labels:
        return plan
    place = plan.table.column_names.index("stage")
    return plan_from_table(plan.table.set_column(place, "stage", pa.array(roles, pa.string())))


def smaller_tokens(
    rows: pa.Table, doses: Sequence[int], count: Callable[[pa.Table], int]
) -> list[int]:
    """Response tokens of every dose but the largest.

    Args:
        rows: TOKENS of the largest dose, in the order drawn.
        doses: requested rows of each dose, ascending.
        count: function that counts the response tokens of a table.
    """
    return [count(rows.slice(0, dose)) for dose in doses[:-1]]


def distinct_doses(doses: Sequence[int], most: int) -> list[int]:
    """The requested doses that differ for a category with `most` rows; at least one."""
    return [dose for place, dose in enumerate(doses) if place == 0 or doses[place - 1] < most]


def at_every_dose(
    runs: Sequence[Run], doses: Sequence[int], largest_rows: Callable[[str, int], int]
) -> list[tuple[str, int, int]]:
    """The runs of one replication, repeated for every distinct dose: (kind, source, dose).

    Args:
        runs: (kind, source) of each run.
        doses: requested rows of each dose, ascending; with at most one, every run has dose 0.
        largest_rows: (direction, source) -> actual rows of the largest dose.
    """
    return [
        (kind, source, dose)
        for kind, source in runs
        for dose in (
            distinct_doses(doses, largest_rows(kind, source))
            if kind in SINGLE_SOURCE_KINDS and len(doses) > 1
            else [0]
        )
    ]


def in_words(doses: Sequence[int]) -> str:
    """Text such as `doses of 16, 32 and 64 rows`; empty with one dose."""
    if len(doses) < 2:
        return ""
    head = ", ".join(f"{dose}" for dose in doses[:-1])
    return f"doses of {head} and {doses[-1]} rows"


def at_level(rows: Sequence[dict[str, Any]], level: int) -> list[dict[str, Any]]:
    """Selects the matrix rows of one dose of every source.

    Args:
        rows: matrix rows of one direction and unit, with `source` and `dose`.
        level: 0 is the smallest dose, 1 the next, -1 the largest.  A source with fewer doses (it
            has too few rows) gives its largest.

    Raises:
        ValueError: there is no such level.
    """
    doses_by_source: dict[str, set[float]] = {}
    for row in rows:
        doses_by_source.setdefault(row["source"], set()).add(row["dose"])
    count = max(len(doses) for doses in doses_by_source.values())
    if not -count <= level < count:
        raise ValueError(f"expected a dose level from {-count} to {count - 1}, found {level}")
    place = level % count
    dose_of = {
        name: sorted(doses)[min(place, len(doses) - 1)] for name, doses in doses_by_source.items()
    }
    return [row for row in rows if row["dose"] == dose_of[row["source"]]]
