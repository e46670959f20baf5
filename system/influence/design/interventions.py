"""Which runs to make: interventions as masks on one common schedule per replication.

    plan rows of a replication, shuffled once    base ─────────────── dose ── base ── extra ── base
    reference                                      on                  on      on      off      on
    remove j                                       on         off where of j   on      off      on
    add j                                          on                  on      on   on where of j

A run is a mask; steps, batches, their order, denominators and learning rates are those of all runs
of the replication (common random numbers), so that a difference between two runs is what the rows
did and not what another shuffle did.  Replications differ in rows and in order.  `base`, `dose`
and `extra` are the plan's stage names: dose rows are the part of a category's base rows that
`remove` masks, extra rows those that only `add` trains on.  With several doses a row's name says
the smallest dose that it is part of (`system.influence.design.doses`).

`branch` trains each replication's base mix once on rows of its own (the warm-up) and starts all its
runs from there.  `gradient` takes gradients along the warm-up, of dose and extra rows, and predicts
the runs (`system.influence.measure.first_order`).  `random-design` switches about half of all doses
in every run (`mix-remove`, `mix-add`), see `system.influence.design.random_design`.

Every choice of rows and order comes from hashes of (run seed, "influence", replication) and row
ids: shards, workers and restarts cannot change it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from system.config import InfluenceConfig
from system.errors import DataError
from system.influence.design.design import (
    CategoryRows,
    Design,
    InterventionRun,
    Replication,
    Target,
)
from system.influence.design.doses import dose_labels, is_in_dose, smaller_tokens, without_doses
from system.influence.design.estimators import APPEND, ESTIMATORS
from system.influence.design.random_design import dose_patterns, enough_runs
from system.training.plan import APPENDED, TrainPlan, build_plan

BASE, DOSE, EXTRA = "base", "dose", "extra"
_LEAST_DOSE = 8

Draw = Callable[[str, str, int, int], tuple[pa.Table, dict[str, int]]]
"""(split, category, at most so many rows, seed) -> TOKENS rows in seeded order, dropped counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A replication with its plans."""

    replication: Replication
    plan: TrainPlan
    warm: TrainPlan | None
    dropped: dict[str, int]


def seed_of(*key: int | str) -> int:
    """A seed in [0, 2^31) from a key; `hash` would differ between processes."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 33


def asked_rows(config: InfluenceConfig) -> dict[str, int]:
    """Rows a category that the configuration asks for."""
    return {
        "base": config.rows_per_category,
        "dose": config.largest_dose,
        "extra": config.largest_dose if "add" in config.directions else 0,
        "warm": config.warm_rows_per_category if ESTIMATORS[config.design].is_warmed else 0,
        "heldout": config.heldout_rows,
    }


def least_dose(asked: Mapping[str, int]) -> int:
    """Rows below which a dose says nothing."""
    return min(_LEAST_DOSE, asked["dose"])


