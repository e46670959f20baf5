"""The work on one bucket: removes duplicates, keeps the other rows by split and category.

Equal rows have equal ids, and a bucket is a range of ids, so all copies of a row are in one bucket.
Called by the steps `sign` and `reduce` of `system.data.ingest.ingest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from system import storage
from system.data.duplicates import near
from system.data.duplicates.dedup import (
    DUPLICATES,
    in_order,
    is_repeat,
    number_repeats,
    split_by_category,
)
from system.data.ingest.plan import SPILL, ChunkOutcome, IngestPlan, chunk_uri
from system.data.ingest.spill import SpillOutcome, read_spill, spill_output
from system.data.rows.bodies import cut_by_bytes, take_rows, text_bytes
from system.schema import CORPUS

_KEPT_BYTES = 64 * 2**20
"""Text of the kept rows that is sorted in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketInput:
    """Where the rows of a bucket lie, and which of them are near-duplicates."""

    index: int
    batches: dict[int, list[int]]
    """Chunk -> the record batches of its spill file that belong to this bucket."""
    bases: dict[tuple[int, int], int]
    """(file, start of the range) -> number in the file of the range's first row; 0 is left out."""
    near: dict[str, list[int]] = field(default_factory=dict)
    """Step that decided -> record batches that list the rows to remove from this bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRows:
    """A bucket's rows of one split and category, in the order of their ids."""

    split: str
    category: str | None
    rows: int
    text_bytes: int
    batches: tuple[int, ...]
    """Record batches of the bucket's file of kept rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketOutcome:
    """What happened to the rows of a bucket; its file is the bucket's commit."""

    index: int
    duplicates: dict[str, int]
    """exact | near -> rows."""
    kept: tuple[KeptRows, ...]


def bucket_inputs(
    plan: IngestPlan,
    outcomes: Sequence[ChunkOutcome],
    near_outcomes: Mapping[str, SpillOutcome] | None = None,
) -> list[BucketInput]:
    """The work units of all buckets, from the outcomes of the chunks."""
    bases = row_bases(outcomes)
    batches: list[dict[int, list[int]]] = [{} for _ in range(plan.num_buckets)]
    leaving: list[dict[str, list[int]]] = [{} for _ in range(plan.num_buckets)]
    for outcome in outcomes:
        for bucket, numbers in outcome.batches.items():
            batches[bucket][outcome.index] = numbers
    for step, decided in (near_outcomes or {}).items():
        for bucket, numbers in decided.batches.items():
            leaving[bucket][step] = numbers
    return [
        BucketInput(index=bucket, batches=rows, bases=bases, near=leaving[bucket])
        for bucket, rows in enumerate(batches)
    ]


def row_bases(outcomes: Sequence[ChunkOutcome]) -> dict[tuple[int, int], int]:
    """(file, start of the range) -> number of the range's first row in its file.

    The ranges of a file are read apart, so a row knows its number in the range only.  Ranges at the
    start of a file have the base 0 and are left out.
    """
    bases: dict[tuple[int, int], int] = {}
    ranges = [file_range for outcome in outcomes for file_range in outcome.ranges]
    file, base = -1, 0
    for file_range in sorted(ranges, key=lambda file_range: (file_range.file, file_range.start)):
        if file_range.file != file:
            file, base = file_range.file, 0
        if base:
            bases[file_range.file, file_range.start] = base
        base += file_range.numbers
    return bases


def _bucket_uri(plan: IngestPlan, index: int) -> str:
    return storage.join(plan.attempt, "work", "buckets", f"{index:05d}.json")


def kept_uri(plan: IngestPlan, index: int) -> str:
    """A bucket's file of kept rows (CORPUS schema)."""
    return storage.join(plan.attempt, "work", "buckets", f"{index:05d}.arrow")


def read_bucket_outcome(plan: IngestPlan, index: int) -> BucketOutcome | None:
    """The outcome of a finished bucket, else None."""
    uri = _bucket_uri(plan, index)
    if not storage.is_whole(uri):
        return None
    value = storage.read_json(uri)
    value["kept"] = tuple(
        KeptRows(**rows | {"batches": tuple(rows["batches"])}) for rows in value["kept"]
    )
    return BucketOutcome(**value)


def _read_rows(plan: IngestPlan, unit: BucketInput) -> pa.Table:
    """The rows of the bucket, in the order of the chunks, which nothing may depend on."""
    batches: list[pa.RecordBatch] = []
    for chunk, numbers in sorted(unit.batches.items()):
        batches += read_spill(chunk_uri(plan, chunk, "arrow"), numbers)
    return pa.Table.from_batches(batches, SPILL)


def sign_bucket(plan: IngestPlan, unit: BucketInput) -> SpillOutcome:
    """Signs the different rows of a bucket and spills their keys (`deduplicate: near` only)."""
    table = _read_rows(plan, unit)
    keys = in_order(table)
    first = keys["at"].filter(pa.array(~is_repeat(keys)))
    return near.sign_rows(plan, unit.index, take_rows(table, np.asarray(first)))


