"""Several doses of every category on one common schedule, the smaller inside the larger.

    drawn rows of a category   0 ........ 16 ........ 32 .................. 64 ... base rows
    labels in the plan         dose-16     dose-32     dose-64               base
    a run at dose 32 moves     ^^^^^^^^^^^^^^^^^^^^^^

Each row of the largest dose is marked with the smallest dose that it is part of.  So the doses of a
category are nested, their runs share the schedule and the reference, and what the dose changes is a
paired difference.  With one dose the label is the bare role: plans are those of a design that knows
no doses.

A category that has too few rows for a dose gets the largest that it has; doses that come to the
same rows are one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from system.influence.design.estimators import Run
from system.training.plan import TrainPlan, plan_from_table

SINGLE = ("add", "remove")
"""Kinds of runs that move one category's dose."""


def dose_labels(role: str, num_rows: int, doses: Sequence[int]) -> list[str]:
    """Stage names of a category's dose rows, in the order drawn.

    Args:
        role: `dose` or `extra`.
        num_rows: of the largest dose; the category may have fewer than asked.
        doses: rows asked, ascending.
    """
    if len(doses) < 2:
        return [role] * num_rows
    smallest = np.searchsorted(doses, np.arange(num_rows), side="right")
    return [f"{role}-{doses[place]}" for place in smallest]


def is_in_dose(labels: Sequence[str], role: str, dose: int = 0) -> np.ndarray:
    """[rows] bool: whether a plan's rows have a role, and are part of a dose of it.

    Args:
        labels: stage names of the rows.
        role: `dose` or `extra`.
        dose: rows asked of the dose; 0: any.
    """
    names = set(labels)
    chosen = {
        name
        for name in names
        if name == role
        or (name.startswith(f"{role}-") and (not dose or int(name[len(role) + 1 :]) <= dose))
    }
    return np.array([name in chosen for name in labels], dtype=bool)


def without_doses(plan: TrainPlan) -> TrainPlan:
    """The schedule with the labels of a single dose: the same rows, whatever doses are asked."""
    labels = plan.table.column("stage").to_pylist()
    roles = [name.partition("-")[0] for name in labels]
    if roles == labels:
        return plan
    place = plan.table.column_names.index("stage")
    return plan_from_table(plan.table.set_column(place, "stage", pa.array(roles, pa.string())))


def smaller_tokens(
    rows: pa.Table, doses: Sequence[int], count: Callable[[pa.Table], int]
) -> list[int]:
    """Response tokens of all doses but the largest.

    Args:
        rows: TOKENS of the largest dose, in the order drawn.
        doses: rows asked, ascending.
        count: response tokens of a table.
    """
    return [count(rows.slice(0, dose)) for dose in doses[:-1]]


def distinct_doses(doses: Sequence[int], most: int) -> list[int]:
    """The asked doses that differ when a category has at most so many rows; never none."""
    return [dose for place, dose in enumerate(doses) if place == 0 or doses[place - 1] < most]


def with_doses(
    runs: Sequence[Run], doses: Sequence[int], held: Callable[[str, int], int]
) -> list[tuple[str, int, int]]:
    """Runs of a replication at every dose: kind, source, rows asked of the dose.

    Args:
        runs: kind and source, once each.
        doses: rows asked, ascending; with one or none, a run's dose is 0: the only one.
        held: (direction, source) -> rows that the largest dose came to.
    """
    return [
        (kind, source, dose)
        for kind, source in runs
        for dose in (
            distinct_doses(doses, held(kind, source)) if kind in SINGLE and len(doses) > 1 else [0]
        )
    ]


def in_words(doses: Sequence[int]) -> str:
    """`doses of 16, 32 and 64 rows`, for people; empty with one dose."""
    if len(doses) < 2:
        return ""
    head = ", ".join(f"{dose}" for dose in doses[:-1])
    return f"doses of {head} and {doses[-1]} rows"


def at_level(rows: Sequence[dict[str, Any]], level: int) -> list[dict[str, Any]]:
    """The matrix rows of one dose of every source.

    Args:
        rows: of one direction and unit, with `source` and `dose`.
        level: 0 is the smallest dose, 1 the next, -1 the largest; a source with fewer doses (for
            want of rows) gives its largest.

    Raises:
        ValueError: fewer doses than that.
    """
    found: dict[str, set[float]] = {}
    for row in rows:
        found.setdefault(row["source"], set()).add(row["dose"])
    count = max(len(doses) for doses in found.values())
    if not -count <= level < count:
        raise ValueError(f"level {level} of {count} doses")
    place = level % count
    chosen = {name: sorted(doses)[min(place, len(doses) - 1)] for name, doses in found.items()}
    return [row for row in rows if row["dose"] == chosen[row["source"]]]
