"""Which rows leave as near-duplicates: those that are near to an earlier row which itself stays.

Test rows come first, then estimate rows, then train rows, and within a split the order of the
input.  A row leaves when it is near to an earlier row that stays, and for no other reason: in a
chain A ~ B ~ C without A ~ C the row B leaves and C stays.  So every row that leaves is near to a
row of the corpus, no train row stays that a staying held-out row was found to be near to, and the
result depends on no order of work.

Most rows need only the first row that they are near to in each band (`decide`): it has no earlier
neighbour itself, so it stays.  For the few others all their neighbours are looked at (`settle`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from system import storage
from system.data.duplicates.near import (
    NEAR,
    SpillInput,
    SpillOutcome,
    commit_spill,
    read_spill_outcome,
    read_step,
    step_uri,
)
from system.data.ingest.plan import IngestPlan
from system.data.ingest.spill import spill_output

_UNDECIDED = pa.schema([pa.field("row", pa.uint64(), nullable=False)])


def decide(plan: IngestPlan, given: SpillInput) -> SpillOutcome:
    """Spills the rows that are near to a row without an earlier neighbour, by bucket.

    The rows that have earlier neighbours, but none such, are written beside it as undecided.
    """
    parts = [
        SpillInput(index=0, batches={writer: numbers}) for writer, numbers in given.batches.items()
    ]
    rows = [np.zeros(0, np.uint64)]
    rows += [np.unique(read_step(plan, "near", NEAR, part)["row"]) for part in parts]
    later = np.unique(np.concatenate(rows))
    found = [NEAR.empty_table()]
    for part in parts:
        pairs = read_step(plan, "near", NEAR, part)
        stays = ~_is_in(np.asarray(pairs["near"]), later)
        found.append(_first_of_each(pairs.filter(pa.array(stays))))
    leaving = _first_of_each(pa.concat_tables(found))
    undecided = np.setdiff1d(later, np.asarray(leaving["row"]), assume_unique=True)
    storage.write_table(
        step_uri(plan, "decided", 0, "undecided.arrow"),
        pa.table([pa.array(undecided)], schema=_UNDECIDED),
    )
    return _spill_leaving(plan, "decided", leaving)


def has_undecided(plan: IngestPlan) -> bool:
    """Whether `decide` left rows for `settle`."""
    return storage.read_table(step_uri(plan, "decided", 0, "undecided.arrow")).num_rows > 0


def settle(plan: IngestPlan, given: SpillInput) -> SpillOutcome:
    """Spills those undecided rows that leave, by bucket."""
    decided = read_spill_outcome(plan, "decided", 0)
    assert decided is not None, "rows are settled after the others are decided"
    numbers = sorted(number for own in decided.batches.values() for number in own)
    gone = read_step(plan, "decided", NEAR, SpillInput(index=0, batches={0: numbers}))
    left = np.sort(np.asarray(gone["row"]))
    undecided = np.asarray(
        storage.read_table(step_uri(plan, "decided", 0, "undecided.arrow"))["row"]
    )
    pairs = read_step(plan, "near-all", NEAR, given)
    pairs = pairs.filter(pa.array(~_is_in(np.asarray(pairs["near"]), left)))
    leaves = leaving_rows(undecided, np.asarray(pairs["row"]), np.asarray(pairs["near"]))
    goes = _is_in(np.asarray(pairs["row"]), leaves)
    stays = ~_is_in(np.asarray(pairs["near"]), leaves)
    return _spill_leaving(plan, "settled", _first_of_each(pairs.filter(pa.array(goes & stays))))


def leaving_rows(undecided: np.ndarray, rows: np.ndarray, nears: np.ndarray) -> np.ndarray:
    """The undecided rows that are near to a row that stays, sorted.

    Args:
        undecided: sorted.
        rows: of each pair the later row, undecided.
        nears: of each pair the earlier row; it stays unless it is undecided.
    """
    is_open = _is_in(nears, undecided)
    leaves = np.zeros(len(undecided), bool)
    leaves[np.searchsorted(undecided, rows[~is_open])] = True
    later = np.searchsorted(undecided, rows[is_open])
    earlier = np.searchsorted(undecided, nears[is_open])
    order = np.argsort(earlier, kind="stable")
    bounds = np.searchsorted(earlier[order], np.arange(len(undecided) + 1)).tolist()
    followers = later[order].tolist()
    waits_for = np.bincount(later, minlength=len(undecided)).tolist()
    goes = leaves.tolist()
    ready = [row for row, count in enumerate(waits_for) if goes[row] or not count]
    seen = set(ready)
    while ready:
        row = ready.pop()
        for follower in followers[bounds[row] : bounds[row + 1]]:
            waits_for[follower] -= 1
            goes[follower] |= not goes[row]
            if (goes[follower] or not waits_for[follower]) and follower not in seen:
                seen.add(follower)
                ready.append(follower)
    return undecided[np.array(goes, bool)]


def read_leaving(plan: IngestPlan, steps: dict[str, list[int]]) -> dict[int, str]:
    """Place among the bucket's different ids -> id of the row that stays for it.

    Args:
        plan: of the ingest.
        steps: `decided` and perhaps `settled` -> record batches of the bucket.
    """
    found: dict[int, str] = {}
    for step, numbers in steps.items():
        rows = read_step(plan, step, NEAR, SpillInput(index=0, batches={0: numbers}))
        places = (np.asarray(rows["row"]) & np.uint64(0xFFFFFFFF)).tolist()
        found.update(zip(places, rows["near_id"].to_pylist(), strict=True))
    return found


def _spill_leaving(plan: IngestPlan, step: str, leaving: pa.Table) -> SpillOutcome:
    with spill_output(step_uri(plan, step, 0, "arrow"), NEAR) as spill:
        spill.add(leaving, (np.asarray(leaving["row"]) >> np.uint64(32)).astype(np.int64))
        outcome = SpillOutcome(index=0, batches=spill.batches)
    return commit_spill(plan, step, outcome)


def _first_of_each(pairs: pa.Table) -> pa.Table:
    """Of each row the pair with the smallest id."""
    rows, nears = np.asarray(pairs["row"]), np.asarray(pairs["near"])
    order = np.lexsort([nears, rows])
    _, first = np.unique(rows[order], return_index=True)
    return pairs.take(pa.array(order[first]))


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each value is among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    return known[places] == values
