"""Plans the interventions: each run is a mask on the common schedule of its replication.

    plan rows of a replication, shuffled once    base ─────────────── dose ── base ── extra ── base
    reference                                      on                  on      on      off      on
    remove j                                       on         off where of j   on      off      on
    add j                                          on                  on      on   on where of j

"A run is a mask": all runs of a replication share steps, batches, their order, denominators and
learning rates (common random numbers).  So the difference between two runs comes from the rows and
not from another shuffle.  Replications differ in rows and in order.

`base`, `dose` and `extra` are stage names in the plan.  Dose rows are those base rows of a category
that `remove` masks.  Extra rows are trained on by `add` alone.  With several doses the name of a
row also says the smallest dose that contains it (`system.influence.design.doses`).

- `branch` first trains a warm-up on separate rows of the base mix; all runs start from it.
- `gradient` computes gradients of dose and extra rows along the warm-up and predicts the runs
  (`system.influence.measure.first_order`).
- `random-design` switches about half of all doses in every run (`mix-remove`, `mix-add`;
  `system.influence.design.random_design`).

Rows and their order depend only on hashes of (run seed, "influence", replication) and of row ids:
shards, workers and restarts cannot change them.
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
from system.influence.design.random_design import dose_patterns, runs_needed
from system.training.plan import APPENDED, TrainPlan, build_plan

BASE, DOSE, EXTRA = "base", "dose", "extra"
_MIN_DOSE_ROWS = 8

Draw = Callable[[str, str, int, int], tuple[pa.Table, dict[str, int]]]
"""(split, category, maximum rows, seed) -> (TOKENS rows in seeded order, dropped rows by reason)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A replication and its training plans."""

    replication: Replication
    plan: TrainPlan
    warm: TrainPlan | None
    dropped: dict[str, int]


def seed_of(*key: int | str) -> int:
    """A seed in [0, 2^31) from a key.  Python's `hash` would differ between processes."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 33


def requested_rows(config: InfluenceConfig) -> dict[str, int]:
    """Rows per category that the configuration requests, by role."""
    return {
        "base": config.rows_per_category,
        "dose": config.largest_dose,
        "extra": config.largest_dose if "add" in config.directions else 0,
        "warm": config.warm_rows_per_category if ESTIMATORS[config.design].is_warmed else 0,
        "heldout": config.heldout_rows,
    }


def minimum_dose(requested: Mapping[str, int]) -> int:
    """Minimum rows of a dose; an effect of fewer rows could not be measured."""
    return min(_MIN_DOSE_ROWS, requested["dose"])


def allocate_rows(category: str, available: int, requested: Mapping[str, int]) -> CategoryRows:
    """Divides a category's rows into base, dose, extra and warm-up rows.

    With enough rows every role gets what was requested.  With fewer rows, base, dose and extra
    shrink in proportion: effects are per row, and the design records the actual dose.  Warm-up rows
    are then base rows that are used twice.

    Raises:
        DataError: the dose would have fewer rows than `minimum_dose`.
    """
    base, dose, extra, warm = (requested[name] for name in ("base", "dose", "extra", "warm"))
    if available < base + extra:
        share = available / (base + extra)
        extra = int(extra * share)
        base = available - extra
        dose = extra if requested["extra"] == requested["dose"] else int(dose * share)
    least = minimum_dose(requested)
    if dose < least:
        needed = -(-least * (requested["base"] + requested["extra"]) // requested["dose"])
        raise DataError(
            f"influence: category {category!r} has {available} usable train rows, which leaves a "
            f"dose of {dose}; expected {sum(requested[k] for k in ('base', 'extra', 'warm'))} rows "
            f"({requested['base']} base, {requested['extra']} to add, {requested['warm']} "
            f"warm-up), and at least {needed}. Give it more data, merge it into another category "
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
    """Shortens doses to at most `most_tokens` response tokens.

    Args:
        share: the category's rows; its doses are the largest that are allowed.
        response_N: [N] response tokens of the drawn rows, in order; it must cover all base and
            extra rows.
        most_tokens: `influence.dose_tokens`; None leaves the doses as they are.
        least: minimum rows of a dose, even if they have more tokens.
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
    """Draws the rows of a replication and builds its schedules.

    Raises:
        DataError: a category has too few rows.
    """
    seed = seed_of(run_seed, "influence", index)
    requested = requested_rows(config)
    num_rows = requested["base"] + requested["extra"] + requested["warm"]
    rows: dict[str, CategoryRows] = {}
    parts: list[pa.Table] = []
    roles: list[str] = []
    warm_parts: list[pa.Table] = []
    dose_tokens: dict[str, dict[str, int]] = {name: {} for name in config.directions}
    part_tokens: dict[str, dict[str, list[int]]] = {name: {} for name in config.directions}
    dropped: Counter[str] = Counter()
    for category in sources:
        tokens, lost = draw("train", category, num_rows, seed)
        dropped.update(lost)
        share = allocate_rows(category, tokens.num_rows, requested)
        if config.dose_tokens is not None:
            lengths_N = _response_lengths(tokens.slice(0, share.base + share.extra))
            share = fit_dose(share, lengths_N, config.dose_tokens, minimum_dose(requested))
        rows[category] = share
        # Order of the drawn rows: dose, rest of base, extra, warm-up. `role_tokens` relies on it.
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
        unused = tokens.slice(split, share.warm - share.warm_reused)
        warm_parts += [unused, tokens.slice(0, share.warm_reused)]
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
    """Dose patterns of `random-design`: direction -> run -> source -> whether its dose is active.

    Args:
        seed: of the replication.
        config: estimator and directions.
        num_sources: number of categories.
    """
    if config.design != "random-design":
        return {}
    runs = runs_needed(num_sources)
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
    """A plan of all rows, in an order that depends only on the seed and the rows."""
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
    """[plan rows] bool: the mask of a run, true for the rows that it trains on."""
    labels = plan.table.column("stage").to_pylist()
    if run.kind == "warm":
        return np.ones(len(labels), dtype=bool)
    # Start from the reference run: no extra rows, no appended rows.
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
    """How a run changes the base schedule: the direction, and the sources whose doses it switches.

    Args:
        kind: of the run; not `warm`.
        source: index of its source or pattern.
        sources: all categories.
        patterns: of the replication (`random-design`).
    """
    if kind == "reference":
        return "remove", set()
    direction = kind.removeprefix("mix-")
    if kind == direction:
        return direction, {sources[source]}
    # A pattern names the doses that are active: `mix-add` switches these on, while `mix-remove`
    # switches all others off.
    pairs = zip(sources, patterns[direction][source], strict=True)
    return direction, {name for name, is_in in pairs if is_in == (direction == "add")}


def response_tokens(tokens: pa.Table) -> int:
    """Number of tokens with a loss: response tokens that have a token before them."""
    return int(_response_lengths(tokens).sum())


def _response_lengths(tokens: pa.Table) -> np.ndarray:
    """[rows] tokens with a loss in every row; token 0 has none, because nothing predicts it."""
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
    """Builds the design from drawn schedules and targets.

    Raises:
        DataError: fewer than two source categories, so nothing can interact.
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
        asked=requested_rows(config)
        | ({} if config.dose_tokens is None else {"dose_tokens": config.dose_tokens}),
        dropped=dict(dropped),
        gradient_checkpoints=(config.gradient_checkpoints if config.estimator == "gradient" else 0),
        doses=config.doses if len(config.doses) > 1 else (),
    )
