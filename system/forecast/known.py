"""What a forecast can be computed from, depending on how far a run is.

After stage `tag` every row's length is known, so what will be drawn has exact tokens.  After
`ingest`, with a tokenizer at hand, a seeded sample of every category gives means.  Before that the
corpus is not there, and nothing is said.
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
"""Train rows times replications up to which drawing them all (1 microsecond each) is worth it."""
_SAMPLED_ROWS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Categories, rows and tokens, as far as they are known."""

    basis: Literal["exact", "means", "sample"]
    """`exact`: lengths of all rows; `means`: exact means in place of too many rows; `sample`."""
    categories: tuple[str, ...]
    rows: Mapping[str, Mapping[str, int]]
    """Split -> category -> rows."""
    tokens: Mapping[str, float]
    """Mean tokens of a train row by category, prompt included."""
    response_tokens: Mapping[str, float]
    lengths: RowLengths
    heldout: HeldoutLengths
    """What every intervention is scored on."""
    left_out: str
    """What could not be counted, for people; empty: nothing."""
    relative_error: float
    """Standard error of the tokens, as a share of them; 0 where nothing was sampled."""
    questions: int
    """Rows whose answers evaluation generates, at most."""


def from_tagged(corpus: Corpus, config: RunConfig, model_dir: Path | None) -> Known:
    """What a tagged corpus tells.

    Args:
        corpus: of stage `tag`.
        config: of the run.
        model_dir: of stage `model`; only `influence.targets` need it.
    """
    rows = {split: corpus.counts(split) for split in SPLITS}
    sums = {split: corpus.manifest.details["tokens"][split] for split in SPLITS}
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
        left_out = "held-out rows are counted without influence.targets and influence.metric: "
        left_out += "the model is not on this machine"
    return Known(
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


def from_ingested(corpus: Corpus, config: RunConfig, model_dir: Path) -> Known:
    """What a sample of a corpus that is not tagged yet tells; rows without a category are shared
    out equally.

    Args:
        corpus: of stage `ingest`.
        config: of the run.
        model_dir: with the tokenizer; of stage `model`, or what `model.path` names.

    Raises:
        ConfigError: there is no category to choose among.
        DataError: no row fits into `model.max_length`.
    """
    tokenizer = stage_tokenizer(config, model_dir)
    manifest = corpus.manifest
    found = {name: sum(manifest.counts[split][name] for split in SPLITS) for name in
             manifest.categories}  # fmt: skip
    names = rename_categories(found, config.tag.categories, config.tag.aliases)
    kept = {name for name in names.values() if name is not None}
    categories = tuple(sorted(config.tag.categories or kept))
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
            f"{corpus.uri}: expected rows that fit the model, found {len(whole)} with a response "
            "within model.max_length in a sample of all categories; raise model.max_length"
        )
    sample = {name: _enough(part, whole) for name, part in parts.items()}
    rows = {split: _shared_out(corpus, split, names, categories) for split in SPLITS}
    means = {name: float(values[:, 0].mean()) for name, values in sample.items()}
    errors = [float(values[:, 0].var(ddof=1)) / len(values) for values in sample.values()]
    response = {name: float(values[:, 1].mean()) for name, values in sample.items()}
    lengths = _mean_lengths(rows, dict.fromkeys(SPLITS, means), response)
    external = "influence.targets are not counted yet" if config.influence.targets else ""
    return Known(
        basis="sample",
        categories=categories,
        rows=rows,
        tokens=means,
        response_tokens=response,
        lengths=lengths,
        heldout=_sampled_heldout(config, categories, lengths, means, response),
        left_out=external,
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
    """Rows, or (`accuracy`) prompts and the longest answers of as many rows as are asked for."""
    if config.influence.metric == "loss":
        return loss_heldout(config, categories, lengths)
    asked = [tokens[name] - response[name] + answer_tokens(config) for name in categories]
    return lambda trained: np.repeat(asked, config.influence.heldout_rows)


def probe_rows(corpus: Corpus, config: RunConfig, model_dir: Path) -> pa.Table:
    """TOKENS rows to measure speed on: equally many of every category, in a seeded order.

    Args:
        corpus: tagged or not.
        config: of the run.
        model_dir: with the tokenizer.
    """
    import pyarrow as pa

    tokenizer = stage_tokenizer(config, model_dir)
    seed = seed_of(config.seed, "forecast", "probe")
    wanted = 12 * config.influence.batch_size
    groups = (*corpus.categories, *([None] if corpus.manifest.untagged["train"] else []))
    each = max(2, -(-wanted // max(1, len(groups))))
    tables = [
        encode_table(_rows(corpus, name, each, seed), tokenizer, config.model.max_length)[0]
        for name in groups
    ]
    whole = pa.concat_tables(tables)
    order = np.random.default_rng(seed).permutation(whole.num_rows)[:wanted]
    return whole.take(pa.array(order))


def _enough(parts: list[np.ndarray], whole: np.ndarray) -> np.ndarray:
    """The rows of a category; those of all where it has less than two."""
    own = np.concatenate([*parts, whole[:0]])
    return own if len(own) > 1 else whole


def _sample(
    corpus: Corpus, category: str | None, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """[rows, 2] tokens and response tokens of some train rows."""
    rows = _rows(corpus, category, _SAMPLED_ROWS, seed_of(config.seed, "forecast"))
    tokens, _ = encode_table(rows, tokenizer, config.model.max_length)
    lengths = [len(row) for row in tokens.column("input_ids").to_pylist()]
    responses = [sum(mask) for mask in tokens.column("response_mask").to_pylist()]
    return np.array([lengths, responses], dtype=np.float64).T.reshape(-1, 2)


def _rows(corpus: Corpus, category: str | None, num_rows: int, seed: int) -> pa.Table:
    """Rows of a category, its untagged ones named as such: encoding wants a name."""
    import pyarrow as pa

    rows = corpus.sample("train", category, num_rows, seed)
    if category is not None:
        return rows
    place = rows.schema.get_field_index("category")
    return rows.set_column(place, "category", pa.array(["untagged"] * rows.num_rows, pa.string()))


def _shared_out(
    corpus: Corpus, split: str, names: Mapping[str, str | None], categories: tuple[str, ...]
) -> dict[str, int]:
    counts = dict.fromkeys(categories, 0)
    unknown = corpus.manifest.untagged[split]
    for old, count in corpus.counts(split).items():
        new = names[old]
        if new is None:
            unknown += count
        else:
            counts[new] += count
    return {name: count + unknown // len(categories) for name, count in counts.items()}


def _mean_lengths(
    rows: Mapping[str, Mapping[str, int]],
    means: Mapping[str, Mapping[str, float]],
    response: Mapping[str, float],
) -> RowLengths:
    def lengths(split: str, category: str, wanted: int, seed: int) -> DrawnLengths:
        available = min(wanted, rows[split][category])
        mean = means[split].get(category, 0.0)
        return DrawnLengths(
            ids=[],
            tokens=np.full(available, mean, dtype=np.float64),
            response=np.full(available, response.get(category, 0.0), dtype=np.float64),
        )

    return lengths


def _count_questions(corpus: Corpus, most: int) -> int:
    if not most:
        return 0
    total = 0
    for category in corpus.categories:
        tables = corpus.iter_tables("test", category, ["id", "answer"])
        answers = sum(len(table) - table.column("answer").null_count for table in tables)
        total += min(most, answers)
    return total


def stage_tokenizer(config: RunConfig, model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with the chat template that the run uses."""
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    tokenizer.chat_template = template_of(config.model, tokenizer)
    return tokenizer
