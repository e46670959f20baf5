"""Raw files to the corpus: what is done with one chunk, with one bucket, and with all of them.

    files ─ plan_ingest ─> chunks ─ ingest_chunk ─> spill by id bucket ─ reduce_bucket ─> shards
                                                                        finish_ingest ─> manifest

Chunks and buckets are independent of each other, can be done in any order by any number of workers,
and leave a commit file each, so a killed run goes on with what is missing.  Nothing in the result
depends on how the input was cut: the number of buckets follows from the input's size, and of equal
rows the first one in the input's order is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from system import storage
from system.config import IngestConfig, RunConfig
from system.corpus import (
    Manifest,
    Shard,
    make_manifest,
    shard_directory,
    write_manifest,
    write_shard,
)
from system.dedup import DUPLICATES, in_order, is_repeat, number_repeats, split_by_category
from system.errors import DataError, StageError
from system.ingest_chunk import ingest_chunk
from system.ingest_plan import (
    ChunkOutcome,
    IngestPlan,
    chunk_uri,
    empty_source,
    plan_ingest,
    read_outcome,
    source_fingerprint,
)
from system.schema import CORPUS, REJECTED
from system.spill import read_spill

__all__ = [
    "ChunkOutcome",
    "IngestPlan",
    "ingest_chunk",
    "plan_ingest",
    "read_outcome",
    "source_fingerprint",
]

MANIFEST = "manifest.json"
_REJECTED_PART_ROWS = 100_000
_NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketInput:
    """Where a bucket's rows lie."""

    index: int
    batches: dict[int, list[int]]
    """Chunk -> record batches of its spill file."""
    bases: dict[tuple[int, int], int]
    """(file, start of piece) -> number of the piece's first row in the file; 0 is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketOutcome:
    """What became of a bucket's rows; its file is the bucket's commit."""

    index: int
    duplicates: dict[str, int]
    """exact | near -> rows."""
    shards: tuple[Shard, ...]


def bucket_inputs(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> list[BucketInput]:
    """What each bucket has to read."""
    bases = row_bases(outcomes)
    batches: list[dict[int, list[int]]] = [{} for _ in range(plan.num_buckets)]
    for outcome in outcomes:
        for bucket, numbers in outcome.batches.items():
            batches[bucket][outcome.index] = numbers
    return [
        BucketInput(index=bucket, batches=found, bases=bases)
        for bucket, found in enumerate(batches)
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


def reduce_bucket(plan: IngestPlan, given: BucketInput) -> BucketOutcome:
    """Removes a bucket's duplicates, writes the rest as shards, and commits it."""
    batches: list[pa.RecordBatch] = []
    for chunk, numbers in sorted(given.batches.items()):
        uri = chunk_uri(plan, chunk, "arrow")
        batches += read_spill(uri, numbers)
    shards: list[Shard] = []
    duplicates: dict[str, int] = {}
    if batches:
        table = in_order(pa.Table.from_batches(batches))
        if plan.settings.deduplicate == "none":
            table = number_repeats(table)
        repeats = is_repeat(table)
        if repeats.any():
            _write_duplicates(plan, given, table.filter(pa.array(repeats)))
            duplicates = {"exact": int(repeats.sum())}
        shards = _write_shards(plan, given.index, table.filter(pa.array(~repeats)))
    outcome = BucketOutcome(index=given.index, duplicates=duplicates, shards=tuple(shards))
    storage.write_json(_bucket_uri(plan, given.index), asdict(outcome))
    return outcome


def _write_shards(plan: IngestPlan, bucket: int, table: pa.Table) -> list[Shard]:
    shards: list[Shard] = []
    size = plan.settings.shard_rows
    for split, category, rows in split_by_category(table):
        rows = rows.select(CORPUS.names)
        for part, start in enumerate(range(0, rows.num_rows, size)):
            path = f"{shard_directory(split, category)}/{bucket:05d}-{part:03d}.arrow"
            shards.append(write_shard(plan.attempt, path, rows.slice(start, size), split, category))
    return shards


