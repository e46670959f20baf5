"""Stage `select`: the training examples in training order, gathered by actors.

    driver: quotas ── categories ─> Selector.choose ──> places of the chosen rows
            arrange ── shard groups ─> Selector.gather ──> work/*        (spill + commit each)
                    ── parts ────────> Selector.write ───> parts/*.parquet
            manifest.json, remove work/

The driver holds places (40 bytes an example), never bodies.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from actors.pool import ActorPool, ActorSpec
from actors.stage import StageContext, StageResult
from system import storage
from system.data.corpus import Corpus
from system.selection import parts as selection
from system.selection import select
from system.selection.parts import Group, GroupOutcome, Part, PartInput
from system.selection.select import Chosen, Method, Selection, StageQuota

POOL = "select"
MANIFEST = "manifest.json"


class Selector:
    """Reads the corpus; every call can be repeated."""

    def __init__(self, manifest_uri: str, attempt: str) -> None:
        self._corpus = Corpus.open(manifest_uri)
        self._attempt = attempt

    def choose(self, category: str, num_rows: int, method: Method, seed: int) -> Chosen:
        """The first rows of a category's seeded order."""
        return select.choose_rows(self._corpus, category, num_rows, method, seed)

    def gather(self, group: Group) -> GroupOutcome:
        """Fetches the selected rows of some shards."""
        return selection.gather_group(self._corpus, group, self._attempt)

    def write(self, given: PartInput) -> Part:
        """Writes one part of the selection."""
        return selection.write_part(given, self._attempt)


def run(context: StageContext) -> StageResult:
    """Selects the examples of the curriculum and writes them in training order.

    Raises:
        DataError: the curriculum does not fit the corpus.
    """
    manifest_uri = storage.join(context.attempt, MANIFEST)
    if not storage.exists(manifest_uri):
        quotas = select.read_quotas(storage.read_json(context.input("curriculum", "curriculum")))
        try:
            _select(context, quotas)
        finally:
            context.cluster.close_pool(POOL)
    return _result(storage.read_json(manifest_uri))


def _select(context: StageContext, quotas: tuple[StageQuota, ...]) -> None:
    corpus_uri = context.input("tag", "manifest")
    pool = context.cluster.pool(
        ActorSpec(
            name=POOL,
            actor_class=Selector,
            args=(corpus_uri, context.attempt),
            num_actors=context.config.cluster.num_ingestors,
            num_cpus=0.5,
            max_attempts=context.config.cluster.max_attempts,
        )
    )
    method, seed = context.config.select.method, context.config.seed
    wanted = {
        category: (category, count, method, seed)
        for category, count in select.totals(quotas).items()
    }
    chosen = _map(context, pool, "select: choose", wanted, "choose", {})
    arranged: Selection = select.arrange(Corpus.open(corpus_uri), quotas, chosen, seed)
    groups = {group.index: (group,) for group in selection.plan_gather(arranged)}
    finished = {
        index: outcome
        for index in groups
        if (outcome := selection.read_group_outcome(context.attempt, index)) is not None
    }
    outcomes = _map(context, pool, "select: gather", groups, "gather", finished)
    inputs = selection.part_inputs(len(arranged.row), [outcomes[index] for index in sorted(groups)])
    written = {
        given.index: part
        for given in inputs
        if (part := selection.read_part(context.attempt, given.index)) is not None
    }
    units = {given.index: (given,) for given in inputs}
    parts = _map(context, pool, "select: write", units, "write", written)
    selection.write_selection_manifest(
        context.attempt, arranged, [parts[given.index] for given in inputs]
    )


def _map(
    context: StageContext,
    pool: ActorPool,
    label: str,
    units: Mapping[Any, tuple[Any, ...]],
    method: str,
    finished: Mapping[Any, Any],
) -> dict[Any, Any]:
    """The values of all units; finished ones are taken as they are."""
    values = dict(finished)
    left: dict[Hashable, tuple[Any, ...]] = {
        key: args for key, args in units.items() if key not in values
    }
    with context.progress.bar(label, total=len(units)) as bar:
        bar.advance(len(values))
        for key, value in pool.map(left, method):
            values[key] = value
            bar.advance()
    return values


def _result(manifest: Mapping[str, Any]) -> StageResult:
    repeats = sum(manifest["repeats"].values())
    sizes = ", ".join(
        f"{name} {sum(counts.values()):,}" for name, counts in manifest["counts"].items()
    )
    lines = [f"{manifest['rows']:,} examples in training order: {sizes}"]
    if repeats:
        names = ", ".join(f"{name} {count:,}" for name, count in manifest["repeats"].items())
        lines.append(f"{repeats:,} of them are repeats, where the quota is above supply: {names}")
    return StageResult(
        outputs={"selection": "parts", "manifest": MANIFEST},
        counts={
            "rows": manifest["rows"],
            "stages": manifest["counts"],
            "repeats": manifest["repeats"],
        },
        lines=tuple(lines),
    )
