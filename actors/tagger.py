"""Stage `tag`: gives every row a category, and measures the accuracy of the chosen categories.

    corpus ── batches of rows ──> Scorer.choose ──> blocks/<name>.parquet   committed one by one
                                                          │ when all are written
          old shards + newly tagged shards ──> lengths (actors.token_counter) ──> manifest.json

The driver reads and encodes the batches, `actors.scorer` computes log-likelihoods, and the driver
picks the names.  A batch is a fixed number of rows of one shard, so the number of scorers does not
change the result.  A driver that is started again skips the batches that are already written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from actors.pool import ActorPool, Done, wait_any
from actors.scorer import scorer_pool
from actors.stage import StageContext, StageResult
from actors.token_counter import measured_manifest
from system import storage
from system.data.corpus import (
    Corpus,
    Manifest,
    Shard,
    make_manifest,
    moved_shards,
    shard_directory,
    write_manifest,
    write_shard,
)
from system.data.rows.conversation import SPLITS
from system.errors import DataError, StageError
from system.models.base import load_tokenizer
from system.schema import CORPUS
from system.tagging.choose import (
    TAGS,
    TagAccuracy,
    encode_choice,
    instruction_of,
    measure_accuracy,
    pick,
    rename_categories,
    stratified_sizes,
)

BATCH_ROWS = 256
_COLUMNS = ["id", "category", "messages"]


def run(context: StageContext) -> StageResult:
    """Chooses categories for rows without one, measures accuracy, writes the new manifest.

    Raises:
        ConfigError: there is no name to choose among, or a name cannot be used.
        DataError: a category ends up with too few rows.
    """
    stage = _Tagging(context)
    to_tag = stage.rows_to_tag()
    stage.choose(to_tag)
    accuracy = stage.accuracy()
    tagged, dropped = stage.split_corpus()
    manifest = measured_manifest(context, tagged)
    _check_sizes(context, manifest)
    write_manifest(storage.join(context.attempt, "manifest.json"), manifest)
    storage.write_json(
        storage.join(context.attempt, "accuracy.json"),
        None if accuracy is None else accuracy.to_json(),
    )
    counts = {
        "rows": sum(shard.rows for shard in stage.corpus.manifest.shards),
        "tagged": to_tag,
        "renamed": stage.renamed,
        "dropped": dropped,
        "unusable": {
            reason: count
            for reason, count in manifest.rejected.items()
            if reason not in tagged.rejected
        },
        "categories": len(manifest.categories),
        "without_rows": sorted(set(stage.names) - set(manifest.categories)),
        "accuracy_rows": 0 if accuracy is None else accuracy.rows,
    }
    outputs = {"manifest": "manifest.json", "accuracy": "accuracy.json"}
    if to_tag:
        outputs["tags"] = "blocks"
    return StageResult(
        outputs=outputs,
        counts=counts,
        lines=_lines(counts, accuracy),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Rows that a scorer gets in one call."""

    name: str
    ids: list[str]
    known: list[str | None]
    instructions: list[str]


