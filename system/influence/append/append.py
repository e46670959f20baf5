"""New categories for a finished design: measured at its base, without measuring the rest again.

    earlier design  ── what_holds ──> kept | stale | new categories of the corpus
    earlier plan    ── extend_plan ─> the same steps, with dose rows of the new ones masked in
    earlier scores  + new ones ─────> one matrix, its appended entries flagged (`overlay`)

The base stays what it was: rows, order, steps, learning rates and denominators.  A new category has
no row in it, so its column is measured by adding: the reference run with a dose of the category.
Its row takes the earlier runs scored on its held-out rows.  Both are slopes at the old base, where
a fresh design would have a base with rows of the category, so the entries are flagged.

A category holds while all rows that were trained and scored for it are still in it.  Where rows
left it (another tag, a split, a removed source), its numbers are those of other data: it is named
as stale, and measured as a new one if the corpus still has a category of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from system.data.corpus import Corpus
from system.errors import DataError
from system.influence.design.design import (
    Append,
    CategoryRows,
    Design,
    InterventionRun,
    Replication,
    Target,
)
from system.influence.design.interventions import least_dose, response_tokens, seed_of
from system.influence.estimate.matrix import EffectMatrix
from system.training.plan import APPENDED, TrainPlan, plan_from_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What an earlier design still says of a corpus."""

    kept: tuple[str, ...]
    """Categories whose measurements hold, in the corpus' order."""
    new: tuple[str, ...]
    """Categories of the corpus to measure, in its order."""
    stale: dict[str, str]
    """Categories of the earlier design whose measurements do not hold -> why."""


def measured_ids(
    design: Design, plans: Sequence[TrainPlan], heldout: pa.Table
) -> dict[str, dict[str, set[str]]]:
    """The rows behind a design's numbers: split -> category -> ids.

    Args:
        design: the earlier one.
        plans: all its schedules: main, warm-up and appended ones.
        heldout: its held-out rows, category = name of the target.
    """
    found: dict[str, dict[str, set[str]]] = {
        split: {name: set() for name in design.sources} for split in ("train", "estimate")
    }
    for plan in plans:
        columns = (plan.table.column(name).to_pylist() for name in ("category", "stage", "id"))
        for name, stage, row_id in zip(*columns, strict=True):
            # The base may hold rows of an earlier category of the same name: those do not count.
            if name in found["train"] and design.is_appended(name) == (stage == APPENDED):
                found["train"][name].add(row_id)
    columns = (heldout.column(name).to_pylist() for name in ("category", "id"))
    for name, row_id in zip(*columns, strict=True):
        if name in found["estimate"]:
            found["estimate"][name].add(row_id)
    return found


def what_holds(
    design: Design, measured: Mapping[str, Mapping[str, Collection[str]]], corpus: Corpus
) -> Holding:
    """Which categories of an earlier design still are what they were.

    Args:
        design: the earlier one.
        measured: of `measured_ids`.
        corpus: as it is now.

    Raises:
        DataError: none does, so there is nothing to append to.
    """
    stale: dict[str, str] = {}
    for name in design.sources:
        if name not in corpus.categories:
            stale[name] = "the corpus has no such category any more"
            continue
        parts = [
            f"{gone} of {len(measured[split][name])} rows {verb}"
            for split, verb in (("train", "trained"), ("estimate", "scored"))
            if (gone := _num_gone(corpus, split, name, measured[split][name]))
        ]
        if parts:
            stale[name] = f"{' and '.join(parts)} are in it no more"
    kept = tuple(name for name in corpus.categories if name in set(design.sources) - set(stale))
    if not kept:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(stale.items()))
        raise DataError(
            "influence.append: expected that some category of the earlier result still holds, "
            f"found none ({reasons}). Set influence.append to false to measure all categories anew."
        )
    new = tuple(name for name in corpus.categories if name not in kept)
    return Holding(kept=kept, new=new, stale=stale)


def _num_gone(corpus: Corpus, split: str, category: str, ids: Collection[str]) -> int:
    left = set(ids)
    for table in corpus.iter_tables(split, category, ["id"]) if left else ():
        left.difference_update(table["id"].to_pylist())
    return len(left)


def trained_ids(plans: Mapping[str, TrainPlan], kept: Collection[str]) -> set[str]:
    """Ids of the rows that stay in a replication's schedules.

    Args:
        plans: of the earlier replication, by kind.
        kept: categories whose earlier measurements hold; appended rows of others leave.
    """
    ids = set()
    for plan in plans.values():
        columns = (plan.table.column(name).to_pylist() for name in ("id", "stage", "category"))
        for row_id, stage, category in zip(*columns, strict=True):
            if stage != APPENDED or category in kept:
                ids.add(row_id)
    return ids


