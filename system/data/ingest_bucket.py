"""One bucket of normalised rows: duplicates out, the rest written as shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from system import storage
from system.data import near, near_decide
from system.data.bodies import take_rows
from system.data.corpus import Shard, shard_directory, shard_of
from system.data.dedup import DUPLICATES, in_order, is_repeat, number_repeats, split_by_category
from system.data.ingest_plan import SPILL, ChunkOutcome, IngestPlan, chunk_uri
from system.data.spill import read_spill
from system.schema import CORPUS


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketInput:
    """Where a bucket's rows lie."""

    index: int
    batches: dict[int, list[int]]
    """Chunk -> record batches of its spill file."""
    bases: dict[tuple[int, int], int]
    """(file, start of piece) -> number of the piece's first row in the file; 0 is left out."""
    near: dict[str, list[int]] = field(default_factory=dict)
    """Step that decided -> record batches with rows of this bucket that leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketOutcome:
    """What became of a bucket's rows; its file is the bucket's commit."""

    index: int
    duplicates: dict[str, int]
    """exact | near -> rows."""
    shards: tuple[Shard, ...]


def bucket_inputs(
    plan: IngestPlan,
    outcomes: Sequence[ChunkOutcome],
    near_outcomes: Mapping[str, near.SpillOutcome] | None = None,
) -> list[BucketInput]:
    """What each bucket has to read."""
    bases = row_bases(outcomes)
    batches: list[dict[int, list[int]]] = [{} for _ in range(plan.num_buckets)]
    leaving: list[dict[str, list[int]]] = [{} for _ in range(plan.num_buckets)]
    for outcome in outcomes:
        for bucket, numbers in outcome.batches.items():
            batches[bucket][outcome.index] = numbers
    for step, found in (near_outcomes or {}).items():
        for bucket, numbers in found.batches.items():
            leaving[bucket][step] = numbers
    return [
        BucketInput(index=bucket, batches=rows, bases=bases, near=leaving[bucket])
        for bucket, rows in enumerate(batches)
    ]


def row_bases(outcomes: Sequence[ChunkOutcome]) -> dict[tuple[int, int], int]:
    """Number of each piece's first row in its file; pieces that start a file are left out."""
    bases: dict[tuple[int, int], int] = {}
    pieces = [piece for outcome in outcomes for piece in outcome.pieces]
    file, base = -1, 0
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.start)):
        if piece.file != file:
            file, base = piece.file, 0
        if base:
            bases[piece.file, piece.start] = base
        base += piece.numbers
    return bases


def _bucket_uri(plan: IngestPlan, index: int) -> str:
    return storage.join(plan.attempt, "work", "buckets", f"{index:05d}.json")


def read_bucket_outcome(plan: IngestPlan, index: int) -> BucketOutcome | None:
    """The outcome of a bucket that is done, else None."""
    uri = _bucket_uri(plan, index)
    if not storage.exists(uri):
        return None
    value = storage.read_json(uri)
    value["shards"] = tuple(Shard(**shard) for shard in value["shards"])
    return BucketOutcome(**value)


def _read_rows(plan: IngestPlan, given: BucketInput) -> pa.Table:
    """The bucket's rows, in no order that means anything."""
    batches: list[pa.RecordBatch] = []
    for chunk, numbers in sorted(given.batches.items()):
        batches += read_spill(chunk_uri(plan, chunk, "arrow"), numbers)
    return pa.Table.from_batches(batches, SPILL)


def sign_bucket(plan: IngestPlan, given: BucketInput) -> near.SpillOutcome:
    """Signatures of a bucket's different rows, and their keys (`deduplicate: near` only)."""
    table = _read_rows(plan, given)
    keys = in_order(table)
    first = keys["at"].filter(pa.array(~is_repeat(keys)))
    return near.sign_rows(plan, given.index, take_rows(table, np.asarray(first)))


