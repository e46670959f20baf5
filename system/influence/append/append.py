"""Appends new categories to a finished design without measuring the other categories again.

    earlier design  ── category_status ─> kept | stale | new categories of the corpus
    earlier plan    ── extend_plan ─────> the same steps plus dose rows of the new categories
    earlier scores  + new scores ───────> one matrix with flagged entries (`keep_earlier_entries`)

The base mix stays unchanged: rows, order, steps, learning rates and denominators.  It has no rows
of a new category.  So the column of a new category is measured by adding: the reference run plus a
dose of the category.  Its row comes from scoring the earlier runs on its held-out rows.  Both are
slopes at the earlier base, while a fresh design would have rows of the category in its base;
therefore the entries are flagged as appended.

The measurements of a category stay valid as long as all rows that were trained or scored for it are
still in it.  If rows have left it (another tag, a split, a removed source), the category is stale:
its numbers describe other data.  If the corpus still has a category of that name, it is measured as
a new one.
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
from system.influence.design.interventions import minimum_dose, response_tokens, seed_of
from system.influence.estimate.matrix import EffectMatrix
from system.training.plan import APPENDED, TrainPlan, plan_from_table


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryStatus:
    """Which categories of an earlier design are still valid for a corpus."""

    kept: tuple[str, ...]
    """Categories whose measurements are still valid, in the order of the corpus."""
    new: tuple[str, ...]
    """Categories of the corpus that must be measured, in its order."""
    stale: dict[str, str]
    """Category of the earlier design whose measurements are no longer valid -> reason."""


def measured_ids(
    design: Design, plans: Sequence[TrainPlan], heldout: pa.Table
) -> dict[str, dict[str, set[str]]]:
    """The rows that a design was measured with: split -> category -> ids.

    Args:
        design: the earlier design.
        plans: all its schedules: main, warm-up and appended ones.
        heldout: its held-out rows; their category is the name of the target.
    """
    ids: dict[str, dict[str, set[str]]] = {
        split: {name: set() for name in design.sources} for split in ("train", "estimate")
    }
    for plan in plans:
        columns = (plan.table.column(name).to_pylist() for name in ("category", "stage", "id"))
        for name, stage, row_id in zip(*columns, strict=True):
            # The base may hold rows of an earlier category of the same name: those do not count.
            if name in ids["train"] and design.is_appended(name) == (stage == APPENDED):
                ids["train"][name].add(row_id)
    columns = (heldout.column(name).to_pylist() for name in ("category", "id"))
    for name, row_id in zip(*columns, strict=True):
        if name in ids["estimate"]:
            ids["estimate"][name].add(row_id)
    return ids


def category_status(
    design: Design, measured: Mapping[str, Mapping[str, Collection[str]]], corpus: Corpus
) -> CategoryStatus:
    """Compares an earlier design with the present corpus.

    Args:
        design: the earlier design.
        measured: result of `measured_ids`.
        corpus: the present corpus.

    Raises:
        DataError: no category is still valid, so there is nothing to append to.
    """
    stale: dict[str, str] = {}
    for name in design.sources:
        if name not in corpus.categories:
            stale[name] = "the corpus now has no such category"
            continue
        parts = [
            f"{gone} of {len(measured[split][name])} rows {verb}"
            for split, verb in (("train", "trained"), ("estimate", "scored"))
            if (gone := _num_gone(corpus, split, name, measured[split][name]))
        ]
        if parts:
            stale[name] = f"{' and '.join(parts)} are no longer in it"
    kept = tuple(name for name in corpus.categories if name in set(design.sources) - set(stale))
    if not kept:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(stale.items()))
        raise DataError(
            "influence.append: expected that some category of the earlier result is still valid, "
            f"found none ({reasons}). Set influence.append to false to measure all categories "
            "again."
        )
    new = tuple(name for name in corpus.categories if name not in kept)
    return CategoryStatus(kept=kept, new=new, stale=stale)


def _num_gone(corpus: Corpus, split: str, category: str, ids: Collection[str]) -> int:
    left = set(ids)
    for table in corpus.iter_tables(split, category, ["id"]) if left else ():
        left.difference_update(table["id"].to_pylist())
    return len(left)


def trained_ids(plans: Mapping[str, TrainPlan], kept: Collection[str]) -> set[str]:
    """Ids of the rows that stay in the schedules of a replication.

    Args:
        plans: of the earlier replication, by kind.
        kept: categories whose earlier measurements are valid; appended rows of others are removed.
    """
    ids = set()
    for plan in plans.values():
        columns = (plan.table.column(name).to_pylist() for name in ("id", "stage", "category"))
        for row_id, stage, category in zip(*columns, strict=True):
            if stage != APPENDED or category in kept:
                ids.add(row_id)
    return ids


def first_unused_rows(
    ids_of: Callable[[int], Sequence[str]], num_rows: int, taken: Collection[str]
) -> list[int]:
    """Positions of the first rows of a seeded order that are not used yet.

    Args:
        ids_of: n -> ids of the first n rows (fewer if the category has fewer).
        num_rows: positions to find; fewer are returned if the category has fewer.
        taken: ids of the rows that are used already.
    """
    num_sampled = num_rows
    while True:
        ids = ids_of(num_sampled)
        unused = [place for place, row_id in enumerate(ids) if row_id not in taken]
        if len(unused) >= num_rows or len(ids) < num_sampled:
            return unused[:num_rows]
        num_sampled *= 2


def dose_size(category: str, available: int, asked: Mapping[str, int]) -> CategoryRows:
    """The rows of an appended category: a dose, and no rows in the base.

    Args:
        category: its name.
        available: usable rows that the base does not contain; at most one dose.
        asked: requested rows of the earlier design.

    Raises:
        DataError: fewer rows than the minimum dose.
    """
    dose = min(available, asked["dose"])
    if dose < minimum_dose(asked):
        raise DataError(
            f"influence.append: category {category!r} has {available} usable train rows that the "
            f"earlier base does not train on; expected a dose of {asked['dose']} rows, and at "
            f"least {minimum_dose(asked)}. Give it more data, or merge it into another category "
            "(sources.category_map)."
        )
    return CategoryRows(available=available, base=0, dose=dose, extra=dose, warm=0, warm_reused=0)


def extend_plan(plan: TrainPlan, doses: Mapping[str, pa.Table], seed: int) -> TrainPlan:
    """Adds rows to the steps of a schedule; its own rows, steps and denominators stay.

    The rows of a category are spread evenly over the steps, in a random order with a seed of its
    own, so their places do not depend on which other categories are appended.

    Args:
        plan: of a replication, with one row per sequence.
        doses: category -> TOKENS rows.
        seed: of the replication.
    """
    parts = [plan.table]
    next_sequence = np.diff(plan.step_starts).astype(np.int32)
    for category, tokens in doses.items():
        count = tokens.num_rows
        draw = np.random.default_rng(seed_of(seed, APPENDED, category))
        # Stratified sampling: one row per equal part of the schedule, in random order.
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
    """The schedule with the appended rows of a replication; None if there are none.

    Args:
        plans: of the earlier replication, by kind.
        kept: categories whose earlier measurements are valid.  Appended rows of others are removed,
            because a run switches on all appended rows of its category.
        doses: category -> TOKENS rows to append.
        seed: of the replication.
    """
    extended = None if "append" not in plans else _with_appended_of(plans["append"], kept)
    return extend_plan(extended or plans["main"], doses, seed) if doses else extended


def _with_appended_of(plan: TrainPlan, names: Collection[str]) -> TrainPlan | None:
    """The schedule with the appended rows of these categories alone; None if no row is left."""
    columns = (plan.table.column(name).to_pylist() for name in ("stage", "category"))
    rows = list(zip(*columns, strict=True))
    kept = [stage != APPENDED or category in names for stage, category in rows]
    if not any(stage == APPENDED and category in names for stage, category in rows):
        return None
    table = plan.table.filter(pa.array(kept))
    step = table.column("step").to_numpy()
    # Renumber the sequences without gaps: `extend_plan` continues from the count of each step.
    sequence = np.arange(len(step)) - np.searchsorted(step, step)
    place = table.column_names.index("sequence")
    column = pa.array(sequence.astype(np.int32))
    return plan_from_table(table.set_column(place, table.schema.field(place), column))


def append_replication(
    earlier: Replication,
    *,
    status: CategoryStatus,
    directions: Sequence[str],
    rows: Mapping[str, CategoryRows],
    doses: Mapping[str, pa.Table],
    append_sha256: str | None,
) -> Replication:
    """An earlier replication without stale categories and with the new ones.

    Args:
        earlier: replication of the earlier design.
        status: which categories stay.
        directions: of the design.
        rows: of the new categories.
        doses: TOKENS rows of the new categories.
        append_sha256: hash of the schedule with appended rows.
    """
    base = sum(share.base for share in earlier.rows.values()) + earlier.foreign_rows
    kept = {name: earlier.rows[name] for name in status.kept}
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
    status: CategoryStatus,
    replications: Sequence[Replication],
    targets: Sequence[Target],
    dropped: Mapping[str, int],
) -> Design:
    """The earlier design without stale categories and with the new ones.

    Args:
        earlier: the finished design.
        name: of its attempt.
        status: which of its categories stay.
        replications: results of `append_replication`.
        targets: the new targets.
        dropped: further unusable rows by reason; they are added to the earlier counts.
    """
    sources = tuple(sorted({*status.kept, *status.new}))
    kept_targets = [target for target in earlier.targets if target.name in status.kept]
    target_of = {target.name: target for target in (*kept_targets, *targets)}
    external = [target for target in earlier.targets if target.is_external]
    reasons = {*earlier.dropped, *dropped}
    before = () if earlier.append is None else earlier.append.sources
    return replace(
        earlier,
        sources=sources,
        targets=(*(target_of[name] for name in sources if name in target_of), *external),
        replications=tuple(replications),
        dropped={key: earlier.dropped.get(key, 0) + dropped.get(key, 0) for key in reasons},
        append=Append(
            earlier=name,
            sources=tuple(s for s in sources if s in status.new or s in before),
            new=status.new,
            stale=dict(status.stale),
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


def keep_earlier_entries(
    design: Design, joint: EffectMatrix, earlier: EffectMatrix
) -> EffectMatrix:
    """The joint matrix, with the entries of the earlier design unchanged.

    Errors and shrunken effects are pooled over all entries, so a joint estimate changes the earlier
    entries a little.  This function puts the published values back.

    Args:
        design: the appended design.
        joint: the estimate from all scores.
        earlier: the estimate of the earlier design.
    """
    assert design.append is not None, "only an appended design has an earlier one"
    new = set(design.append.new)
    rows = [row for row, name in enumerate(joint.targets) if name not in new]
    columns = [column for column, name in enumerate(joint.sources) if name not in new]
    kept = earlier.part(
        [joint.targets[row] for row in rows], [joint.sources[column] for column in columns]
    )
    grids = {}
    for field in fields(joint):
        if field.name.endswith("_TS"):
            grids[field.name] = getattr(joint, field.name).copy()
            grids[field.name][np.ix_(rows, columns)] = getattr(kept, field.name)
    replicates, kept_replicates = joint.replicate_effects_RTS, kept.replicate_effects_RTS
    if replicates is not None and kept_replicates is not None:
        replicates = replicates.copy()
        replicates[np.ix_(range(len(kept_replicates)), rows, columns)] = kept_replicates
    whole = replace(joint, replicate_effects_RTS=replicates, **grids)
    return flag_appended(design, whole)


def flag_appended(design: Design, matrix: EffectMatrix) -> EffectMatrix:
    """Sets the appended flag where the target or the source is not a category of the base."""
    target_T = np.array([design.is_appended(name) for name in matrix.targets])
    source_S = np.array([design.is_appended(name) for name in matrix.sources])
    return replace(matrix, appended_TS=target_T[:, None] | source_S[None, :])
