"""Which examples train, in which order: quotas of stages and categories to places in the corpus.

Rows of a category come in the order of the method (`system.selection.choose`); the first stage
takes the first ones, the next stage goes on where it ended, and only a quota beyond what can be
chosen begins again from the first (a repeat).  Within a stage the order is
`sha256(seed:stage:id:repeat)`.  So the selection depends on rows, quotas and seed alone: not on
shards, files or workers.

What is held in memory is an index, 40 bytes for each selected example (twice that while a category
is searched).  Bodies are fetched shard by shard and written part by part
(`system.selection.parts`).
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
"""Name of the single stage of an arm without a curriculum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageQuota:
    """How many examples of each category a stage takes."""

    name: str
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Every training example by its place in the corpus, in training order."""

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
    """Category -> examples that are there for the second time or more."""


def read_quotas(curriculum: Mapping[str, Any]) -> tuple[StageQuota, ...]:
    """The stages of a curriculum.json.

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
                    f"curriculum: stage {quota.name!r} asks for {count!r} examples of "
                    f"{category!r}; expected a whole number >= 0"
                )
    return quotas


def totals(quotas: Sequence[StageQuota]) -> dict[str, int]:
    """Examples of each category over all stages, categories without any left out."""
    summed: Counter[str] = Counter()
    for quota in quotas:
        summed.update(quota.counts)
    return {category: count for category, count in sorted(summed.items()) if count}


def check_chosen(
    quotas: Sequence[StageQuota], chosen: Mapping[str, Chosen], settings: SelectConfig
) -> None:
    """Whether what was chosen is enough, and sound.

    Raises:
        DataError: too many rows are quarantined, or a quota needs repeats that are not allowed.
    """
    lost = sum(rows.quarantined.num_rows for rows in chosen.values())
    supply = sum(rows.supply for rows in chosen.values())
    if lost > settings.max_quarantined_share * supply:
        first = next(rows.quarantined for rows in chosen.values() if rows.quarantined.num_rows)
        examples = ", ".join(
            f"{row['id']}: {row['reason']}" for row in first.slice(0, 3).to_pylist()
        )
        raise DataError(
            f"{lost:,} of {supply:,} train rows have no usable score or vector, more than "
            f"select.max_quarantined_share = {settings.max_quarantined_share} allows. The first "
            f"ones ({first['category'][0].as_py()}): {examples}. Correct where they come from "
            f"(select.score: {settings.score}, select.embedding: {settings.embedding}), or raise "
            "the limit."
        )
    if settings.repeats:
        return
    for category, wanted in totals(quotas).items():
        found = len(chosen[category].row)
        if found < wanted:
            raise DataError(
                f"category {category!r}: the stages ask for {wanted:,} examples, but {found:,} of "
                f"its {chosen[category].supply:,} train rows can be chosen and select.repeats is "
                "false. Lower solve.budget or solve.upper, raise select.max_similarity where "
                "similar rows are left out, or allow repeats."
            )


def arrange(
    corpus: Corpus, quotas: Sequence[StageQuota], chosen: Mapping[str, Chosen], seed: int
) -> Selection:
    """Deals the chosen rows out to the stages and puts each stage in order.

    Raises:
        DataError: a stage asks for a category of which no row can be chosen.
    """
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
                    f"stage {quota.name!r} asks for {count:,} examples of {category!r}, which has "
                    f"no train rows to choose among ({rows.quarantined.num_rows:,} quarantined); "
                    "solve the mix again for this corpus"
                )
            turn = np.arange(taken[category], taken[category] + count)
            taken[category] += count
            place, repeat = turn % len(rows.row), turn // len(rows.row)
            repeats[category] += int((repeat > 0).sum())
            keys.append(_order_keys(rows.ids[place], repeat, quota.name, seed))
            shard.append(rows.shard[place] + bases[category])
            row.append(rows.row[place])
        if keys:
            key = np.concatenate(keys)
            order = np.lexsort((key[:, 1], key[:, 0]))
            stage = np.full(len(order), number, np.int16)
            columns.append((stage, np.concatenate(shard)[order], np.concatenate(row)[order]))
    if not columns:
        raise DataError("the curriculum asks for no example at all")
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
    """[K, 2] uint64: what the order within a stage is sorted by."""
    keys = np.zeros((len(ids), 2), np.uint64)
    for turn in np.unique(repeat):
        where = repeat == turn
        text = ids[where].tobytes().hex()
        names = [text[start : start + 32] for start in range(0, len(text), 32)]
        keys[where] = digests(f"{seed}:{stage}:", names, f":{turn}")
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
    """The training examples of one evaluation arm, in order, in memory.

    Args:
        corpus: train rows are taken from it.
        counts: examples of each category.
        seed: other seeds draw other examples and another order; with the same one, two arms take
            the same rows of a category as far as their counts allow.
        curriculum: content of a curriculum.json whose stages add up to `counts`; None shuffles all
            examples as one stage.
        settings: how rows of a category are ordered; None: `random`.
        attempt: of stage `select`, where scores and vectors lie.

    Returns:
        SELECTION table.

    Raises:
        DataError: the stages do not add up to the counts, or a category has no train rows.
    """
    wanted = {category: int(count) for category, count in sorted(counts.items()) if count}
    if curriculum is None:
        quotas = (StageQuota(name=SHUFFLED, counts=wanted),)
    else:
        quotas = read_quotas(curriculum)
        if totals(quotas) != wanted:
            raise DataError(
                f"the curriculum's stages add up to {totals(quotas)}, expected {wanted}"
            )
    rule = settings or SelectConfig()
    chosen = {
        category: choose_rows(corpus, category, count, rule, seed, attempt)
        for category, count in wanted.items()
    }
    selection = arrange(corpus, quotas, chosen, seed)
    bodies = [
        rows_of_shard(corpus, selection, number) for number in np.unique(selection.shard).tolist()
    ]
    table = pa.concat_tables(bodies)
    return table.take(pa.array(np.argsort(np.asarray(table["position"])))).combine_chunks()


def rows_of_shard(corpus: Corpus, selection: Selection, number: int) -> pa.Table:
    """The selected rows of one shard as a SELECTION table, by position."""
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
    """These rows of a shard as a SELECTION table, in the order given."""
    body = corpus.read_shard(shard, ["id", "category", "messages"]).take(pa.array(rows))
    columns = {
        "stage": pa.array(stages, pa.string()),
        "position": pa.array(positions, pa.int64()),
        **{name: body[name] for name in body.column_names},
    }
    return pa.table(columns, schema=SELECTION)
