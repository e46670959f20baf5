"""Stage `tag`: every row a category, and how far such categories can be trusted.

    corpus ── blocks of rows ──> Scorer.choose ──> blocks/<name>.parquet   committed one by one
                                                          │ all there
          old shards + newly categorised ones ──> lengths (actors.token_counter) ──> manifest.json

Blocks are cut by rows, not by actors, so the number of scorers changes nothing.  A driver that
starts again finds the blocks that are written and asks only for the others.
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

BLOCK_ROWS = 256
_COLUMNS = ["id", "category", "messages"]


def run(context: StageContext) -> StageResult:
    """Chooses categories for rows without one, measures accuracy, writes the new manifest.

    Raises:
        ConfigError: there is no name to choose among, or a name is not usable.
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
        "unusable": tagged.kept - manifest.kept,
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
class _Block:
    """Rows that one call of a scorer looks at."""

    name: str
    ids: list[str]
    known: list[str | None]
    instructions: list[str]


class _Tagging:
    """The work of one attempt; its files are its only state."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.config = context.config.tag
        self.corpus = Corpus.open(context.input("ingest", "manifest"))
        manifest = self.corpus.manifest
        found = {
            name: sum(manifest.counts[split][name] for split in SPLITS)
            for name in manifest.categories
        }
        self.new_names = rename_categories(found, self.config.categories, self.config.aliases)
        kept = {name for name in self.new_names.values() if name is not None}
        self.names = tuple(sorted(self.config.categories or kept))
        self.renamed = sum(
            found[old] for old, new in self.new_names.items() if new not in (old, None)
        )
        self.known_rows: Counter[str] = Counter()
        for old, new in self.new_names.items():
            if new is not None:
                self.known_rows[new] += found[old]
        self.blocks_uri = storage.join(context.attempt, "blocks")

    def needs_choice(self, shard: Shard) -> bool:
        return shard.category is None or self.new_names[shard.category] is None

    def rows_to_tag(self) -> int:
        return sum(shard.rows for shard in self.corpus.manifest.shards if self.needs_choice(shard))

    def choose(self, total: int) -> None:
        if total:
            self._run_blocks("tag", total, self._untagged_blocks())

    def accuracy(self) -> TagAccuracy | None:
        """On rows whose category is known; None where that is turned off or there are none."""
        sizes = stratified_sizes(self._sample_supply(), self.config.accuracy_rows)
        total = sum(sizes.values())
        if not total or len(self.names) < 2:
            return None
        blocks = list(self._accuracy_blocks(sizes))
        self._run_blocks("tag accuracy", total, iter(blocks))
        tags = pa.concat_tables(self._read_block(block.name) for block in blocks)
        return measure_accuracy(tags, self.known_rows)

    def split_corpus(self) -> tuple[Manifest, dict[str, int]]:
        """Old shards as they are, changed ones anew; rows that got no category are left out."""
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
            if name is not None and name == shard.category:
                shards.append(moved[shard])
                continue
            new = list(self._split_shard(number, shard, name))
            dropped += shard.rows - sum(part.rows for part in new)
            shards += new
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
            starts = range(0, table.num_rows, BLOCK_ROWS)
            blocks = [self._read_block(_block_name(shard, start)) for start in starts]
            chosen = pa.concat_tables(blocks).column("category").combine_chunks()
        index = CORPUS.get_field_index("category")
        table = table.set_column(index, CORPUS.field("category"), chosen)
        names = np.array(chosen.to_pylist(), dtype=object)
        for category in self.names:
            part = table.filter(pa.array(names == category))
            if part.num_rows:
                path = f"{shard_directory(shard.split, category)}/{number:05d}.arrow"
                yield write_shard(self.context.attempt, path, part, shard.split, category)

    def _sample_supply(self) -> dict[str, int]:
        """Train rows that came with a category, by its present name."""
        supply: Counter[str] = Counter()
        for old, count in self.corpus.counts("train").items():
            new = self.new_names[old]
            if new is not None:
                supply[new] += count
        return dict(supply)

    def _accuracy_blocks(self, sizes: Mapping[str, int]) -> Iterator[_Block]:
        for place, (name, size) in enumerate(sorted(sizes.items())):
            olds = [old for old, new in self.new_names.items() if new == name]
            samples = [
                self.corpus.sample("train", old, size, self.context.config.seed) for old in olds
            ]
            rows = pa.concat_tables(samples).slice(0, size)
            for start in range(0, rows.num_rows, BLOCK_ROWS):
                part = rows.slice(start, BLOCK_ROWS)
                yield _block(f"accuracy-{place:04d}-{start:08d}", part, [name] * part.num_rows)

    def _untagged_blocks(self) -> Iterator[_Block]:
        for shard in self.corpus.manifest.shards:
            if self.needs_choice(shard):
                table = self.corpus.read_shard(shard, _COLUMNS)
                for start in range(0, table.num_rows, BLOCK_ROWS):
                    part = table.slice(start, BLOCK_ROWS)
                    known = part.column("category").to_pylist()
                    yield _block(_block_name(shard, start), part, known)

    def _run_blocks(self, label: str, total: int, blocks: Iterator[_Block]) -> None:
        done = set(storage.list_names(self.blocks_uri))
        tokenizer = load_tokenizer(
            self.context.input("model", "model"),
            trust_remote_code=self.context.config.model.trust_remote_code,
        )
        limit = self.config.max_instruction_tokens
        empty = encode_choice(tokenizer, [""], self.names, limit)
        pool = scorer_pool(self.context)
        prior = self._prior(pool, empty.prompts, empty.names)
        waiting: dict[Any, _Block] = {}

        def keep(finished: Iterable[Done]) -> None:
            for unit in finished:
                block = waiting.pop(unit.key)
                tags = pick(block.ids, block.known, unit.value, self.names, prior)
                storage.write_table(self._block_uri(block.name), tags)
                bar.advance(len(block.ids))

        with self.context.progress.bar(label, total=total) as bar:
            for block in blocks:
                if f"{block.name}.parquet" in done:
                    bar.skip(len(block.ids))
                    continue
                encoded = encode_choice(tokenizer, block.instructions, self.names, limit)
                waiting[block.name] = block
                pool.submit(block.name, "choose", None, encoded.prompts, encoded.names)
                # One block waits beside those in work, so that no scorer waits for the tokenizer.
                while pool.num_pending > pool.spec.num_actors:
                    keep(wait_any([pool]))
            while waiting:
                keep(wait_any([pool]))

    def _prior(self, pool: ActorPool, prompts: list[list[int]], names: list[list[int]]) -> Any:
        """Log-likelihood of every name after an empty instruction; kept like a block."""
        if not self.config.prior_correction:
            return None
        uri = storage.join(self.context.attempt, "prior.json")
        if not storage.exists(uri):
            ((_, value),) = pool.map({"prior": (None, prompts, names)}, "choose")
            if np.isnan(value).any():
                raise StageError(
                    "the scoring engine gave no log-likelihood for the category names after an "
                    "empty instruction; set tag.prior_correction to false or use another model"
                )
            storage.write_json(uri, dict(zip(self.names, value[0].tolist(), strict=True)))
        kept = storage.read_json(uri)
        return np.array([kept[name] for name in self.names])

    def _block_uri(self, name: str) -> str:
        return storage.join(self.blocks_uri, f"{name}.parquet")

    def _read_block(self, name: str) -> pa.Table:
        return storage.read_table(self._block_uri(name)).cast(TAGS)


def _block_name(shard: Shard, start: int) -> str:
    """The shard's content names its blocks: an attempt may be continued with its files only."""
    return f"shard-{shard.split}-{shard.sha256[:16]}-{start:08d}"