def undrawn(
    ids_of: Callable[[int], Sequence[str]], wanted: int, taken: Collection[str]
) -> list[int]:
    """Places of the first rows of a seeded order that are not taken already.

    Args:
        ids_of: how many rows at most -> ids of that many first rows.
        wanted: places to find; fewer come back where the category has fewer.
        taken: ids of rows to pass over.
    """
    asked = wanted
    while True:
        ids = ids_of(asked)
        free = [place for place, row_id in enumerate(ids) if row_id not in taken]
        if len(free) >= wanted or len(ids) < asked:
            return free[:wanted]
        asked *= 2


def dose_size(category: str, available: int, asked: Mapping[str, int]) -> CategoryRows:
    """The rows of an appended category: a dose, and none in the base.

    Args:
        category: its name.
        available: usable rows that the base does not have already, at most a dose.
        asked: rows of the earlier design.

    Raises:
        DataError: fewer than the smallest dose.
    """
    dose = min(available, asked["dose"])
    if dose < least_dose(asked):
        raise DataError(
            f"influence.append: category {category!r} has {available} usable train rows that the "
            f"earlier base does not train on; expected a dose of {asked['dose']} rows, and at "
            f"least {least_dose(asked)}. Give it more data, or merge it into another category "
            "(sources.category_map)."
        )
    return CategoryRows(available=available, base=0, dose=dose, extra=dose, warm=0, warm_reused=0)


def extend_plan(plan: TrainPlan, doses: Mapping[str, pa.Table], seed: int) -> TrainPlan:
    """The schedule with further rows in its steps; its own rows, steps and denominators stay.

    A category's rows are spread evenly over the steps, in an order of their own: it is the same
    whichever other categories join.

    Args:
        plan: of a replication, one row a sequence.
        doses: category -> TOKENS rows.
        seed: of the replication.
    """
    parts = [plan.table]
    next_sequence = np.diff(plan.step_starts).astype(np.int32)
    for category, tokens in doses.items():
        count = tokens.num_rows
        draw = np.random.default_rng(seed_of(seed, APPENDED, category))
        place = (draw.permutation(count) + draw.random(count)) / count
        step = np.minimum((place * plan.num_steps).astype(np.int32), plan.num_steps - 1)
        sequence = np.empty(count, dtype=np.int32)
        for row in range(count):
            sequence[row] = next_sequence[step[row]]
            next_sequence[step[row]] += 1
        columns = {
            "step": pa.array(step),
            "sequence": pa.array(sequence),
            "stage": pa.array([APPENDED] * count, type=pa.string()),
            **{name: tokens.column(name) for name in ("id", "category", "input_ids")},
            "response_mask": tokens.column("response_mask"),
        }
        parts.append(pa.table(columns).select(plan.table.column_names).cast(plan.table.schema))
    whole = pa.concat_tables(parts)
    order = np.lexsort((whole.column("sequence").to_numpy(), whole.column("step").to_numpy()))
    return plan_from_table(whole.take(pa.array(order)))


def appended_plan(
    plans: Mapping[str, TrainPlan], kept: Collection[str], doses: Mapping[str, pa.Table], seed: int
) -> TrainPlan | None:
    """The schedule that holds the appended rows of a replication; None where there are none.

    Args:
        plans: of the earlier replication, by kind.
        kept: categories whose earlier measurements hold.  Appended rows of others leave: a run
            switches on all appended rows of its category.
        doses: category -> TOKENS rows to append.
        seed: of the replication.
    """
    extended = None if "append" not in plans else _with_appended_of(plans["append"], kept)
    return extend_plan(extended or plans["main"], doses, seed) if doses else extended


def _with_appended_of(plan: TrainPlan, names: Collection[str]) -> TrainPlan | None:
    """The schedule with the appended rows of these categories alone; None where none is left."""
    columns = (plan.table.column(name).to_pylist() for name in ("stage", "category"))
    rows = list(zip(*columns, strict=True))
    kept = [stage != APPENDED or category in names for stage, category in rows]
    if not any(stage == APPENDED and category in names for stage, category in rows):
        return None
    table = plan.table.filter(pa.array(kept))
    step = table.column("step").to_numpy()
    # One row a sequence, without gaps: those that join are numbered from the count of a step.
    sequence = np.arange(len(step)) - np.searchsorted(step, step)
    place = table.column_names.index("sequence")
    column = pa.array(sequence.astype(np.int32))
    return plan_from_table(table.set_column(place, table.schema.field(place), column))


