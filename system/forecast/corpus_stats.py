"""Rows and token lengths of the corpus, as far as the finished stages of a run provide them.

After stage `tag` the length of every row is known, so the tokens of drawn rows are exact.  After
stage `ingest`, if a tokenizer is available, a seeded sample of every category gives mean lengths.
Before that there is no corpus, and no forecast of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from system.config import RunConfig
from system.data.corpus import Corpus
from system.data.lengths import DrawnLengths, RowLengths, SeededLengths, mean_response_tokens
from system.data.rows.conversation import SPLITS
from system.errors import DataError
from system.influence.design.accuracy_targets import answer_tokens
from system.influence.design.cost import most_replications
from system.influence.design.heldout_cost import loss_heldout, stage_heldout
from system.influence.design.interventions import seed_of
from system.models.base import load_tokenizer, template_of
from system.models.chat import encode_table
from system.tagging.choose import rename_categories

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from system.influence.design.cost import HeldoutLengths

EXACT_ROWS = 2_000_000
"""Largest number of train rows times replications at which all rows are drawn (1 microsecond each).
"""
_SAMPLED_ROWS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusStats:
    """Categories, rows and token lengths of a corpus."""

    basis: Literal["exact", "means", "sample"]
    """`exact`: lengths of all rows; `means`: exact means, because there are too many rows;
    `sample`: means of a sample."""
    categories: tuple[str, ...]
    rows: Mapping[str, Mapping[str, int]]
    """Split -> category -> rows."""
    tokens: Mapping[str, float]
    """Category -> mean tokens of a train row, prompt included."""
    response_tokens: Mapping[str, float]
    lengths: RowLengths
    heldout: HeldoutLengths
    """Lengths of the held-out rows on which every intervention run is scored."""
    left_out: str
    """What could not be counted, for the reader of `check`; empty: nothing."""
    relative_error: float
    """Standard error of the tokens, as a share of them; 0 if nothing was sampled."""
    questions: int
    """Largest number of rows for which stage `evaluate` generates an answer."""


def from_tagged(corpus: Corpus, config: RunConfig, model_dir: Path | None) -> CorpusStats:
    """The statistics of a tagged corpus.

    Args:
        corpus: output of stage `tag`.
        config: configuration of the run.
        model_dir: output of stage `model`; needed only for `influence.targets` and accuracy.
    """
    rows = {split: corpus.counts(split) for split in SPLITS}
    sums = {split: corpus.manifest.details["tokens"][split] for split in SPLITS}
    # Drawing the very rows of the run is exact but takes time for each row and replication.
    is_small = sum(rows["train"].values()) * most_replications(config.influence) <= EXACT_ROWS
    means = {
        split: {name: sums[split][name] / count for name, count in counts.items() if count}
        for split, counts in rows.items()
    }
    response = mean_response_tokens(corpus)
    lengths = SeededLengths(corpus) if is_small else _mean_lengths(rows, means, response)
    needs_tokenizer = config.influence.targets or config.influence.metric == "accuracy"
    heldout, left_out = loss_heldout(config, corpus.categories, lengths), ""
    if model_dir is not None:
        heldout = stage_heldout(config, corpus, lengths, lambda: stage_tokenizer(config, model_dir))
    elif needs_tokenizer:
        left_out = "influence.targets and influence.metric are not included in the held-out rows, "
        left_out += "because the model is not on this machine"
    return CorpusStats(
        basis="exact" if is_small else "means",
        categories=corpus.categories,
        rows=rows,
        tokens=means["train"],
        response_tokens=response,
        lengths=lengths,
        heldout=heldout,
        left_out=left_out,
        relative_error=0.0,
        questions=_count_questions(corpus, config.evaluate.accuracy_rows),
    )


def from_ingested(corpus: Corpus, config: RunConfig, model_dir: Path) -> CorpusStats:
    """The statistics of a corpus that is not tagged yet, from a sample.

    Rows without a category are distributed equally over the categories.

    Args:
        corpus: output of stage `ingest`.
        config: configuration of the run.
        model_dir: directory with the tokenizer: output of stage `model`, or `model.path`.

    Raises:
        ConfigError: there is no category to choose among.
        DataError: no row fits into `model.max_length`.
    """
    tokenizer = stage_tokenizer(config, model_dir)
    manifest = corpus.manifest
    row_counts = {name: sum(manifest.counts[split][name] for split in SPLITS) for name in
                  manifest.categories}  # fmt: skip
    # Stage `tag` will rename the categories of the corpus in the same way.
    names = rename_categories(row_counts, config.tag.categories, config.tag.aliases)
    new_names = {name for name in names.values() if name is not None}
    categories = tuple(sorted(config.tag.categories or new_names))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in categories}
    pooled: list[np.ndarray] = []
    for old in (*manifest.categories, *([None] if manifest.untagged["train"] else [])):
        sampled = _sample(corpus, old, config, tokenizer)
        pooled.append(sampled)
        new = None if old is None else names[old]
        if new is not None:
            parts[new].append(sampled)
    whole = np.concatenate(pooled)
    if len(whole) < 2:
        raise DataError(
            f"{corpus.uri}: expected rows that fit into model.max_length, found {len(whole)} with "
            "a response within it in a sample of all categories; raise model.max_length"
        )
    sample = {name: _rows_or_all(part, whole) for name, part in parts.items()}
    rows = {split: _distributed(corpus, split, names, categories) for split in SPLITS}
    means = {name: float(values[:, 0].mean()) for name, values in sample.items()}
    errors = [float(values[:, 0].var(ddof=1)) / len(values) for values in sample.values()]
    response = {name: float(values[:, 1].mean()) for name, values in sample.items()}
    lengths = _mean_lengths(rows, dict.fromkeys(SPLITS, means), response)
    left_out = "influence.targets are not included yet" if config.influence.targets else ""
    return CorpusStats(
        basis="sample",
        categories=categories,
        rows=rows,
        tokens=means,
        response_tokens=response,
        lengths=lengths,
        heldout=_sampled_heldout(config, categories, lengths, means, response),
        left_out=left_out,
        relative_error=math.sqrt(sum(errors)) / sum(means.values()),
        questions=config.evaluate.accuracy_rows * len(categories),
    )


def _sampled_heldout(
    config: RunConfig,
    categories: Sequence[str],
    lengths: RowLengths,
    tokens: Mapping[str, float],
    response: Mapping[str, float],
) -> HeldoutLengths:
    """Lengths of the held-out rows; with `metric: accuracy`, of prompts and longest answers."""
    if config.influence.metric == "loss":
        return loss_heldout(config, categories, lengths)
    row_tokens = [tokens[name] - response[name] + answer_tokens(config) for name in categories]
    return lambda trained: np.repeat(row_tokens, config.influence.heldout_rows)


def probe_rows(corpus: Corpus, config: RunConfig, model_dir: Path) -> pa.Table:
    """TOKENS rows for the probe: equally many of every category, in a seeded order.

    Args:
        corpus: tagged or not.
        config: configuration of the run.
        model_dir: directory with the tokenizer.
    """
    import pyarrow as pa

    tokenizer = stage_tokenizer(config, model_dir)
    seed = seed_of(config.seed, "forecast", "probe")
    num_rows = 12 * config.influence.batch_size
    groups = (*corpus.categories, *([None] if corpus.manifest.untagged["train"] else []))
    rows_per_group = max(2, -(-num_rows // max(1, len(groups))))
    tables = [
        encode_table(_rows(corpus, name, rows_per_group, seed), tokenizer, config.model.max_length)[
            0
        ]
        for name in groups
    ]
    whole = pa.concat_tables(tables)
    order = np.random.default_rng(seed).permutation(whole.num_rows)[:num_rows]
    return whole.take(pa.array(order))


def _rows_or_all(parts: list[np.ndarray], whole: np.ndarray) -> np.ndarray:
    """The sampled rows of a category, or those of all categories if it has fewer than two."""
    own = np.concatenate([*parts, whole[:0]])
    return own if len(own) > 1 else whole


def _sample(
    corpus: Corpus, category: str | None, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """[rows, 2] tokens and response tokens of a sample of train rows."""
    rows = _rows(corpus, category, _SAMPLED_ROWS, seed_of(config.seed, "forecast"))
    tokens, _ = encode_table(rows, tokenizer, config.model.max_length)
    lengths = [len(row) for row in tokens.column("input_ids").to_pylist()]
    responses = [sum(mask) for mask in tokens.column("response_mask").to_pylist()]
    return np.array([lengths, responses], dtype=np.float64).T.reshape(-1, 2)


def _rows(corpus: Corpus, category: str | None, num_rows: int, seed: int) -> pa.Table:
    """A sample of a category; rows without one get the name `untagged`, as encoding needs one."""
    import pyarrow as pa

    rows = corpus.sample("train", category, num_rows, seed)
    if category is not None:
        return rows
    place = rows.schema.get_field_index("category")
    return rows.set_column(place, "category", pa.array(["untagged"] * rows.num_rows, pa.string()))


def _distributed(
    corpus: Corpus, split: str, names: Mapping[str, str | None], categories: tuple[str, ...]
) -> dict[str, int]:
    """Category -> rows of a split, with untagged rows distributed equally."""
    counts = dict.fromkeys(categories, 0)
    untagged = corpus.manifest.untagged[split]
    for old, count in corpus.counts(split).items():
        new = names[old]
        if new is None:
            untagged += count
        else:
            counts[new] += count
    return {name: count + untagged // len(categories) for name, count in counts.items()}


def _mean_lengths(
    rows: Mapping[str, Mapping[str, int]],
    means: Mapping[str, Mapping[str, float]],
    response: Mapping[str, float],
) -> RowLengths:
    def lengths(split: str, category: str, num_rows: int, seed: int) -> DrawnLengths:
        available = min(num_rows, rows[split][category])
        mean = means[split].get(category, 0.0)
        return DrawnLengths(
            ids=[],
            tokens=np.full(available, mean, dtype=np.float64),
            response=np.full(available, response.get(category, 0.0), dtype=np.float64),
        )

    return lengths


def _count_questions(corpus: Corpus, limit: int) -> int:
    """Test rows with an answer, at most `limit` of each category."""
    if not limit:
        return 0
    total = 0
    for category in corpus.categories:
        tables = corpus.iter_tables("test", category, ["id", "answer"])
        answers = sum(len(table) - table.column("answer").null_count for table in tables)
        total += min(limit, answers)
    return total


def stage_tokenizer(config: RunConfig, model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with the chat template that the run uses."""
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    tokenizer.chat_template = template_of(config.model, tokenizer)
    return tokenizer
