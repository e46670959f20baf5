"""One bucket of normalised rows: duplicates out, the rest kept by split and category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from system import storage
from system.data.duplicates import near, near_decide
from system.data.duplicates.dedup import (
    DUPLICATES,
    in_order,
    is_repeat,
    number_repeats,
    split_by_category,
)
from system.data.ingest.plan import SPILL, ChunkOutcome, IngestPlan, chunk_uri
from system.data.ingest.spill import read_spill, spill_output
from system.data.rows.bodies import cut_by_bytes, take_rows, text_bytes
from system.schema import CORPUS

_KEPT_BYTES = 64 * 2**20
"""Text that is put in order at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketInput:
    """Where a bucket's rows lie."""

    index: int
    batches: dict[int, list[int]]
    """Chunk -> record batches of its spill file."""
    bases: dict[tuple[int, int], int]
    """(file, start of the range) -> number in the file of the range's first row; 0 is left out."""
    near: dict[str, list[int]] = field(default_factory=dict)
    """Step that decided -> record batches with rows of this bucket that leave."""


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
    """What became of a bucket's rows; its file is the bucket's commit."""

    index: int
    duplicates: dict[str, int]
    """exact | near -> rows."""
    kept: tuple[KeptRows, ...]


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
    """Number of the first row of each file range; ranges that start a file are left out."""
    bases: dict[tuple[int, int], int] = {}
    ranges = [file_range for outcome in outcomes for file_range in outcome.pieces]
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
    """The outcome of a bucket that is done, else None."""
    uri = _bucket_uri(plan, index)
    if not storage.exists(uri):
        return None
    value = storage.read_json(uri)
    value["kept"] = tuple(
        KeptRows(**rows | {"batches": tuple(rows["batches"])}) for rows in value["kept"]
    )
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
    """Removes a bucket's duplicates, keeps the rest by split and category, and commits it."""
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
        kept=_write_kept(plan, given.index, table, keys.filter(pa.array(~leaves))),
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


def _write_kept(
    plan: IngestPlan, bucket: int, table: pa.Table, keys: pa.Table
) -> tuple[KeptRows, ...]:
    """Spills the rows that `keys` lists in order; no other row's body is touched."""
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
