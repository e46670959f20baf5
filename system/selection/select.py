"""Which examples train, in which order: quotas of stages and categories to places in the corpus.

Rows of a category are ordered by `sha256(seed:id)` (or by score first); the first stage takes the
first ones, the next stage goes on where it ended, and only a quota beyond the supply begins again
from the first (a repeat).  Within a stage the order is `sha256(seed:stage:id:repeat)`.  So the
selection depends on ids, quotas and seed alone: not on shards, files or workers.

What is held in memory is an index, 40 bytes for each selected example (twice that while a category
is searched).  Bodies are fetched shard by shard and written part by part
(`system.selection.parts`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from system.data.corpus import Corpus, Shard
from system.errors import DataError
from system.schema import SELECTION

Method = Literal["random", "quality"]

SHUFFLED = "shuffled"
"""Name of the single stage of an arm without a curriculum."""

_PRUNE_SLACK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StageQuota:
    """How many examples of each category a stage takes."""

    name: str
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The first rows of a category, in its seeded order."""

    category: str
    supply: int
    """Rows that the category has."""
    ids: np.ndarray
    """[K, 16] uint8: content ids."""
    shard: np.ndarray
    """[K] int32: place in `Corpus.shards("train", category)`."""
    row: np.ndarray
    """[K] int32: row within the shard."""


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


def choose_rows(corpus: Corpus, category: str, num_rows: int, method: Method, seed: int) -> Chosen:
    """The first rows of a category's seeded order; all of them where it has no more.

    Streams over the ids (and scores); holds at most 2 * num_rows + 65,536 candidates.
    """
    shards = corpus.shards("train", category)
    columns = ["id", "score"] if method == "quality" else ["id"]
    held = _Candidates(num_rows)
    for place, shard in enumerate(shards):
        table = corpus.read_shard(shard, columns)
        ids = table["id"].to_pylist()
        worth = (
            np.asarray(table["score"].fill_null(-np.inf), np.float64)
            if method == "quality"
            else np.zeros(len(ids))
        )
        held.add(ids, digests(f"{seed}:", ids), worth, place)
    ids, shard_numbers, rows = held.best()
    return Chosen(
        category=category,
        supply=sum(shard.rows for shard in shards),
        ids=ids,
        shard=shard_numbers,
        row=rows,
    )


def digests(prefix: str, ids: Sequence[str], suffix: str = "") -> np.ndarray:
    """[N, 2] uint64: first 128 bits of `sha256(prefix + id + suffix)`, to sort by."""
    head = hashlib.sha256(prefix.encode())
    parts = []
    for row_id in ids:
        digest = head.copy()
        digest.update((row_id + suffix).encode())
        parts.append(digest.digest()[:16])
    return np.frombuffer(b"".join(parts), ">u8").reshape(-1, 2).astype(np.uint64)


class _Candidates:
    """The best rows so far: highest worth first, then smallest digest."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._held = 0

    def add(self, ids: list[str], digest: np.ndarray, worth: np.ndarray, shard: int) -> None:
        raw = np.frombuffer(bytes.fromhex("".join(ids)), np.uint8).reshape(-1, 16)
        count = len(ids)
        self._parts.append(
            (raw, digest, worth, np.full(count, shard, np.int32), np.arange(count, dtype=np.int32))
        )
        self._held += count
        if self._held > 2 * self._num_rows + _PRUNE_SLACK:
            self._prune()

    def _prune(self) -> None:
        if not self._parts:
            return
        raw, digest, worth, shard, row = (
            np.concatenate(column) for column in zip(*self._parts, strict=True)
        )
        order = np.lexsort((digest[:, 1], digest[:, 0], -worth))[: self._num_rows]
        self._parts = [(raw[order], digest[order], worth[order], shard[order], row[order])]
        self._held = len(order)

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, shards and rows, best first."""
        self._prune()
        if not self._parts:
            return np.zeros((0, 16), np.uint8), np.zeros(0, np.int32), np.zeros(0, np.int32)
        raw, _, _, shard, row = self._parts[0]
        return raw, shard, row


def totals(quotas: Sequence[StageQuota]) -> dict[str, int]:
    """Examples of each category over all stages, categories without any left out."""
    summed: Counter[str] = Counter()
    for quota in quotas:
        summed.update(quota.counts)
    return {category: count for category, count in sorted(summed.items()) if count}


def arrange(
    corpus: Corpus, quotas: Sequence[StageQuota], chosen: Mapping[str, Chosen], seed: int
) -> Selection:
    """Deals the chosen rows out to the stages and puts each stage in order.

    Raises:
        DataError: a stage asks for a category that has no train rows.
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
            if not rows.supply:
                raise DataError(
                    f"stage {quota.name!r} asks for {count:,} examples of {category!r}, which has "
                    "no train rows; solve the mix again for this corpus"
                )
            turn = np.arange(taken[category], taken[category] + count)
            taken[category] += count
            place, repeat = turn % rows.supply, turn // rows.supply
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
    method: Method = "random",
) -> pa.Table:
    """The training examples of one evaluation arm, in order, in memory.

    Args:
        corpus: train rows are taken from it.
        counts: examples of each category.
        seed: other seeds draw other examples and another order; with the same one, two arms take
            the same rows of a category as far as their counts allow.
        curriculum: content of a curriculum.json whose stages add up to `counts`; None shuffles all
            examples as one stage.
        method: how rows of a category are ordered.

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
    chosen = {
        category: choose_rows(corpus, category, count, method, seed)
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
