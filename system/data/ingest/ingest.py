"""Stage `ingest`, from raw files to the corpus: its steps, in order, and the checks between them.

    files ─ open_plan ─> chunks ─ ingest_chunk ─> spill by id bucket ─ reduce_bucket ─> kept rows
                                (near: sign to settle)
    kept rows of all buckets ─ write_shards ─> shards ─ finish_ingest ─> manifest

`actors.ingestor` runs the steps on a cluster; `ingest_local` runs them in one process.

Chunks, buckets and shards are work units.  They do not depend on each other, any number of workers
can do them in any order, and each leaves a commit file.  So a killed run continues with the missing
units.  The result does not depend on how the input was cut into chunks: of equal rows the first one
in the order of the input is kept, and shards are cut from the kept rows by number and length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from system import storage
from system.config import IngestConfig, RunConfig
from system.data.corpus import Manifest, make_manifest, write_manifest
from system.data.duplicates import near
from system.data.duplicates.dedup import DUPLICATES
from system.data.ingest.bucket import (
    BucketInput,
    BucketOutcome,
    bucket_inputs,
    placed,
    read_bucket_outcome,
    reduce_bucket,
    row_bases,
    sign_bucket,
)
from system.data.ingest.chunk import ingest_chunk
from system.data.ingest.plan import (
    ChunkOutcome,
    IngestPlan,
    chunk_uri,
    empty_source,
    open_plan,
    plan_ingest,
    read_outcome,
    source_fingerprint,
)
from system.data.ingest.shards import (
    ShardOutcome,
    plan_shards,
    read_shard_outcome,
    write_shards,
)
from system.data.ingest.spill import SpillOutcome, read_spill, read_spill_outcome, spill_inputs
from system.data.read.listing import mixed_splits
from system.data.read.lost_files import check_lost_files
from system.data.read.sources import source_name
from system.data.rows.columns import check_columns
from system.errors import DataError, StageError
from system.schema import REJECTED

__all__ = [
    "STEPS",
    "BucketInput",
    "BucketOutcome",
    "ChunkOutcome",
    "IngestPlan",
    "Step",
    "bucket_inputs",
    "check_category_sizes",
    "check_rejected",
    "finish_ingest",
    "ingest_chunk",
    "ingest_local",
    "open_plan",
    "plan_ingest",
    "plan_shards",
    "read_outcome",
    "reduce_bucket",
    "run_steps",
    "source_fingerprint",
    "write_shards",
]

MANIFEST = "manifest.json"
_REJECTED_PART_ROWS = 100_000
_NUM_EXAMPLES = 3


def check_rejected(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> None:
    """Stops an ingest whose input cannot be what the user meant.

    Raises:
        ConfigError: no row of a source has a column that the configuration names.
        DataError: a source has no row, a file has no usable row, or more rows were rejected than
            the configuration allows.
    """
    for number, source in enumerate(plan.sources):
        source_outcomes = [i for i in outcomes if plan.chunks[i.index].source == number]
        if not sum(item.read for item in source_outcomes):
            raise empty_source(source, [file.uri for file in plan.files if file.source == number])
        where = f"source {source_name(source)!r}"
        check_columns(where, source, [(item.columns, item.absent) for item in source_outcomes])
    check_lost_files(plan, outcomes)
    num_read = sum(item.read for item in outcomes)
    reasons = _reasons(outcomes)
    num_rejected = sum(reasons.values())
    limit = plan.settings.max_rejected_share
    if num_rejected > limit * num_read:
        # Chunks count rows from the start of a file range; the message needs numbers in the file.
        bases = row_bases(outcomes)
        examples = [
            f"{plan.files[file].name} row {place + bases.get((file, start), 0)}: "
            f"{reason} ({detail})"
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


def check_category_sizes(buckets: Sequence[BucketOutcome], settings: IngestConfig) -> None:
    """Checks that every category has enough rows for training, measuring and testing.

    Before the shards are written: a column of ids as category would make a shard for every row.
    With untagged rows the sizes are not final, and stage `tag` checks them.

    Raises:
        DataError: a category has too few rows in a split.
    """
    min_rows = {
        "train": settings.min_train_rows,
        "estimate": settings.min_heldout_rows,
        "test": settings.min_heldout_rows,
    }
    counts: Counter[tuple[str, str]] = Counter()
    for rows in (rows for bucket in buckets for rows in bucket.kept):
        if rows.category is None:
            return
        counts[rows.split, rows.category] += rows.rows
    names = sorted({category for _, category in counts})
    short = [
        f"{name!r} (" + ", ".join(f"{split} {counts[split, name]}" for split in min_rows) + ")"
        for name in names
        if any(counts[split, name] < rows for split, rows in min_rows.items())
    ]
    if short:
        more = f"; and {len(short) - 10:,} more of {len(names):,} categories"
        raise DataError(
            f"too few rows in {'; '.join(short[:10])}{more if len(short) > 10 else ''}: "
            f"every category needs {min_rows['train']} train rows (ingest.min_train_rows) and "
            f"{min_rows['test']} estimate and test rows each (ingest.min_heldout_rows). Add data, "
            "merge the category into another with `category_map`, raise ingest.estimate_share and "
            "ingest.test_share, or lower the limits."
        )


def finish_ingest(
    plan: IngestPlan,
    outcomes: Sequence[ChunkOutcome],
    buckets: Sequence[BucketOutcome],
    shard_units: Sequence[ShardOutcome],
) -> Manifest:
    """Checks that every row is accounted for, writes the rejected rows, then the manifest.

    Raises:
        DataError: no row is left.
        StageError: the counts do not add up.
    """
    duplicates: Counter[str] = Counter()
    for bucket in buckets:
        duplicates.update(bucket.duplicates)
    shards = [shard for unit in shard_units for shard in unit.shards]
    rejected = dict(sorted(_reasons(outcomes).items()))
    without_reasoning = sum(item.without_reasoning for item in outcomes)
    manifest = make_manifest(
        shards,
        read=sum(item.read for item in outcomes),
        kept=sum(shard.rows for shard in shards),
        duplicates=sum(duplicates.values()),
        rejected=rejected,
        sources=tuple(_source_counts(plan, outcomes)),
        details={
            "duplicates": dict(sorted(duplicates.items())),
            "without_reasoning": without_reasoning,
        }
        | _notes(plan),
    )
    num_written = _write_rejected(plan, outcomes)
    if not duplicates:
        # One file without rows, so that duplicates/ can be read as a data set in any case.
        uri = storage.join(plan.attempt, "duplicates", "00000.parquet")
        storage.write_table(uri, DUPLICATES.empty_table())
    _check_sums(manifest, num_written)
    if not manifest.kept:
        raise DataError(
            "expected rows for the corpus, found none: every row was rejected or is a duplicate. "
            "The files below rejected/ list the reasons."
        )
    # The manifest first: if the process is killed in between, work/ can still be used.
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
        source_outcomes = [i for i in outcomes if plan.chunks[i.index].source == number]
        files = [file for file in plan.files if file.source == number]
        yield {
            "name": plan.source_of(files[0].index),
            "files": {file.name: file.stamp for file in files},
            "read": sum(item.read for item in source_outcomes),
            "rejected": dict(sorted(_reasons(source_outcomes).items())),
        }


def _notes(plan: IngestPlan) -> dict[str, list[str]]:
    """What the user should know about the files, though nothing is wrong with their rows."""
    by_source = [
        [file.uri for file in plan.files if file.source == number]
        for number in range(len(plan.sources))
    ]
    notes = [note for uris in by_source if (note := mixed_splits(uris)) is not None]
    return {"notes": notes} if notes else {}


def _write_rejected(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> int:
    """Writes `rejected/*.parquet` in the order of the input; returns the number of rows."""
    bases = row_bases(outcomes)
    buffer: list[pa.Table] = []
    num_buffered = num_written = num_parts = 0

    def write(rows: pa.Table) -> None:
        nonlocal num_written, num_parts
        uri = storage.join(plan.attempt, "rejected", f"{num_parts:05d}.parquet")
        storage.write_table(uri, rows.combine_chunks())
        num_written += rows.num_rows
        num_parts += 1

    for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
        uri = chunk_uri(plan, outcome.index, "rejected.arrow")
        for batch in read_spill(uri, outcome.rejected_batches):
            rows = placed(plan, pa.Table.from_batches([batch]), bases)
            buffer.append(rows.select(REJECTED.names).cast(REJECTED))
            num_buffered += batch.num_rows
            # Parts of a fixed number of rows: where one ends does not depend on the chunks.
            while num_buffered >= _REJECTED_PART_ROWS:
                whole = pa.concat_tables(buffer)
                write(whole.slice(0, _REJECTED_PART_ROWS))
                buffer = [whole.slice(_REJECTED_PART_ROWS)]
                num_buffered -= _REJECTED_PART_ROWS
    if num_buffered or not num_parts:
        write(pa.concat_tables(buffer) if buffer else REJECTED.empty_table())
    return num_written


def ingest_local(config: RunConfig, attempt: str) -> Manifest:
    """Runs the whole ingest in this process; any number of actors gives the same bytes.

    Raises:
        DataError: the input cannot be used.
        StageError: the attempt was begun with other files or settings.
    """

    def do_all(step: Step, units: Mapping[int, Any]) -> dict[int, Any]:
        return {
            index: step.finished(plan, index) or step.do(plan, unit)
            for index, unit in units.items()
        }

    plan = open_plan(config, attempt)
    return run_steps(plan, do_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the ingest: what is done with each of its work units."""

    name: str
    label: str
    """Shown beside the progress bar."""
    do: Callable[[IngestPlan, Any], Any]
    """Does one work unit and commits it; can be repeated safely."""
    finished: Callable[[IngestPlan, int], Any]
    """The outcome of a finished work unit, else None."""


