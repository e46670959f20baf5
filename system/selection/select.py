"""Turns the quotas of curriculum stages and categories into rows of the corpus, in training order.

The rows of a category are ordered by the method (`system.selection.choose`).  The first curriculum
stage takes the first rows, and the next stage continues where it ended.  Only when a quota is
larger than the number of usable rows does the category start again from its first row (a repeat).
Within a stage the order is `sha256(seed:stage:id:repeat)`.  So the selection depends on rows,
quotas and seed alone, not on shards, files or workers.

Memory holds an index only: 40 bytes for each selected example, and twice that while a category is
searched.  `system.selection.parts` fetches the rows shard by shard and writes them part by part.
Called by `actors.selector` for stage `select`, and by `actors.evaluator` for each arm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from system.config import SelectConfig
from system.data.corpus import Corpus, Shard
from system.errors import DataError
from system.schema import SELECTION
from system.selection.candidates import digests
from system.selection.choose import Chosen, choose_rows

SHUFFLED = "shuffled"
"""Name of the only curriculum stage of an arm in shuffled order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageQuota:
    """Number of examples of each category in one curriculum stage."""

    name: str
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """All training examples, as places in the corpus, in training order."""

    stages: tuple[str, ...]
    shards: tuple[Shard, ...]
    stage: np.ndarray
    """[N] int16: index into `stages`."""
    shard: np.ndarray
    """[N] int32: index into `shards`."""
    row: np.ndarray
    """[N] int32: row within the shard."""
    counts: dict[str, dict[str, int]]
    """Stage -> category -> examples."""
    repeats: dict[str, int]
    """Category -> number of examples that use a row for the second time or more."""


def read_quotas(curriculum: Mapping[str, Any]) -> tuple[StageQuota, ...]:
    """Reads the quotas of all stages from the content of a curriculum.json.

    Raises:
        DataError: a count is not a whole number, or a stage's name occurs twice.
    """
    quotas = tuple(
        StageQuota(name=stage["name"], counts=dict(stage["counts"]))
        for stage in curriculum["stages"]
    )
    names = [quota.name for quota in quotas]
    if len(set(names)) < len(names):
        raise DataError(f"curriculum: expected stages of different names, found {names}")
    for quota in quotas:
        for category, count in quota.counts.items():
            if not isinstance(count, int) or count < 0:
                raise DataError(
                    f"curriculum: expected a whole number >= 0 of examples of {category!r} in "
                    f"stage {quota.name!r}, found {count!r}"
                )
    return quotas


def totals(quotas: Sequence[StageQuota]) -> dict[str, int]:
    """Examples of each category in all stages together; categories without examples are omitted."""
    summed: Counter[str] = Counter()
    for quota in quotas:
        summed.update(quota.counts)
    return {category: count for category, count in sorted(summed.items()) if count}


def check_chosen(
    quotas: Sequence[StageQuota], chosen: Mapping[str, Chosen], settings: SelectConfig
) -> None:
    """Checks that the chosen rows satisfy the quotas and that few rows are quarantined.

    Raises:
        DataError: too many rows are quarantined, or a quota needs repeats that are not allowed.
    """
    num_quarantined = sum(rows.quarantined.num_rows for rows in chosen.values())
    supply = sum(rows.supply for rows in chosen.values())
    if num_quarantined > settings.max_quarantined_share * supply:
        first = next(rows.quarantined for rows in chosen.values() if rows.quarantined.num_rows)
        examples = ", ".join(
            f"{row['id']}: {row['reason']}" for row in first.slice(0, 3).to_pylist()
        )
        raise DataError(
            f"{num_quarantined:,} of {supply:,} train rows have no usable score or vector, more "
            f"than select.max_quarantined_share = {settings.max_quarantined_share} allows. The "
            f"first ones ({first['category'][0].as_py()}): {examples}. Correct the scores or "
            f"vectors (select.score: {settings.score}, select.embedding: {settings.embedding}), "
            "or raise the limit."
        )
    if settings.repeats:
        return
    for category, quota in totals(quotas).items():
        usable = len(chosen[category].row)
        if usable < quota:
            raise DataError(
                f"category {category!r}: the stages need {quota:,} examples, but only {usable:,} "
                f"of its {chosen[category].supply:,} train rows can be chosen, and select.repeats "
                "is false. Lower solve.budget or solve.upper, raise select.max_similarity if "
                "similar rows are left out, or allow repeats."
            )


