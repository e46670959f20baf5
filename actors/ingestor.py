"""Stage `ingest`: raw files to the corpus, chunk by chunk and bucket by bucket, in actors.

    driver: plan ─ chunks ──> Ingestor.do("read")   ──> work/chunks/*   (spill + commit file each)
            check the share of rejected rows
                 ─ buckets ─> Ingestor.do("sign") to do("settle")       (near-duplicates only)
                 ─ buckets ─> Ingestor.do("reduce") ──> work/buckets/*
                 ─ shards ──> Ingestor.do("write")  ──> shards/*, work/shards/*
            add up, manifest.json, remove work/

The driver sends work units (numbers of chunks and buckets); rows go through storage and never
through the driver.  A unit with a commit file is not done again, so a killed driver or a lost actor
costs only the units that were in work.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, cast

from actors.pool import ActorPool, ActorSpec
from actors.stage import StageContext, StageResult
from system import storage
from system.data.corpus import Manifest, read_manifest
from system.data.ingest import ingest
from system.data.ingest.ingest import IngestPlan, Step, open_plan

POOL = "ingest"


class Ingestor:
    """Does work units of the ingest.  Holds only the plan; every call can be repeated."""

    def __init__(self, plan: IngestPlan) -> None:
        self._plan = plan

    def do(self, step: str, unit: Any) -> Any:
        """Does one work unit of a step of `ingest.STEPS` and returns its outcome."""
        return ingest.STEPS[step].do(self._plan, unit)


def run(context: StageContext) -> StageResult:
    """Reads all sources into the corpus.

    Raises:
        DataError: the input cannot be used.
        StageError: the counts do not add up, or the attempt was begun with another plan.
    """
    manifest_uri = storage.join(context.attempt, ingest.MANIFEST)
    if storage.is_whole(manifest_uri):
        return _result(read_manifest(manifest_uri))
    plan = open_plan(context.config, context.attempt)
    try:
        manifest = ingest.run_steps(plan, partial(_do_all, context, plan))
    finally:
        context.cluster.close_pool(POOL)
    return _result(manifest)


def _do_all(
    context: StageContext, plan: IngestPlan, step: Step, units: Mapping[int, Any]
) -> dict[int, Any]:
    """The outcomes of all work units; units that an earlier session finished are not repeated."""
    outcomes = {
        index: outcome for index in units if (outcome := step.finished(plan, index)) is not None
    }
    unfinished: dict[Hashable, tuple[str, Any]] = {
        index: (step.name, unit) for index, unit in units.items() if index not in outcomes
    }
    if not unfinished:
        return outcomes
    with context.progress.bar(step.label, total=len(units)) as bar:
        bar.advance(len(outcomes))
        for index, outcome in _pool(context, plan).map(unfinished, "do"):
            outcomes[cast(int, index)] = outcome
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
            # Half a core: reading mostly waits for storage, and two must fit on a one-core machine.
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
        f"{manifest.read:,} rows read: {manifest.kept:,} kept, {manifest.duplicates_in_words}, "
        f"{rejected:,} rejected" + (f" ({reasons})" if reasons else ""),
        ", ".join(f"{split} {count:,}" for split, count in rows.items())
        + f"; {len(manifest.categories)} categories"
        + (f", {untagged:,} rows without one" if untagged else ""),
        *manifest.details.get("notes", ()),
    ]
    dropped = manifest.details.get("without_reasoning", 0)
    if dropped:
        lines.append(f"reasoning dropped from {dropped:,} rows (ingest.reasoning: drop)")
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
        digest=manifest.content_digest,
    )