def _write_duplicates(plan: IngestPlan, given: BucketInput, rows: pa.Table) -> None:
    rows = rows.append_column("kind", pa.array(["exact"] * rows.num_rows, pa.string()))
    uri = storage.join(plan.attempt, "duplicates", f"{given.index:05d}.parquet")
    storage.write_table(uri, _placed(plan, rows, given.bases).select(DUPLICATES.names))


def _placed(plan: IngestPlan, rows: pa.Table, bases: dict[tuple[int, int], int]) -> pa.Table:
    """Source, file and row in the file in place of (file, start, place)."""
    files = rows["file"].to_pylist()
    starts = rows["start"].to_pylist()
    base = np.array([bases.get(key, 0) for key in zip(files, starts, strict=True)], np.int64)
    placed = {
        "source": pa.array([plan.source_of(file) for file in files], pa.string()),
        "file": pa.array([plan.files[file].uri for file in files], pa.string()),
        "row": pa.array(np.asarray(rows["place"]) + base),
    }
    others = [name for name in rows.column_names if name not in ("source", "file", "row")]
    return pa.table(placed | {name: rows[name] for name in others})


def check_rejected(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> None:
    """Stops an ingest whose input is not what its owner believes.

    Raises:
        DataError: a source has no row, or more rows are rejected than the configuration allows.
    """
    for number, source in enumerate(plan.sources):
        own = [item for item in outcomes if plan.chunks[item.index].source == number]
        if not sum(item.read for item in own):
            raise empty_source(source, [file.uri for file in plan.files if file.source == number])
    num_read = sum(item.read for item in outcomes)
    reasons = _reasons(outcomes)
    num_rejected = sum(reasons.values())
    limit = plan.settings.max_rejected_share
    if num_rejected > limit * num_read:
        bases = row_bases(outcomes)
        examples = [
            f"{plan.files[file].uri} row {place + bases.get((file, start), 0)}: {reason} ({detail})"
            for item in outcomes
            for file, start, place, reason, detail in item.examples
        ]
        counted = ", ".join(f"{name} {count:,}" for name, count in sorted(reasons.items()))
        raise DataError(
            f"{num_rejected:,} of {num_read:,} rows were rejected ({counted}), more than "
            f"ingest.max_rejected_share = {limit} allows. The first ones: "
            f"{'; '.join(examples[:_NUM_EXAMPLES])}. Correct the data or the source's `format`, or "
            "raise ingest.max_rejected_share."
        )


def _reasons(outcomes: Sequence[ChunkOutcome]) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for item in outcomes:
        reasons.update(item.rejected)
    return reasons


def check_category_sizes(manifest: Manifest, settings: IngestConfig) -> None:
    """Makes sure that every category can be trained on, measured and judged.

    Raises:
        DataError: a category has too few rows in a split.
    """
    least = {
        "train": settings.min_train_rows,
        "estimate": settings.min_heldout_rows,
        "test": settings.min_heldout_rows,
    }
    short = [
        f"{name!r} ("
        + ", ".join(f"{split} {manifest.counts[split][name]}" for split in least)
        + ")"
        for name in manifest.categories
        if any(manifest.counts[split][name] < rows for split, rows in least.items())
    ]
    if short:
        raise DataError(
            f"too few rows in {'; '.join(short[:10])}{'; ...' if len(short) > 10 else ''}: "
            f"every category needs {least['train']} train rows (ingest.min_train_rows) and "
            f"{least['test']} estimate and test rows each (ingest.min_heldout_rows). Add data, "
            "merge the category into another with `category_map`, raise ingest.estimate_share and "
            "ingest.test_share, or lower the limits."
        )
    if not manifest.categories and not sum(manifest.untagged.values()):
        raise DataError("no row is left: every row was rejected or a duplicate")


def finish_ingest(
    plan: IngestPlan, outcomes: Sequence[ChunkOutcome], buckets: Sequence[BucketOutcome]
) -> Manifest:
    """Checks that every row is accounted for, writes the rejected rows, then the manifest.

    Raises:
        DataError: a category has too few rows.
        StageError: the counts do not add up.
    """
    duplicates: Counter[str] = Counter()
    for bucket in buckets:
        duplicates.update(bucket.duplicates)
    shards = [shard for bucket in buckets for shard in bucket.shards]
    rejected = dict(sorted(_reasons(outcomes).items()))
    manifest = make_manifest(
        shards,
        read=sum(item.read for item in outcomes),
        kept=sum(shard.rows for shard in shards),
        duplicates=sum(duplicates.values()),
        rejected=rejected,
        sources=tuple(_source_counts(plan, outcomes)),
        details={"duplicates": dict(sorted(duplicates.items()))},
    )
    num_written = _write_rejected(plan, outcomes)
    if not duplicates:
        uri = storage.join(plan.attempt, "duplicates", "00000.parquet")
        storage.write_table(uri, DUPLICATES.empty_table())
    _check_sums(manifest, num_written)
    if not sum(manifest.untagged.values()):
        check_category_sizes(manifest, plan.settings)
    write_manifest(storage.join(plan.attempt, MANIFEST), manifest)
    storage.delete(storage.join(plan.attempt, "work"))
    return manifest


def _check_sums(manifest: Manifest, num_rejected_written: int) -> None:
    num_rejected = sum(manifest.rejected.values())
    total = manifest.kept + manifest.duplicates + num_rejected
    if total != manifest.read or num_rejected != num_rejected_written:
        raise StageError(
            f"ingest: {manifest.read:,} rows were read, but {manifest.kept:,} kept + "
            f"{manifest.duplicates:,} duplicates + {num_rejected:,} rejected = {total:,}, with "
            f"{num_rejected_written:,} rejected rows written. Files below work/ were changed or "
            "lost; run `ingest` again with --redo."
        )


def _source_counts(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> Iterator[dict[str, Any]]:
    for number in range(len(plan.sources)):
        own = [item for item in outcomes if plan.chunks[item.index].source == number]
        files = [file for file in plan.files if file.source == number]
        yield {
            "name": plan.source_of(files[0].index),
            "files": {file.uri: file.stamp for file in files},
            "read": sum(item.read for item in own),
            "rejected": dict(sorted(_reasons(own).items())),
        }


def _write_rejected(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> int:
    """Writes `rejected/*.parquet` in the order of the input; returns the number of rows."""
    bases = row_bases(outcomes)
    held: list[pa.Table] = []
    num_held = num_written = num_parts = 0

    def write(rows: pa.Table) -> None:
        nonlocal num_written, num_parts
        uri = storage.join(plan.attempt, "rejected", f"{num_parts:05d}.parquet")
        storage.write_table(uri, rows.combine_chunks())
        num_written += rows.num_rows
        num_parts += 1

    for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
        uri = chunk_uri(plan, outcome.index, "rejected.arrow")
        for batch in read_spill(uri, outcome.rejected_batches):
            rows = _placed(plan, pa.Table.from_batches([batch]), bases)
            held.append(rows.select(REJECTED.names).cast(REJECTED))
            num_held += batch.num_rows
            while num_held >= _REJECTED_PART_ROWS:
                whole = pa.concat_tables(held)
                write(whole.slice(0, _REJECTED_PART_ROWS))
                held = [whole.slice(_REJECTED_PART_ROWS)]
                num_held -= _REJECTED_PART_ROWS
    if num_held or not num_parts:
        write(pa.concat_tables(held) if held else REJECTED.empty_table())
    return num_written


def ingest_local(config: RunConfig, attempt: str) -> Manifest:
    """The whole ingest in this process; the same bytes as through any number of actors.

    Raises:
        DataError: the input cannot be used.
    """
    plan = plan_ingest(config, attempt)
    outcomes = [
        read_outcome(plan, chunk.index) or ingest_chunk(plan, chunk.index) for chunk in plan.chunks
    ]
    check_rejected(plan, outcomes)
    buckets = [
        read_bucket_outcome(plan, given.index) or reduce_bucket(plan, given)
        for given in bucket_inputs(plan, outcomes)
    ]
    return finish_ingest(plan, outcomes, buckets)