def reduce_bucket(plan: IngestPlan, given: BucketInput) -> BucketOutcome:
    """Removes a bucket's duplicates, writes the rest as shards, and commits it."""
    table = _read_rows(plan, given)
    keys = in_order(table)
    if plan.settings.deduplicate == "none":
        keys = number_repeats(keys)
    repeats = is_repeat(keys)
    kept_ids = _near_ids(plan, given, ~repeats)
    is_near = kept_ids.astype(bool)
    leaves = repeats | is_near
    exact = keys.filter(pa.array(repeats & ~is_near))
    found = [_duplicates(exact, exact["id"].to_pylist(), "exact")] if exact.num_rows else []
    if is_near.any():
        near_rows = keys.filter(pa.array(is_near))
        found.append(_duplicates(near_rows, kept_ids[is_near].tolist(), "near"))
    if found:
        _write_duplicates(plan, given, pa.concat_tables(found))
    outcome = BucketOutcome(
        index=given.index,
        duplicates={rows["kind"][0].as_py(): rows.num_rows for rows in found},
        shards=tuple(_write_shards(plan, given.index, table, keys.filter(pa.array(~leaves)))),
    )
    storage.write_json(_bucket_uri(plan, given.index), asdict(outcome))
    return outcome


def _near_ids(plan: IngestPlan, given: BucketInput, is_first: np.ndarray) -> np.ndarray:
    """[rows] of each row that leaves as a near-duplicate the id of the row that stays, else "".

    What a row is near to, its exact copies are near to as well.
    """
    leaving = near_decide.read_leaving(plan, given.near)
    by_place = np.full(int(is_first.sum()), "", object)
    by_place[list(leaving)] = list(leaving.values())
    return by_place[np.cumsum(is_first) - 1]


def _duplicates(rows: pa.Table, kept_ids: Sequence[str], kind: str) -> pa.Table:
    """Places of rows that leave, with the id of the row that stands for each."""
    return pa.table(
        {
            "file": rows["file"],
            "start": rows["start"],
            "place": rows["place"],
            "id": pa.array(kept_ids, pa.string()),
            "kind": pa.array([kind] * rows.num_rows, pa.string()),
        }
    )


def _write_shards(plan: IngestPlan, bucket: int, table: pa.Table, keys: pa.Table) -> list[Shard]:
    """Shards of the rows that `keys` lists in order; no other row's body is touched."""
    parts = list(split_by_category(keys))
    if not parts:
        return []
    ids = pa.concat_tables([rows.select(["id"]) for _, _, rows in parts])["id"].combine_chunks()
    order = np.concatenate([np.asarray(rows["at"]) for _, _, rows in parts])
    bodies = take_rows(table.select(CORPUS.names), order)
    place = CORPUS.get_field_index("id")
    bodies = bodies.set_column(place, CORPUS.field("id"), ids)
    size = plan.settings.shard_rows
    shards: list[Shard] = []
    begin = 0
    with storage.Writers() as writers:
        for split, category, rows in parts:
            for part, start in enumerate(range(0, rows.num_rows, size)):
                path = f"{shard_directory(split, category)}/{bucket:05d}-{part:03d}.arrow"
                body = bodies.slice(begin + start, min(size, rows.num_rows - start))
                shard, data = shard_of(path, body, split, category)
                writers.write(storage.join(plan.attempt, path), data)
                shards.append(shard)
            begin += rows.num_rows
    return shards


def _write_duplicates(plan: IngestPlan, given: BucketInput, rows: pa.Table) -> None:
    uri = storage.join(plan.attempt, "duplicates", f"{given.index:05d}.parquet")
    table = placed(plan, rows, given.bases).select(DUPLICATES.names).cast(DUPLICATES)
    storage.write_table(uri, table.combine_chunks())


def placed(plan: IngestPlan, rows: pa.Table, bases: dict[tuple[int, int], int]) -> pa.Table:
    """Source, file and row in the file in place of (file, start, place)."""
    files = rows["file"].to_pylist()
    starts = rows["start"].to_pylist()
    base = np.array([bases.get(key, 0) for key in zip(files, starts, strict=True)], np.int64)
    found = {
        "source": pa.array([plan.source_of(file) for file in files], pa.string()),
        "file": pa.array([plan.files[file].uri for file in files], pa.string()),
        "row": pa.array(np.asarray(rows["place"]) + base),
    }
    others = [name for name in rows.column_names if name not in ("file", "start", "place")]
    return pa.table(found | {name: rows[name] for name in others})