def _block(name: str, rows: pa.Table, known: list[str | None]) -> _Block:
    return _Block(
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
            raise DataError(
                f"after tagging, expected at least {least} {split} rows of every category with a "
                f"response within model.max_length, found {small}. Leave these names out of "
                "tag.categories, raise model.max_length, merge them into others with "
                "tag.aliases, or lower ingest.min_train_rows / ingest.min_heldout_rows."
            )


def _lines(counts: Mapping[str, Any], accuracy: TagAccuracy | None) -> tuple[str, ...]:
    lines = [
        f"{counts['rows']:,} rows in {counts['categories']} categories; {counts['tagged']:,} "
        f"tagged by the model, {counts['renamed']:,} renamed"
    ]
    if counts["without_rows"]:
        lines.append(f"left out, no row fell into them: {', '.join(counts['without_rows'])}")
    if counts["dropped"]:
        lines.append(f"left out, no answer from the engine: {counts['dropped']['tag-failed']:,}")
    if counts["unusable"]:
        lines.append(
            f"left out, no response within model.max_length or no place in the chat template: "
            f"{counts['unusable']:,}"
        )
    if accuracy is not None:
        share = accuracy.interval
        lines.append(
            f"tagging accuracy on {accuracy.rows:,} rows with known categories: {share.value:.1%} "
            f"({share.low:.1%} to {share.high:.1%}; always the same name: {accuracy.chance:.1%})"
        )
    return tuple(lines)