def arrange(
    corpus: Corpus, quotas: Sequence[StageQuota], chosen: Mapping[str, Chosen], seed: int
) -> Selection:
    """Distributes the chosen rows over the stages and orders the rows of each stage.

    Raises:
        DataError: a stage needs a category of which no row can be chosen.
    """
    # One list of shards for all categories; a category's own shard numbers start at its base.
    shards: list[Shard] = []
    bases: dict[str, int] = {}
    for category in sorted(chosen):
        bases[category] = len(shards)
        shards += corpus.shards("train", category)
    taken: Counter[str] = Counter()
    repeats: Counter[str] = Counter()
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, quota in enumerate(quotas):
        keys, shard, row = [], [], []
        for category, count in sorted(quota.counts.items()):
            if not count:
                continue
            rows = chosen[category]
            if not len(rows.row):
                raise DataError(
                    f"stage {quota.name!r} needs {count:,} examples of {category!r}, which has no "
                    f"usable train rows ({rows.quarantined.num_rows:,} quarantined); solve the "
                    "mix again for this corpus"
                )
            # Counted on over all stages, so that a row repeats only after all others were used.
            draw = np.arange(taken[category], taken[category] + count)
            taken[category] += count
            place, repeat = draw % len(rows.row), draw // len(rows.row)
            repeats[category] += int((repeat > 0).sum())
            keys.append(_order_keys(rows.ids[place], repeat, quota.name, seed))
            shard.append(rows.shard[place] + bases[category])
            row.append(rows.row[place])
        if keys:
            # By hash over all categories: this mixes them and does not depend on their order.
            key = np.concatenate(keys)
            order = np.lexsort((key[:, 1], key[:, 0]))
            stage = np.full(len(order), number, np.int16)
            columns.append((stage, np.concatenate(shard)[order], np.concatenate(row)[order]))
    if not columns:
        raise DataError("the curriculum: expected at least one example, found none in any stage")
    stage, shard, row = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Selection(
        stages=tuple(quota.name for quota in quotas),
        shards=tuple(shards),
        stage=stage,
        shard=shard.astype(np.int32),
        row=row.astype(np.int32),
        counts={quota.name: dict(sorted(quota.counts.items())) for quota in quotas},
        repeats={category: count for category, count in sorted(repeats.items()) if count},
    )


def _order_keys(ids: np.ndarray, repeat: np.ndarray, stage: str, seed: int) -> np.ndarray:
    """[K, 2] uint64: sort keys of the order within a stage."""
    keys = np.zeros((len(ids), 2), np.uint64)
    for number in np.unique(repeat):
        where = repeat == number
        text = ids[where].tobytes().hex()
        names = [text[start : start + 32] for start in range(0, len(text), 32)]
        keys[where] = digests(f"{seed}:{stage}:", names, f":{number}")
    return keys


def select_arm(
    corpus: Corpus,
    counts: Mapping[str, int],
    seed: int,
    *,
    curriculum: Mapping[str, Any] | None = None,
    settings: SelectConfig | None = None,
    attempt: str = "",
) -> pa.Table:
    """Selects the training examples of one evaluation arm, in training order, in memory.

    Args:
        corpus: its train rows are used.
        counts: number of examples of each category.
        seed: each seed draws other examples and another order. With the same seed, two arms use
            the same rows of a category as far as their counts allow.
        curriculum: content of a curriculum.json whose stages add up to `counts`; None shuffles all
            examples as one stage.
        settings: how the rows of a category are ordered; None: `random`.
        attempt: attempt of stage `select` that holds scores and vectors.

    Returns:
        SELECTION table.

    Raises:
        DataError: the stages do not add up to the counts, or a category has no train rows.
    """
    arm_counts = {category: int(count) for category, count in sorted(counts.items()) if count}
    if curriculum is None:
        quotas = (StageQuota(name=SHUFFLED, counts=arm_counts),)
    else:
        quotas = read_quotas(curriculum)
        if totals(quotas) != arm_counts:
            raise DataError(
                f"the curriculum: expected stages that add up to {arm_counts}, found "
                f"{totals(quotas)}"
            )
    rule = settings or SelectConfig()
    chosen = {
        category: choose_rows(corpus, category, count, rule, seed, attempt)
        for category, count in arm_counts.items()
    }
    selection = arrange(corpus, quotas, chosen, seed)
    # Every shard is read once; the rows are brought into training order afterwards.
    bodies = [
        rows_of_shard(corpus, selection, number) for number in np.unique(selection.shard).tolist()
    ]
    table = pa.concat_tables(bodies)
    return table.take(pa.array(np.argsort(np.asarray(table["position"])))).combine_chunks()


def rows_of_shard(corpus: Corpus, selection: Selection, number: int) -> pa.Table:
    """The selected rows of one shard as a SELECTION table, ordered by position."""
    positions = np.flatnonzero(selection.shard == number)
    return fetch_rows(
        corpus,
        selection.shards[number],
        selection.row[positions],
        positions,
        [selection.stages[k] for k in selection.stage[positions]],
    )


def fetch_rows(
    corpus: Corpus, shard: Shard, rows: np.ndarray, positions: np.ndarray, stages: Sequence[str]
) -> pa.Table:
    """Reads rows of a shard as a SELECTION table, in the order of the arguments."""
    body = corpus.read_shard(shard, ["id", "category", "messages"]).take(pa.array(rows))
    columns = {
        "stage": pa.array(stages, pa.string()),
        "position": pa.array(positions, pa.int64()),
        **{name: body[name] for name in body.column_names},
    }
    return pa.table(columns, schema=SELECTION)