def append_replication(
    earlier: Replication,
    *,
    holding: Holding,
    directions: Sequence[str],
    rows: Mapping[str, CategoryRows],
    doses: Mapping[str, pa.Table],
    append_sha256: str | None,
) -> Replication:
    """An earlier replication with the categories that hold and the new ones.

    Args:
        earlier: of the earlier design.
        holding: which of its categories stay.
        directions: of the design.
        rows: of the new categories.
        doses: TOKENS rows of the new categories.
        append_sha256: of the schedule that has appended rows.
    """
    base = sum(share.base for share in earlier.rows.values()) + earlier.foreign_rows
    kept = {name: earlier.rows[name] for name in holding.kept}
    tokens = {name: response_tokens(table) for name, table in doses.items()}
    return replace(
        earlier,
        rows={**kept, **rows},
        dose_tokens={
            direction: {name: earlier.dose_tokens[direction][name] for name in kept} | tokens
            for direction in directions
        },
        append_sha256=append_sha256,
        foreign_rows=base - sum(share.base for share in kept.values()),
    )


def append_design(
    earlier: Design,
    name: str,
    *,
    holding: Holding,
    replications: Sequence[Replication],
    targets: Sequence[Target],
    dropped: Mapping[str, int],
) -> Design:
    """The earlier design without what is stale and with what is new.

    Args:
        earlier: the finished one.
        name: of its attempt.
        holding: what of it holds.
        replications: of `append_replication`.
        targets: the new ones.
        dropped: rows that cannot be used, by reason, beside the earlier ones.
    """
    sources = tuple(sorted({*holding.kept, *holding.new}))
    held = [target for target in earlier.targets if target.name in holding.kept]
    known = {target.name: target for target in (*held, *targets)}
    external = [target for target in earlier.targets if target.is_external]
    reasons = {*earlier.dropped, *dropped}
    before = () if earlier.append is None else earlier.append.sources
    return replace(
        earlier,
        sources=sources,
        targets=(*(known[name] for name in sources if name in known), *external),
        replications=tuple(replications),
        dropped={key: earlier.dropped.get(key, 0) + dropped.get(key, 0) for key in reasons},
        append=Append(
            earlier=name,
            sources=tuple(s for s in sources if s in holding.new or s in before),
            new=holding.new,
            stale=dict(holding.stale),
        ),
    )


def earlier_run(design: Design, earlier: Design, run: InterventionRun) -> InterventionRun | None:
    """The same run in the earlier design; None for the run of a new category."""
    assert design.append is not None, "only an appended design has an earlier one"
    if run.source < 0:
        return run
    name = design.sources[run.source]
    if name in design.append.new:
        return None
    return replace(run, source=earlier.sources.index(name))


def overlay(design: Design, joint: EffectMatrix, earlier: EffectMatrix) -> EffectMatrix:
    """The matrix of all entries, with those of the earlier design as they were.

    Errors and shrunken effects borrow strength from all entries, so an estimate over old and new
    ones together moves the old ones a little.  What was told before stays what was told.

    Args:
        design: the appended one.
        joint: its estimate from all scores.
        earlier: the estimate of the earlier design.
    """
    assert design.append is not None, "only an appended design has an earlier one"
    new = set(design.append.new)
    rows = [row for row, name in enumerate(joint.targets) if name not in new]
    columns = [column for column, name in enumerate(joint.sources) if name not in new]
    held = earlier.part(
        [joint.targets[row] for row in rows], [joint.sources[column] for column in columns]
    )
    grids = {}
    for field in fields(joint):
        if field.name.endswith("_TS"):
            grids[field.name] = getattr(joint, field.name).copy()
            grids[field.name][np.ix_(rows, columns)] = getattr(held, field.name)
    replicates, known = joint.replicate_effects_RTS, held.replicate_effects_RTS
    if replicates is not None and known is not None:
        replicates = replicates.copy()
        replicates[np.ix_(range(len(known)), rows, columns)] = known
    whole = replace(joint, replicate_effects_RTS=replicates, **grids)
    return flag_appended(design, whole)


def flag_appended(design: Design, matrix: EffectMatrix) -> EffectMatrix:
    """The matrix with its flag set where the target or the source is no category of the base."""
    target_T = np.array([design.is_appended(name) for name in matrix.targets])
    source_S = np.array([design.is_appended(name) for name in matrix.sources])
    return replace(matrix, appended_TS=target_T[:, None] | source_S[None, :])
