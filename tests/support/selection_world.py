"""Corpora for tests of the selection: given scores, vectors and texts, in shards of any size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from system.config import SelectConfig
from system.data.corpus import Corpus, make_manifest, write_manifest, write_shard
from system.schema import CORPUS
from system.selection import embed, scores


def hex_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def rows(
    count: int,
    *,
    category: str = "a",
    start: int = 0,
    score: Sequence[float | None] | None = None,
    vectors: Sequence[Sequence[float] | None] | None = None,
    texts: Sequence[str] | None = None,
) -> pa.Table:
    """CORPUS rows, ordered by id; row k of the arguments is the row with `hex_id(start + k)`."""
    said = texts or [f"answer {start + k}" for k in range(count)]
    messages = [
        [{"role": "user", "content": f"question {start + k}"}, {"role": "assistant", "content": t}]
        for k, t in enumerate(said)
    ]
    columns = {
        "id": [hex_id(start + k) for k in range(count)],
        "category": [category] * count,
        "source": ["s"] * count,
        "messages": messages,
        "answer": [None] * count,
        "answer_pattern": [None] * count,
        "score": score or [None] * count,
        "embedding": vectors or [None] * count,
    }
    table = pa.table(columns, schema=CORPUS)
    return table.take(pa.array(np.argsort(np.array(columns["id"]))))


def corpus_of(folder: Path | str, shard_rows: int, *tables: pa.Table) -> Corpus:
    """One category a table, cut into shards of so many rows."""
    shards = []
    for number, table in enumerate(tables):
        category = table["category"][0].as_py()
        for start in range(0, table.num_rows, shard_rows):
            path = f"{number}-{start}.arrow"
            part = table.slice(start, shard_rows)
            shards.append(write_shard(str(folder), path, part, "train", category))
    uri = f"{folder}/manifest.json"
    write_manifest(uri, make_manifest(shards))
    return Corpus.open(uri)


def make_features(corpus: Corpus, settings: SelectConfig, attempt: str) -> None:
    """What the actors do, in this process."""
    function = scores.score_function(settings)
    for block in scores.score_blocks(corpus, settings):
        assert function is not None
        scores.write_scores(attempt, block, scores.score_with(function, corpus, block))
    if not settings.uses_embedding:
        return
    shards = [shard for name in corpus.categories for shard in corpus.shards("train", name)]
    num_rows = sum(shard.rows for shard in shards)
    if settings.embedding == "tf-idf":
        counted = [embed.count_words(corpus, shard, num_rows) for shard in shards]
        counts = np.sum([counts for counts, _ in counted], axis=0)
        embed.write_weights(attempt, counts, sum(rows for _, rows in counted))
    for shard in shards:
        if settings.embedding == "tf-idf":
            vectors = embed.embed_texts(corpus, shard, embed.read_weights(attempt))
            has_vector = np.ones(len(vectors), bool)
        else:
            vectors, has_vector = embed.embed_column(corpus, shard)
        embed.write_vectors(attempt, shard, vectors, has_vector)