def _near_step(name: str, label: str, do: Callable[[IngestPlan, Any], Any], folder: str) -> Step:
    """A step of near-deduplication; its work units write below `work/` in the folder `folder`."""
    return Step(
        name=name,
        label=f"ingest: {label}",
        do=do,
        finished=lambda plan, index: read_spill_outcome(plan, folder, index),
    )


STEPS = {
    step.name: step
    for step in (
        Step(name="read", label="ingest: read", do=ingest_chunk, finished=read_outcome),
        _near_step("sign", "sign", sign_bucket, "keys"),
        _near_step("share", "find common keys", near.keep_shared_keys, "shared"),
        _near_step("send", "send signatures", near.send_signatures, "bands"),
        _near_step("match", "find near-duplicates", near.match_bands, "near"),
        _near_step("decide", "decide which stay", near.decide, "decided"),
        _near_step("match-again", "find chains of near-duplicates", near.match_again, "near-all"),
        _near_step("settle", "decide which of the chains stay", near.settle, "settled"),
        Step(
            name="reduce",
            label="ingest: deduplicate",
            do=reduce_bucket,
            finished=read_bucket_outcome,
        ),
        Step(
            name="write",
            label="ingest: write shards",
            do=write_shards,
            finished=read_shard_outcome,
        ),
    )
}
"""All steps, by the name that a worker is called with; `run_steps` has their order."""