def allocate_rows(category: str, available: int, asked: Mapping[str, int]) -> CategoryRows:
    """How a category's rows are shared out when there may be too few of them.

    With enough rows everything is as asked.  With fewer, base, dose and extra rows shrink in
    proportion (effects are per row, and the dose is written down); warm-up rows are then base rows
    used twice.

    Raises:
        DataError: not even a dose of 8 rows (or the whole dose asked, if smaller) is left.
    """
    base, dose, extra, warm = (asked[name] for name in ("base", "dose", "extra", "warm"))
    if available < base + extra:
        share = available / (base + extra)
        extra = int(extra * share)
        base = available - extra
        dose = extra if asked["extra"] == asked["dose"] else int(dose * share)
    least = least_dose(asked)
    if dose < least:
        needed = -(-least * (asked["base"] + asked["extra"]) // asked["dose"])
        raise DataError(
            f"influence: category {category!r} has {available} usable train rows, which leaves a "
            f"dose of {dose}; expected {asked['base'] + asked['extra'] + asked['warm']} rows "
            f"({asked['base']} base, {asked['extra']} to add, {asked['warm']} warm-up), and at "
            f"least {needed}. Give it more data, merge it into another category "
            "(sources.category_map), or lower influence.rows_per_category and influence.dose_rows."
        )
    left = available - base - extra
    return CategoryRows(
        available=available,
        base=base,
        dose=dose,
        extra=extra,
        warm=min(warm, left + base),
        warm_reused=max(0, min(warm, left + base) - left),
    )


def fit_dose(
    share: CategoryRows, response_N: np.ndarray, most_tokens: int | None, least: int
) -> CategoryRows:
    """The category's rows with doses of at most so many response tokens.

    Args:
        share: with doses in rows, which are the most that a dose may have.
        response_N: [N] response tokens of the drawn rows, in their order; at least those of the
            base and extra rows.
        most_tokens: `influence.dose_tokens`; None: doses stay as they are.
        least: rows that a dose has even if they are longer.
    """
    if most_tokens is None:
        return share

    def fitting(start: int, rows: int) -> int:
        within = np.cumsum(response_N[start : start + rows]) <= most_tokens
        return min(rows, max(int(np.count_nonzero(within)), least))

    return replace(share, dose=fitting(0, share.dose), extra=fitting(share.base, share.extra))


def plan_replication(
    index: int,
    *,
    run_seed: int,
    sources: tuple[str, ...],
    config: InfluenceConfig,
    max_length: int,
    draw: Draw,
) -> Schedule:
    """Draws a replication's rows and builds its schedules.

    Raises:
        DataError: a category has too few rows.
    """
    seed = seed_of(run_seed, "influence", index)
    asked = asked_rows(config)
    wanted = asked["base"] + asked["extra"] + asked["warm"]
    rows: dict[str, CategoryRows] = {}
    parts: list[pa.Table] = []
    roles: list[str] = []
    warm_parts: list[pa.Table] = []
    dose_tokens: dict[str, dict[str, int]] = {name: {} for name in config.directions}
    part_tokens: dict[str, dict[str, list[int]]] = {name: {} for name in config.directions}
    dropped: Counter[str] = Counter()
    for category in sources:
        tokens, lost = draw("train", category, wanted, seed)
        dropped.update(lost)
        share = allocate_rows(category, tokens.num_rows, asked)
        if config.dose_tokens is not None:
            lengths_N = _response_lengths(tokens.slice(0, share.base + share.extra))
            share = fit_dose(share, lengths_N, config.dose_tokens, least_dose(asked))
        rows[category] = share
        split = share.base + share.extra
        parts.append(tokens.slice(0, split))
        roles += dose_labels(DOSE, share.dose, config.doses)
        roles += [BASE] * (share.base - share.dose)
        roles += dose_labels(EXTRA, share.extra, config.doses)
        for direction in config.directions:
            start = share.base if direction == "add" else 0
            part = tokens.slice(start, share.extra if direction == "add" else share.dose)
            dose_tokens[direction][category] = response_tokens(part)
            part_tokens[direction][category] = smaller_tokens(part, config.doses, response_tokens)
        fresh = tokens.slice(split, share.warm - share.warm_reused)
        warm_parts += [fresh, tokens.slice(0, share.warm_reused)]
    plan = _shuffled_plan(parts, roles, (seed, "order"), config, max_length)
    warm = None
    if ESTIMATORS[config.design].is_warmed:
        warm = _shuffled_plan(warm_parts, None, (seed, "warm"), config, max_length)
    replication = Replication(
        index=index,
        seed=seed,
        plan_sha256=without_doses(plan).sha256,
        warm_sha256=None if warm is None else warm.sha256,
        num_steps=plan.num_steps,
        rows=rows,
        dose_tokens=dose_tokens,
        patterns=draw_patterns(seed, config, len(sources)),
        smaller_tokens=part_tokens if len(config.doses) > 1 else {},
    )
    return Schedule(replication=replication, plan=plan, warm=warm, dropped=dict(dropped))


def draw_patterns(
    seed: int, config: InfluenceConfig, num_sources: int
) -> dict[str, list[list[bool]]]:
    """`random-design`: direction -> run -> source -> whether its dose is in the run.

    Args:
        seed: of the replication.
        config: estimator and directions.
        num_sources: categories.
    """
    if config.design != "random-design":
        return {}
    runs = enough_runs(num_sources)
    return {
        direction: dose_patterns(seed_of(seed, direction), runs, num_sources).tolist()
        for direction in config.directions
    }


def _shuffled_plan(
    parts: list[pa.Table],
    roles: list[str] | None,
    seed: tuple[int, str],
    config: InfluenceConfig,
    max_length: int,
) -> TrainPlan:
    """A plan of all rows in an order that depends on the seed and the rows alone."""
    table = pa.concat_tables(parts)
    order = np.random.default_rng(seed_of(*seed)).permutation(table.num_rows)
    names = roles or ["warm"] * table.num_rows
    return build_plan(
        table.take(pa.array(order)),
        [names[row] for row in order],
        batch_size=config.batch_size,
        max_length=max_length,
        packing=False,
    )


def active_rows(plan: TrainPlan, run: InterventionRun, design: Design) -> np.ndarray:
    """[plan rows] bool: the mask of a run on its replication's common schedule."""
    labels = plan.table.column("stage").to_pylist()
    if run.kind == "warm":
        return np.ones(len(labels), dtype=bool)
    active = ~is_in_dose(labels, EXTRA) & ~is_in_dose(labels, APPENDED)
    direction, switched = switched_sources(
        run.kind,
        run.source,
        design.sources,
        design.replications[run.replication].patterns,
    )
    category = plan.table.column("category").to_pylist()
    of_switched = np.array([name in switched for name in category], dtype=bool)
    if direction == "add":
        return active | (of_switched & is_in_dose(labels, EXTRA, run.dose))
    if direction == APPEND:
        return active | (of_switched & is_in_dose(labels, APPENDED))
    return active & ~(of_switched & is_in_dose(labels, DOSE, run.dose))


def switched_sources(
    kind: str, source: int, sources: Sequence[str], patterns: Mapping[str, Sequence[Sequence[bool]]]
) -> tuple[str, set[str]]:
    """What a run does to the base schedule: the direction, and the sources whose doses move.

    Args:
        kind: of the run, but no warm-up.
        source: its source or pattern.
        sources: all categories.
        patterns: of the replication (`random-design`).
    """
    if kind == "reference":
        return "remove", set()
    direction = kind.removeprefix("mix-")
    if kind == direction:
        return direction, {sources[source]}
    # A pattern says whose dose is in the run: switched on where adding, off where removing.
    pairs = zip(sources, patterns[direction][source], strict=True)
    return direction, {name for name, is_in in pairs if is_in == (direction == "add")}


def response_tokens(tokens: pa.Table) -> int:
    """Tokens that a loss counts: response tokens that have a token before them."""
    return int(_response_lengths(tokens).sum())


def _response_lengths(tokens: pa.Table) -> np.ndarray:
    """[rows] the same of every row."""
    masks = tokens.column("response_mask").to_pylist()
    return np.array([sum(mask[1:]) for mask in masks], dtype=np.int64)


def assemble_design(
    *,
    run_seed: int,
    config: InfluenceConfig,
    sources: tuple[str, ...],
    targets: tuple[Target, ...],
    schedules: list[Schedule],
    heldout_dropped: Mapping[str, int],
) -> Design:
    """The design of drawn schedules and targets.

    Raises:
        DataError: fewer than two source categories: nothing can interact.
    """
    if len(sources) < 2:
        raise DataError(
            f"influence: expected at least two categories, found {list(sources)}: nothing can "
            "interact. Give rows several categories (sources.category_column, tag.categories)."
        )
    dropped = Counter(heldout_dropped)
    for schedule in schedules:
        dropped.update(schedule.dropped)
    return Design(
        estimator=config.design,
        seed=run_seed,
        directions=tuple(config.directions),
        sources=sources,
        targets=targets,
        replications=tuple(schedule.replication for schedule in schedules),
        asked=asked_rows(config)
        | ({} if config.dose_tokens is None else {"dose_tokens": config.dose_tokens}),
        dropped=dict(dropped),
        gradient_checkpoints=(config.gradient_checkpoints if config.estimator == "gradient" else 0),
        doses=config.doses if len(config.doses) > 1 else (),
    )