def reduce_bucket(plan: IngestPlan, unit: BucketInput) -> BucketOutcome:
    """Removes the duplicates of a bucket, keeps the rest by split and category, and commits."""
    table = _read_rows(plan, unit)
    keys = in_order(table)
    if plan.settings.deduplicate == "none":
        keys = number_repeats(keys)
    repeats = is_repeat(keys)
    kept_ids = _near_ids(plan, unit, ~repeats)
    is_near = kept_ids.astype(bool)
    is_removed = repeats | is_near
    # A copy of a row that is removed as near counts as near: the row it is equal to is not kept.
    exact = keys.filter(pa.array(repeats & ~is_near))
    removed = [_duplicates(exact, exact["id"].to_pylist(), "exact")] if exact.num_rows else []
    if is_near.any():
        near_rows = keys.filter(pa.array(is_near))
        removed.append(_duplicates(near_rows, kept_ids[is_near].tolist(), "near"))
    if removed:
        _write_duplicates(plan, unit, pa.concat_tables(removed))
    outcome = BucketOutcome(
        index=unit.index,
        duplicates={rows["kind"][0].as_py(): rows.num_rows for rows in removed},
        kept=_write_kept(plan, unit.index, table, keys.filter(pa.array(~is_removed))),
    )
    storage.write_json(_bucket_uri(plan, unit.index), asdict(outcome))
    return outcome


def _near_ids(plan: IngestPlan, unit: BucketInput, is_first: np.ndarray) -> np.ndarray:
    """[rows] the id of the row that is kept for each near-duplicate, "" for all other rows.

    Only the first of equal rows was compared; its exact copies share its result.
    """
    leaving = near.read_leaving(plan, unit.near)
    by_place = np.full(int(is_first.sum()), "", object)
    by_place[list(leaving)] = list(leaving.values())
    return by_place[np.cumsum(is_first) - 1]


def _duplicates(rows: pa.Table, kept_ids: Sequence[str], kind: str) -> pa.Table:
    """Places of removed rows, each with the id of the row that is kept for it."""
    return pa.table(
        {
            "file": rows["file"],
            "start": rows["start"],
            "place": rows["place"],
            "id": pa.array(kept_ids, pa.string()),
            "kind": pa.array([kind] * rows.num_rows, pa.string()),
        }
    )


def _write_kept(
    plan: IngestPlan, bucket: int, table: pa.Table, keys: pa.Table
) -> tuple[KeptRows, ...]:
    """Spills the rows that `keys` lists, in order of split, category and id."""
    # Only the ids are sorted; the texts of kept rows are then taken part by part, which bounds the
    # memory, and the texts of removed rows are never copied.
    parts = list(split_by_category(keys))
    listed = [rows.select(["id", "at"]) for _, _, rows in parts] or [keys.select(["id", "at"])]
    order = pa.concat_tables(listed)
    places = np.asarray(order["at"])
    part_of = np.repeat(np.arange(len(parts)), [rows.num_rows for _, _, rows in parts])
    sizes = text_bytes(table)[places]
    id_place = CORPUS.get_field_index("id")
    with spill_output(kept_uri(plan, bucket), CORPUS) as spill:
        for run in cut_by_bytes(sizes, _KEPT_BYTES):
            bodies = take_rows(table.select(CORPUS.names), places[run])
            ids = order["id"].slice(run.start, run.stop - run.start)
            spill.add(bodies.set_column(id_place, CORPUS.field("id"), ids), part_of[run])
        batches = spill.batches
    text = np.bincount(part_of, weights=sizes, minlength=len(parts))
    return tuple(
        KeptRows(
            split=split,
            category=category,
            rows=rows.num_rows,
            text_bytes=int(text[number]),
            batches=tuple(batches[number]),
        )
        for number, (split, category, rows) in enumerate(parts)
    )


def _write_duplicates(plan: IngestPlan, unit: BucketInput, rows: pa.Table) -> None:
    uri = storage.join(plan.attempt, "duplicates", f"{unit.index:05d}.parquet")
    table = placed(plan, rows, unit.bases).select(DUPLICATES.names).cast(DUPLICATES)
    storage.write_table(uri, table.combine_chunks())


def placed(plan: IngestPlan, rows: pa.Table, bases: dict[tuple[int, int], int]) -> pa.Table:
    """Replaces (file, start, place) by source name, file and the row's number in the file."""
    files = rows["file"].to_pylist()
    starts = rows["start"].to_pylist()
    base = np.array([bases.get(key, 0) for key in zip(files, starts, strict=True)], np.int64)
    columns = {
        "source": pa.array([plan.source_of(file) for file in files], pa.string()),
        "file": pa.array([plan.files[file].name for file in files], pa.string()),
        "row": pa.array(np.asarray(rows["place"]) + base),
    }
    others = [name for name in rows.column_names if name not in ("file", "start", "place")]
    return pa.table(columns | {name: rows[name] for name in others})
