"""Writes the kept rows of all buckets as shards; the rows alone decide the size of a shard.

    buckets' kept rows ─ plan_shards ─> units of a few shards ─ write_shards ─> shards/*

Each bucket has some rows of every split and category.  The shards of a category are cut from the
rows of all buckets, bucket after bucket.  Buckets are ranges of ids, so these rows are sorted by
id.  Where a shard ends depends neither on the number of buckets nor on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from system import storage
from system.data.corpus import Shard, shard_directory, shard_of
from system.data.ingest.bucket import BucketOutcome, KeptRows, kept_uri
from system.data.ingest.plan import IngestPlan
from system.data.ingest.spill import read_spill
from system.data.rows.conversation import SPLITS
from system.schema import CORPUS

SHARD_BYTES = 512 * 2**20
"""Most text in a shard of long rows; in memory, Arrow can need four times as much."""
UNIT_BYTES = 64 * 2**20
"""Most text in the shards of one work unit, unless a single shard has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One shard, and where its rows lie."""

    path: str
    split: str
    category: str | None
    slices: tuple[tuple[int, tuple[int, ...], int, int], ...]
    """Bucket, its record batches, first row in them, number of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardUnit:
    """A work unit: some shards that one worker writes."""

    index: int
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """The shards that a work unit wrote; its file is the unit's commit."""

    index: int
    shards: tuple[Shard, ...]


def plan_shards(plan: IngestPlan, buckets: Sequence[BucketOutcome]) -> list[ShardUnit]:
    """Cuts the kept rows of each split and category into shards, and groups the shards."""
    parts: dict[tuple[str, str | None], list[tuple[int, KeptRows]]] = {}
    for bucket in sorted(buckets, key=lambda bucket: bucket.index):
        for rows in bucket.kept:
            parts.setdefault((rows.split, rows.category), []).append((bucket.index, rows))
    order = sorted(parts, key=lambda key: (SPLITS.index(key[0]), key[1] is None, key[1] or ""))
    units: list[ShardUnit] = []
    waiting: list[ShardPlan] = []
    waiting_bytes = 0.0
    for key in order:
        num_rows = sum(rows.rows for _, rows in parts[key])
        row_bytes = max(1.0, sum(rows.text_bytes for _, rows in parts[key]) / num_rows)
        size = min(plan.settings.shard_rows, max(1, int(SHARD_BYTES / row_bytes)))
        for start in range(0, num_rows, size):
            count = min(size, num_rows - start)
            if waiting_bytes and waiting_bytes + count * row_bytes > UNIT_BYTES:
                units.append(ShardUnit(index=len(units), shards=tuple(waiting)))
                waiting, waiting_bytes = [], 0.0
            waiting.append(_shard_plan(*key, start // size, parts[key], start, count))
            waiting_bytes += count * row_bytes
    if waiting:
        units.append(ShardUnit(index=len(units), shards=tuple(waiting)))
    return units


def _shard_plan(
    split: str,
    category: str | None,
    number: int,
    parts: Sequence[tuple[int, KeptRows]],
    start: int,
    count: int,
) -> ShardPlan:
    # One number for each thousand shards, one within it: names sort like the shards.
    path = f"{shard_directory(split, category)}/{number // 1000:05d}-{number % 1000:03d}.arrow"
    slices = []
    before = 0
    for bucket, rows in parts:
        first = max(start - before, 0)
        last = min(start + count - before, rows.rows)
        if first < last:
            slices.append((bucket, rows.batches, first, last - first))
        before += rows.rows
    return ShardPlan(path=path, split=split, category=category, slices=tuple(slices))


def _commit_uri(plan: IngestPlan, index: int) -> str:
    return storage.join(plan.attempt, "work", "shards", f"{index:06d}.json")


def read_shard_outcome(plan: IngestPlan, index: int) -> ShardOutcome | None:
    """The outcome of a finished work unit, else None."""
    uri = _commit_uri(plan, index)
    if not storage.is_whole(uri):
        return None
    value = storage.read_json(uri)
    return ShardOutcome(index=index, shards=tuple(Shard(**shard) for shard in value["shards"]))


def write_shards(plan: IngestPlan, unit: ShardUnit) -> ShardOutcome:
    """Writes the shards of a work unit, then commits them."""
    shards: list[Shard] = []
    with storage.Writers() as writers:
        for shard_plan in unit.shards:
            rows = pa.concat_tables(_rows_of(plan, shard_plan))
            shard, data = shard_of(shard_plan.path, rows, shard_plan.split, shard_plan.category)
            writers.write(storage.join(plan.attempt, shard_plan.path), data)
            shards.append(shard)
    outcome = ShardOutcome(index=unit.index, shards=tuple(shards))
    storage.write_json(_commit_uri(plan, unit.index), asdict(outcome))
    return outcome


def _rows_of(plan: IngestPlan, shard_plan: ShardPlan) -> Iterator[pa.Table]:
    for bucket, batches, first, count in shard_plan.slices:
        rows = pa.Table.from_batches(read_spill(kept_uri(plan, bucket), batches), CORPUS)
        yield rows.slice(first, count)