def run_steps(
    plan: IngestPlan, do_all: Callable[[Step, Mapping[int, Any]], Mapping[int, Any]]
) -> Manifest:
    """Runs the steps one after the other; the caller decides where the work units run.

    Args:
        plan: of the whole ingest.
        do_all: takes a step and its work units by number, and returns their outcomes by number.
            It may run them anywhere and in any order, and skips units that are finished.

    Raises:
        DataError: the input cannot be used.
        StageError: the counts do not add up.
    """

    def outcomes_of(name: str, units: Mapping[int, Any]) -> list[Any]:
        outcomes = do_all(STEPS[name], units)
        # Sorted: the order in which workers finish must not show in the result.
        return [outcomes[index] for index in sorted(units)]

    read = outcomes_of("read", {chunk.index: chunk.index for chunk in plan.chunks})
    check_rejected(plan, read)
    leaving: dict[str, SpillOutcome] = {}
    if plan.settings.deduplicate == "near":
        leaving = _find_near(plan, bucket_inputs(plan, read), outcomes_of)
    inputs = bucket_inputs(plan, read, leaving)
    reduced = outcomes_of("reduce", {unit.index: unit for unit in inputs})
    check_category_sizes(reduced, plan.settings)
    units = {unit.index: unit for unit in plan_shards(plan, reduced)}
    return finish_ingest(plan, read, reduced, outcomes_of("write", units))


def _find_near(
    plan: IngestPlan,
    buckets: Sequence[BucketInput],
    outcomes_of: Callable[[str, Mapping[int, Any]], list[Any]],
) -> dict[str, SpillOutcome]:
    """Finds the rows that are removed as near-duplicates.

    Each step reads what the step before spilled, so the outcomes of one step are turned into the
    inputs of the next.  Rows travel as `system.data.duplicates.near` describes it: bucket -> range
    of keys -> bucket -> range of keys -> one unit that decides.

    Returns:
        Name of the step that decided -> its outcome: which record batches list the rows to remove
        from each bucket.
    """

    def inputs(outcomes: list[Any], num_units: int = plan.num_buckets) -> dict[int, Any]:
        # There are as many ranges of keys as buckets, so both kinds of step have as many units.
        return dict(enumerate(spill_inputs(num_units, outcomes)))

    signed = outcomes_of("sign", {bucket.index: bucket for bucket in buckets})
    shared = outcomes_of("share", inputs(signed))
    # Both match steps read the bands, so they are kept.
    bands = inputs(outcomes_of("send", inputs(shared)))
    matched = outcomes_of("match", bands)
    # Whether a row is removed can depend on rows of any bucket: one unit looks at all pairs.
    leaving = {"decided": outcomes_of("decide", inputs(matched, 1))[0]}
    # Chains are rare.  Only they need all pairs of a row, which the first pass does not keep.
    if near.has_undecided(plan):
        matched = outcomes_of("match-again", bands)
        leaving["settled"] = outcomes_of("settle", inputs(matched, 1))[0]
    return leaving
