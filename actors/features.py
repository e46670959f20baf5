"""The first part of stage `select`: actors compute scores and vectors of all train rows.

    driver: blocks ──> Scorer.measure (loss, ifd) or Featurer.score (function) ──> scores/*.parquet
            shards ──> Featurer.count ── sum ──> word weights                        (tf-idf only)
                   ──> Featurer.embed ──> vectors/*.arrow

Each file commits its work unit.  All categories are covered, not only those in the mix, because
the arms of stage `evaluate` select from the others too, with the same scores and vectors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np

from actors import scorer
from actors.pool import ActorPool, ActorSpec
from actors.stage import StageContext
from system import storage
from system.config import ModelConfig, SelectConfig
from system.data.corpus import Corpus, Shard, make_manifest
from system.functions import UserFunction
from system.models.base import load_model, load_tokenizer
from system.selection import embed, scores
from system.selection.scores import Block

POOL = "features"


class Featurer:
    """Actor that computes scores and vectors; holds the base model if vectors come from it."""

    def __init__(
        self,
        corpus: Corpus,
        attempt: str,
        settings: SelectConfig,
        model: tuple[str, ModelConfig, str] | None,
    ) -> None:
        self._corpus = corpus
        self._attempt = attempt
        self._settings = settings
        self._num_rows = sum(corpus.counts("train").values())
        self._weights: np.ndarray | None = None
        if model is not None:
            uri, config, device = model
            self._copy = storage.LocalCopy(uri)
            trust = config.trust_remote_code
            self._model = load_model(
                self._copy.path, dtype=config.dtype, device=device, trust_remote_code=trust
            )
            self._tokenizer = load_tokenizer(self._copy.path, trust_remote_code=trust)
            self._max_length = config.max_length

    def score(self, block: Block, function: UserFunction) -> None:
        """Computes a block's scores with the user's function and commits them."""
        block_scores = scores.score_with(function, self._corpus, block)
        scores.write_scores(self._attempt, block, block_scores)

    def count(self, shard: Shard) -> tuple[np.ndarray, int]:
        """The number of rows of a shard with each word, and the number of rows counted."""
        return embed.count_words(self._corpus, shard, self._num_rows)

    def embed(self, shard: Shard) -> None:
        """Computes a shard's vectors and commits them; keeps the word weights for later calls."""
        match self._settings.embedding:
            case "tf-idf":
                if self._weights is None:
                    self._weights = embed.read_weights(self._attempt)
                vectors = embed.embed_texts(self._corpus, shard, self._weights)
                has_vector = np.ones(len(vectors), bool)
            case "model":
                vectors, has_vector = embed.embed_model(
                    self._corpus, shard, self._model, self._tokenizer, self._max_length
                )
            case "column":
                vectors, has_vector = embed.embed_column(self._corpus, shard)
        embed.write_vectors(self._attempt, shard, vectors, has_vector)


def make_features(context: StageContext, corpus: Corpus) -> None:
    """Computes all scores and vectors that the method needs, in the attempt's directory.

    Raises:
        ConfigError: the user's function cannot be used.
        DataError: vectors of the corpus cannot be used.
    """
    try:
        _score(context, corpus)
        _embed(context, corpus)
    finally:
        context.cluster.close_pool(POOL)


def _score(context: StageContext, corpus: Corpus) -> None:
    settings, attempt = context.config.select, context.attempt
    blocks = {block.path: block for block in scores.score_blocks(corpus, settings)}
    remaining = {
        path: block for path, block in blocks.items() if not scores.is_scored(attempt, block)
    }
    if not remaining:
        return
    units: dict[Hashable, tuple[Any, ...]]
    function = scores.score_function(settings)
    if function is not None:
        pool = _pool(context, corpus)
        units = {path: (block, function) for path, block in remaining.items()}
        answers = pool.map(units, "score")
    else:
        pool = scorer.scorer_pool(context)
        units = {
            path: (_one_shard(corpus, block.shard), block, settings.score, attempt)
            for path, block in remaining.items()
        }
        answers = pool.map(units, "measure")
    total = sum(block.rows for block in blocks.values())
    with context.progress.bar("select: score", total=total) as bar:
        bar.skip(total - sum(block.rows for block in remaining.values()))
        for path, _ in answers:
            bar.advance(blocks[str(path)].rows)


def _embed(context: StageContext, corpus: Corpus) -> None:
    settings, attempt = context.config.select, context.attempt
    if not settings.uses_embedding:
        return
    shards = {shard.path: shard for shard in _train_shards(corpus)}
    remaining = [path for path, shard in shards.items() if not embed.has_vectors(attempt, shard)]
    if not remaining:
        return
    if settings.embedding == "model":
        # Idle scorers would hold the CPUs or the GPU memory that these actors need.
        context.cluster.close_pool(scorer.POOL)
    pool = _pool(context, corpus)
    if settings.embedding == "tf-idf" and not embed.has_weights(attempt):
        _count_words(context, pool, shards)
    with context.progress.bar("select: embed", total=len(shards)) as bar:
        bar.advance(len(shards) - len(remaining))
        for _ in pool.map({path: (shards[path],) for path in remaining}, "embed"):
            bar.advance()


def _count_words(context: StageContext, pool: ActorPool, shards: dict[str, Shard]) -> None:
    counts: np.ndarray | None = None
    num_rows = 0
    with context.progress.bar("select: count words", total=len(shards)) as bar:
        for _, (shard_counts, rows) in pool.map(
            {path: (shards[path],) for path in shards}, "count"
        ):
            # Whole numbers: the sum does not depend on which shard is finished first.
            counts = shard_counts if counts is None else counts + shard_counts
            num_rows += rows
            bar.advance()
    assert counts is not None, "a corpus has at least one train shard"
    embed.write_weights(context.attempt, counts, num_rows)


def _pool(context: StageContext, corpus: Corpus) -> ActorPool:
    config = context.config
    cluster = config.cluster
    model = None
    if config.select.uses_embedding and config.select.embedding == "model":
        device = "cuda" if cluster.scorer_gpus > 0 else "cpu"
        model = context.input("model", "model"), config.model, device
    return context.cluster.pool(
        ActorSpec(
            name=POOL,
            actor_class=Featurer,
            args=(corpus, context.attempt, config.select, model),
            num_actors=config.cluster.num_ingestors
            if model is None
            else config.cluster.num_scorers,
            num_cpus=0.5 if model is None else config.cluster.actor_cpus,
            num_gpus=0.0 if model is None else config.cluster.scorer_gpus,
            max_attempts=config.cluster.max_attempts,
        )
    )


def _train_shards(corpus: Corpus) -> Iterator[Shard]:
    for category in corpus.categories:
        yield from corpus.shards("train", category)


def _one_shard(corpus: Corpus, shard: Shard) -> Corpus:
    """A corpus of one shard, for one work unit: the manifest of all shards may be large."""
    return Corpus(corpus.uri, make_manifest([shard]))
