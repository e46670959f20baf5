"""Stage `select`: actors choose the training examples and write them in training order.

    driver: scores, vectors (actors.features) ──> scores/*, vectors/*     what the method reads
            quotas ── categories ──> Selector.choose ──> places of the chosen rows
                   or blocks of them > Selector.rank ──> work/cover/* ── merge ──> the same
            arrange ── shard groups ─> Selector.gather ──> work/*        (spill + commit each)
                    ── parts ────────> Selector.write ───> parts/*.parquet
            quarantined.parquet, manifest.json, remove work/

The driver holds places of rows (40 bytes an example), never their text.
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
    """Actor that chooses, reads and writes rows of the corpus; every call can be repeated."""

    def __init__(self, manifest_uri: str, attempt: str) -> None:
        self._corpus = Corpus.open(manifest_uri)
        self._attempt = attempt

    def choose(self, category: str, num_rows: int, settings: SelectConfig, seed: int) -> Chosen:
        """Chooses the first rows of a category, in the order of the method."""
        return choose_rows(self._corpus, category, num_rows, settings, seed, self._attempt)

    def rank(self, unit: CoverUnit) -> None:
        """Ranks some blocks of a category greedily and commits the ranks."""
        write_ranked(self._attempt, unit, rank_unit(self._corpus, unit, self._attempt))

    def gather(self, group: Group) -> GroupOutcome:
        """Reads the selected rows of some shards and spills them by part."""
        return selection.gather_group(self._corpus, group, self._attempt)

    def write(self, part_input: PartInput) -> Part:
        """Writes one part of the selection."""
        return selection.write_part(part_input, self._attempt)


def run(context: StageContext) -> StageResult:
    """Selects the examples of the curriculum and writes them in training order.

    Raises:
        DataError: the curriculum does not fit the corpus.
    """
    # The manifest is written last: with it, an interrupted session had finished the selection.
    manifest_uri = storage.join(context.attempt, MANIFEST)
    if not storage.is_whole(manifest_uri):
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
    # The plan depends on the selection alone, so work units of an interrupted session still fit.
    groups = {group.index: (group,) for group in selection.plan_gather(arranged)}
    finished = {
        index: outcome
        for index in groups
        if (outcome := selection.read_group_outcome(context.attempt, index)) is not None
    }
    outcomes = _map(context, pool, "select: gather", groups, "gather", finished)
    inputs = selection.part_inputs(len(arranged.row), [outcomes[index] for index in sorted(groups)])
    written = {
        item.index: part
        for item in inputs
        if (part := selection.read_part(context.attempt, item.index)) is not None
    }
    units = {item.index: (item,) for item in inputs}
    parts = _map(context, pool, "select: write", units, "write", written)
    selection.write_selection_manifest(
        context.attempt, arranged, [parts[item.index] for item in inputs], chosen, settings
    )


def _choose(
    context: StageContext, corpus: Corpus, pool: ActorPool, quotas: Mapping[str, int]
) -> dict[str, Chosen]:
    """The chosen rows of every category; `quotas` are totals over all curriculum stages."""
    settings, seed, attempt = context.config.select, context.config.seed, context.attempt
    for category in quotas:
        corpus.num_rows("train", category)  # an unknown category must fail here, with its error
    if settings.method != "facility-location":
        tasks = {name: (name, count, settings, seed) for name, count in quotas.items()}
        return _map(context, pool, "select: choose", tasks, "choose", {})
    units = {
        category: cover_units(corpus, category, count, settings, attempt)
        for category, count in quotas.items()
    }
    tasks = {unit.path: (unit,) for category_units in units.values() for unit in category_units}
    ranked = {path: None for path, (unit,) in tasks.items() if is_ranked(attempt, unit)}
    _map(context, pool, "select: rank", tasks, "rank", ranked)
    return {
        category: merge_ranked(
            corpus,
            category,
            count,
            (read_ranked(attempt, unit) for unit in units[category]),
            seed,
            attempt,
        )
        for category, count in quotas.items()
    }


def _map(
    context: StageContext,
    pool: ActorPool,
    label: str,
    units: Mapping[Any, tuple[Any, ...]],
    method: str,
    finished: Mapping[Any, Any],
) -> dict[Any, Any]:
    """The values of all work units; those of finished ones are not computed again."""
    values = dict(finished)
    remaining: dict[Hashable, tuple[Any, ...]] = {
        key: args for key, args in units.items() if key not in values
    }
    with context.progress.bar(label, total=len(units)) as bar:
        bar.advance(len(values))
        for key, value in pool.map(remaining, method):
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
        lines.append(f"{repeats:,} of them are repeats, where the quota exceeds supply: {names}")
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