class _Tagging:
    """The work of one attempt.  The files of the attempt are its only state."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.config = context.config.tag
        self.corpus = Corpus.open(context.input("ingest", "manifest"))
        manifest = self.corpus.manifest
        rows = {
            name: sum(manifest.counts[split][name] for split in SPLITS)
            for name in manifest.categories
        }
        self.new_names = rename_categories(rows, self.config.categories, self.config.aliases)
        used_names = {name for name in self.new_names.values() if name is not None}
        self.names = tuple(sorted(self.config.categories or used_names))
        self.renamed = sum(
            rows[old] for old, new in self.new_names.items() if new not in (old, None)
        )
        self.known_rows: Counter[str] = Counter()
        for old, new in self.new_names.items():
            if new is not None:
                self.known_rows[new] += rows[old]
        self.batches_uri = storage.join(context.attempt, "blocks")

    def needs_choice(self, shard: Shard) -> bool:
        return shard.category is None or self.new_names[shard.category] is None

    def rows_to_tag(self) -> int:
        return sum(shard.rows for shard in self.corpus.manifest.shards if self.needs_choice(shard))

    def choose(self, total: int) -> None:
        if total:
            self._run_batches("tag", total, self._untagged_batches())

    def accuracy(self) -> TagAccuracy | None:
        """Accuracy on rows with a known category; None if it is turned off or there are none."""
        sizes = stratified_sizes(self._sample_supply(), self.config.accuracy_rows)
        total = sum(sizes.values())
        if not total or len(self.names) < 2:
            return None
        batches = list(self._accuracy_batches(sizes))
        self._run_batches("tag accuracy", total, iter(batches))
        tags = pa.concat_tables(self._read_batch(batch.name) for batch in batches)
        return measure_accuracy(tags, self.known_rows)

    def split_corpus(self) -> tuple[Manifest, dict[str, int]]:
        """Writes the shards whose categories changed, and refers to all others.

        Returns:
            The new manifest, and the number of rows without a category, which are left out.
        """
        moved = dict(
            zip(
                self.corpus.manifest.shards,
                moved_shards(self.corpus, self.context.attempt),
                strict=True,
            )
        )
        shards: list[Shard] = []
        dropped = 0
        for number, shard in enumerate(self.corpus.manifest.shards):
            name = None if shard.category is None else self.new_names[shard.category]
            # Most shards keep their category; their files are not written again.
            if name is not None and name == shard.category:
                shards.append(moved[shard])
                continue
            new_shards = list(self._split_shard(number, shard, name))
            # A row for which the engine failed has no category and so falls into no new shard.
            dropped += shard.rows - sum(part.rows for part in new_shards)
            shards += new_shards
        old = self.corpus.manifest
        reasons = {"tag-failed": dropped} if dropped else {}
        manifest = make_manifest(
            shards,
            read=old.read,
            kept=old.kept - dropped,
            duplicates=old.duplicates,
            rejected={**old.rejected, **reasons},
            sources=old.sources,
            details=old.details,
        )
        return manifest, reasons

    def _split_shard(self, number: int, shard: Shard, name: str | None) -> Iterator[Shard]:
        table = self.corpus.read_shard(shard)
        if name is not None:
            chosen = pa.array([name] * table.num_rows, pa.string())
        else:
            starts = range(0, table.num_rows, BATCH_ROWS)
            batches = [self._read_batch(_batch_name(shard, start)) for start in starts]
            chosen = pa.concat_tables(batches).column("category").combine_chunks()
        index = CORPUS.get_field_index("category")
        table = table.set_column(index, CORPUS.field("category"), chosen)
        names = np.array(chosen.to_pylist(), dtype=object)
        for category in self.names:
            part = table.filter(pa.array(names == category))
            if part.num_rows:
                path = f"{shard_directory(shard.split, category)}/{number:05d}.arrow"
                yield write_shard(self.context.attempt, path, part, shard.split, category)

    def _sample_supply(self) -> dict[str, int]:
        """Train rows with a category from the source, by the new name of the category."""
        supply: Counter[str] = Counter()
        for old, count in self.corpus.counts("train").items():
            new = self.new_names[old]
            if new is not None:
                supply[new] += count
        return dict(supply)

    def _accuracy_batches(self, sizes: Mapping[str, int]) -> Iterator[_Batch]:
        for place, (name, size) in enumerate(sorted(sizes.items())):
            olds = [old for old, new in self.new_names.items() if new == name]
            samples = [
                self.corpus.sample("train", old, size, self.context.config.seed) for old in olds
            ]
            rows = pa.concat_tables(samples).slice(0, size)
            for start in range(0, rows.num_rows, BATCH_ROWS):
                part = rows.slice(start, BATCH_ROWS)
                yield _batch(f"accuracy-{place:04d}-{start:08d}", part, [name] * part.num_rows)

    def _untagged_batches(self) -> Iterator[_Batch]:
        for shard in self.corpus.manifest.shards:
            if self.needs_choice(shard):
                table = self.corpus.read_shard(shard, _COLUMNS)
                for start in range(0, table.num_rows, BATCH_ROWS):
                    part = table.slice(start, BATCH_ROWS)
                    known = part.column("category").to_pylist()
                    yield _batch(_batch_name(shard, start), part, known)

    def _run_batches(self, label: str, total: int, batches: Iterator[_Batch]) -> None:
        done = set(storage.whole_names(self.batches_uri))
        tokenizer = load_tokenizer(
            self.context.input("model", "model"),
            trust_remote_code=self.context.config.model.trust_remote_code,
        )
        limit = self.config.max_instruction_tokens
        empty = encode_choice(tokenizer, [""], self.names, limit)
        pool = scorer_pool(self.context)
        prior = self._prior(pool, empty.prompts, empty.names)
        waiting: dict[Any, _Batch] = {}

        def keep(finished: Iterable[Done]) -> None:
            for unit in finished:
                batch = waiting.pop(unit.key)
                tags = pick(batch.ids, batch.known, unit.value, self.names, prior)
                storage.write_table(self._batch_uri(batch.name), tags)
                bar.advance(len(batch.ids))

        with self.context.progress.bar(label, total=total) as bar:
            for batch in batches:
                if f"{batch.name}.parquet" in done:
                    bar.skip(len(batch.ids))
                    continue
                encoded = encode_choice(tokenizer, batch.instructions, self.names, limit)
                waiting[batch.name] = batch
                pool.submit(batch.name, "choose", None, encoded.prompts, encoded.names)
                # One batch waits beside those in work, so that no scorer waits for the tokenizer.
                while pool.num_pending > pool.spec.num_actors:
                    keep(wait_any([pool]))
            while waiting:
                keep(wait_any([pool]))

    def _prior(self, pool: ActorPool, prompts: list[list[int]], names: list[list[int]]) -> Any:
        """Log-likelihood of each name after an empty instruction; computed once and stored."""
        if not self.config.prior_correction:
            return None
        uri = storage.join(self.context.attempt, "prior.json")
        if not storage.is_whole(uri):
            ((_, value),) = pool.map({"prior": (None, prompts, names)}, "choose")
            if np.isnan(value).any():
                raise StageError(
                    "expected a log-likelihood of each category name after an empty instruction, "
                    "found none from the scoring engine; set tag.prior_correction to "
                    "false or use another model"
                )
            storage.write_json(uri, dict(zip(self.names, value[0].tolist(), strict=True)))
        prior = storage.read_json(uri)
        return np.array([prior[name] for name in self.names])

    def _batch_uri(self, name: str) -> str:
        return storage.join(self.batches_uri, f"{name}.parquet")

    def _read_batch(self, name: str) -> pa.Table:
        return storage.read_table(self._batch_uri(name)).cast(TAGS)


def _batch_name(shard: Shard, start: int) -> str:
    """Named by the content of the shard, so a continued attempt finds the right file."""
    return f"shard-{shard.split}-{shard.sha256[:16]}-{start:08d}"


def _batch(name: str, rows: pa.Table, known: list[str | None]) -> _Batch:
    return _Batch(
        name=name,
        ids=rows.column("id").to_pylist(),
        known=known,
        instructions=[instruction_of(turns) for turns in rows.column("messages").to_pylist()],
    )


def _check_sizes(context: StageContext, manifest: Manifest) -> None:
    needed = {
        "train": context.config.ingest.min_train_rows,
        "estimate": context.config.ingest.min_heldout_rows,
        "test": context.config.ingest.min_heldout_rows,
    }
    for split, least in needed.items():
        small = {name: n for name, n in manifest.counts[split].items() if n < least}
        if small:
            found = dict(list(small.items())[:10])
            more = f" and {len(small) - 10:,} more" if len(small) > 10 else ""
            raise DataError(
                f"after tagging, expected at least {least} {split} rows of every category with a "
                f"response within model.max_length, found {found}{more}. Leave these names out of "
                "tag.categories, raise model.max_length, merge them into others with "
                "tag.aliases, or lower ingest.min_train_rows / ingest.min_heldout_rows."
            )


def _lines(counts: Mapping[str, Any], accuracy: TagAccuracy | None) -> tuple[str, ...]:
    lines = [
        f"{counts['rows']:,} rows in {counts['categories']} categories; {counts['tagged']:,} "
        f"tagged by the model, {counts['renamed']:,} renamed"
    ]
    if counts["without_rows"]:
        lines.append(
            f"categories left out, because no row belongs to them: "
            f"{', '.join(counts['without_rows'])}"
        )
    if counts["dropped"]:
        lines.append(
            f"rows left out, because the engine failed on them: {counts['dropped']['tag-failed']:,}"
        )
    if counts["unusable"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["unusable"].items())
        lines.append(
            f"rows left out, because no response fits into model.max_length or the chat template "
            f"cannot render them: {reasons}"
        )
    if accuracy is not None:
        share = accuracy.interval
        lines.append(
            f"tagging accuracy on {accuracy.rows:,} rows with known categories: {share.value:.1%} "
            f"({share.low:.1%} to {share.high:.1%}; always the same name: {accuracy.chance:.1%})"
        )
    return tuple(lines)
