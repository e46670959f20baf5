"""Stage `ingest`: raw files to the corpus, chunk by chunk and bucket by bucket, in actors.

    driver: plan ─ chunks ─> Ingestor.read ──> work/chunks/*      (spill + commit file each)
            check the share of rejected rows
                 ─ buckets ─> Ingestor.reduce ──> shards/*, work/buckets/*.json
            add up, manifest.json, remove work/

Rows go through storage and never through the driver.  What has a commit file is not done again, so
a killed driver or a lost actor costs the units that were in work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar, cast

from actors.pool import ActorPool, ActorSpec
from actors.stage import StageContext, StageResult
from system import ingest, storage
from system.corpus import Manifest, read_manifest
from system.ingest import BucketInput, BucketOutcome
from system.ingest_plan import ChunkOutcome, IngestPlan, plan_ingest, read_outcome

POOL = "ingest"

_Outcome = TypeVar("_Outcome")


class Ingestor:
    """Stateless but for the plan; every call can be repeated."""

    def __init__(self, plan: IngestPlan) -> None:
        self._plan = plan

    def read(self, index: int) -> ChunkOutcome:
        """Reads, normalises and spills one chunk."""
        return ingest.ingest_chunk(self._plan, index)

    def reduce(self, given: BucketInput) -> BucketOutcome:
        """Deduplicates one bucket and writes its shards."""
        return ingest.reduce_bucket(self._plan, given)


def run(context: StageContext) -> StageResult:
    """Reads all sources into the corpus.

    Raises:
        DataError: the input cannot be used.
        StageError: the counts do not add up.
    """
    manifest_uri = storage.join(context.attempt, ingest.MANIFEST)
    if storage.exists(manifest_uri):
        return _result(read_manifest(manifest_uri))
    plan = plan_ingest(context.config, context.attempt)
    try:
        manifest = _ingest(context, plan)
    finally:
        context.cluster.close_pool(POOL)
    return _result(manifest)


def _ingest(context: StageContext, plan: IngestPlan) -> Manifest:
    outcomes = _finish_all(
        context,
        plan,
        "ingest: read",
        {chunk.index: chunk.index for chunk in plan.chunks},
        "read",
        read_outcome,
    )
    read = [outcomes[chunk.index] for chunk in plan.chunks]
    ingest.check_rejected(plan, read)
    inputs = {given.index: given for given in ingest.bucket_inputs(plan, read)}
    buckets = _finish_all(
        context, plan, "ingest: deduplicate", inputs, "reduce", ingest.read_bucket_outcome
    )
    return ingest.finish_ingest(plan, read, [buckets[index] for index in sorted(buckets)])


def _finish_all(
    context: StageContext,
    plan: IngestPlan,
    label: str,
    units: Mapping[int, Any],
    method: str,
    finished: Callable[[IngestPlan, int], _Outcome | None],
) -> dict[int, _Outcome]:
    """The outcomes of all units; those that an earlier session finished are taken as they are."""
    outcomes = {index: found for index in units if (found := finished(plan, index)) is not None}
    left: dict[Hashable, tuple[Any]] = {
        index: (unit,) for index, unit in units.items() if index not in outcomes
    }
    if not left:
        return outcomes
    with context.progress.bar(label, total=len(units)) as bar:
        bar.advance(len(outcomes))
        for done, outcome in _pool(context, plan).map(left, method):
            outcomes[cast(int, done)] = outcome
            bar.advance()
    return outcomes


def _pool(context: StageContext, plan: IngestPlan) -> ActorPool:
    config = context.config.cluster
    return context.cluster.pool(
        ActorSpec(
            name=POOL,
            actor_class=Ingestor,
            args=(plan,),
            num_actors=config.num_ingestors,
            # Half a core: reading waits for storage, and two must fit on a machine with one core.
            num_cpus=0.5,
            max_attempts=config.max_attempts,
        )
    )


def _result(manifest: Manifest) -> StageResult:
    rejected = sum(manifest.rejected.values())
    rows = {
        split: sum(counts.values()) + manifest.untagged[split]
        for split, counts in manifest.counts.items()
    }
    reasons = ", ".join(f"{name} {count:,}" for name, count in manifest.rejected.items())
    untagged = sum(manifest.untagged.values())
    lines = [
        f"{manifest.read:,} rows read: {manifest.kept:,} kept, {manifest.duplicates:,} duplicates, "
        f"{rejected:,} rejected" + (f" ({reasons})" if reasons else ""),
        ", ".join(f"{split} {count:,}" for split, count in rows.items())
        + f"; {len(manifest.categories)} categories"
        + (f", {untagged:,} rows without one" if untagged else ""),
    ]
    return StageResult(
        outputs={
            "manifest": ingest.MANIFEST,
            "shards": "shards",
            "rejected": "rejected",
            "duplicates": "duplicates",
        },
        counts={
            "read": manifest.read,
            "kept": manifest.kept,
            "duplicates": manifest.duplicates,
            "rejected": manifest.rejected,
            "rows": rows,
            "untagged": untagged,
            "categories": len(manifest.categories),
            "details": manifest.details,
        },
        lines=tuple(lines),
    )
