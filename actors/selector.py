"""Stage `select`: the training examples in training order, gathered by actors.

    driver: scores, vectors (actors.features) ──> scores/*, vectors/*     what the method goes by
            quotas ── categories ──> Selector.choose ──> places of the chosen rows
                   or blocks of them > Selector.rank ──> work/cover/* ── merge ──> the same
            arrange ── shard groups ─> Selector.gather ──> work/*        (spill + commit each)
                    ── parts ────────> Selector.write ───> parts/*.parquet
            quarantined.parquet, manifest.json, remove work/

The driver holds places (40 bytes an example), never bodies.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from actors.features import make_features
from actors.pool import ActorPool, ActorSpec
from actors.stage import StageContext, StageResult
from system import storage
from system.config import SelectConfig
from system.data.corpus import Corpus
from system.selection import parts as selection
from system.selection import select
from system.selection.choose import Chosen, choose_rows, cover_units, merge_ranked
from system.selection.coverage import (
    CoverUnit,
    is_ranked,
    rank_unit,
    read_ranked,
    write_ranked,
)
from system.selection.parts import Group, GroupOutcome, Part, PartInput
from system.selection.select import Selection, StageQuota

POOL = "select"
MANIFEST = "manifest.json"


class Selector:
    """Reads the corpus; every call can be repeated."""

    def __init__(self, manifest_uri: str, attempt: str) -> None:
        self._corpus = Corpus.open(manifest_uri)
        self._attempt = attempt

    def choose(self, category: str, num_rows: int, settings: SelectConfig, seed: int) -> Chosen:
        """The rows of a category that the method puts first."""
        return choose_rows(self._corpus, category, num_rows, settings, seed, self._attempt)

    def rank(self, unit: CoverUnit) -> None:
        """Commits the greedy ranks of some blocks of a category."""
        write_ranked(self._attempt, unit, rank_unit(self._corpus, unit, self._attempt))

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
    corpus = Corpus.open(corpus_uri)
    make_features(context, corpus)
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
    settings, seed = context.config.select, context.config.seed
    chosen = _choose(context, corpus, pool, select.totals(quotas))
    select.check_chosen(quotas, chosen, settings)
    arranged: Selection = select.arrange(corpus, quotas, chosen, seed)
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
        context.attempt, arranged, [parts[given.index] for given in inputs], chosen, settings
    )


def _choose(
    context: StageContext, corpus: Corpus, pool: ActorPool, wanted: Mapping[str, int]
) -> dict[str, Chosen]:
    """The chosen rows of every category."""
    settings, seed, attempt = context.config.select, context.config.seed, context.attempt
    for category in wanted:
        corpus.num_rows("train", category)  # says which categories there are
    if settings.method != "facility-location":
        tasks = {name: (name, count, settings, seed) for name, count in wanted.items()}
        return _map(context, pool, "select: choose", tasks, "choose", {})
    units = {
        category: cover_units(corpus, category, count, settings, attempt)
        for category, count in wanted.items()
    }
    blocks = {unit.path: (unit,) for found in units.values() for unit in found}
    ranked = {path: None for path, (unit,) in blocks.items() if is_ranked(attempt, unit)}
    _map(context, pool, "select: rank", blocks, "rank", ranked)
    return {
        category: merge_ranked(
            corpus,
            category,
            count,
            (read_ranked(attempt, unit) for unit in units[category]),
            seed,
            attempt,
        )
        for category, count in wanted.items()
    }


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
    lines = [
        f"{manifest['rows']:,} examples in training order: {sizes}",
        selection.method_line(manifest),
    ]
    if repeats:
        names = ", ".join(f"{name} {count:,}" for name, count in manifest["repeats"].items())
        lines.append(f"{repeats:,} of them are repeats, where the quota is above supply: {names}")
    return StageResult(
        outputs={
            "selection": "parts",
            "manifest": MANIFEST,
            "quarantined": "quarantined.parquet",
        },
        counts={
            "rows": manifest["rows"],
            "stages": manifest["counts"],
            "repeats": manifest["repeats"],
            "method": manifest["method"],
            "categories": manifest["categories"],
        },
        lines=tuple(lines),
    )
