"""Rows without a response to learn leave the corpus, and what is left has its exact tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training_builders import CHATML, build_tokenizer

from system import storage
from system.data.corpus import Corpus, make_manifest, moved_shards, write_manifest, write_shard
from system.data.lengths import mean_response_tokens, measure_shard, without_unusable
from system.data.rows.conversation import SPLITS
from system.models.chat import encode
from system.schema import CORPUS

MAX_LENGTH = 60
LONG = {3, 4, 11}
"""Rows whose question leaves no room for the answer."""


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CHATML)


def turns(number: int) -> list[dict[str, str]]:
    question = "Write a poem. " * (40 if number in LONG else 1 + number % 3)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "The sea is wide. " * (1 + number % 2)},
    ]


def table(numbers: range, category: str) -> pa.Table:
    count = len(numbers)
    return pa.table(
        {
            "id": [f"{number:032x}" for number in numbers],
            "category": [category] * count,
            "source": ["s"] * count,
            "messages": [turns(number) for number in numbers],
            "answer": [None] * count,
            "answer_pattern": [None] * count,
            "score": [None] * count,
            "embedding": [None] * count,
        },
        schema=CORPUS,
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Rows 0 to 8 of `short`, 9 to 12 of `mixed` in two shards, 20 in each other split."""
    base = str(tmp_path / "tags")
    parts = [(range(9), "train", "short"), (range(9, 11), "train", "mixed")]
    parts += [(range(11, 12), "train", "mixed"), (range(12, 13), "train", "mixed")]
    parts += [(range(20, 22), split, name) for split in SPLITS[1:] for name in ("short", "mixed")]
    shards = [
        write_shard(base, f"shards/{k}.arrow", table(numbers, name), split, name)
        for k, (numbers, split, name) in enumerate(parts)
    ]
    rows = sum(shard.rows for shard in shards)
    manifest = make_manifest(shards, read=rows + 2, kept=rows, rejected={"bad-json": 2})
    return Corpus(f"{base}/manifest.json", manifest)


def measured(corpus: Corpus, tokenizer) -> Corpus:
    attempt = corpus.base
    found = [
        measure_shard(corpus, shard, attempt, tokenizer, MAX_LENGTH)
        for shard in corpus.manifest.shards
    ]
    write_manifest(corpus.uri, without_unusable(corpus.manifest, found))
    return Corpus.open(corpus.uri)


def test_rows_without_a_response_leave_every_view_of_the_corpus(corpus, tokenizer):
    found = measured(corpus, tokenizer)
    assert found.counts("train") == {"short": 7, "mixed": 3}
    assert found.counts("test") == {"short": 2, "mixed": 2}
    manifest = found.manifest
    assert manifest.rejected == {"bad-json": 2, "no-response-token": 3}
    assert manifest.read == manifest.kept + sum(manifest.rejected.values())
    kept = {f"{number:032x}" for number in range(9) if number not in LONG}
    streamed = pa.concat_tables(found.iter_tables("train", "short", ["id"]))
    assert set(streamed["id"].to_pylist()) == kept
    assert set(found.sample("train", "short", 100, 0)["id"].to_pylist()) == kept
    assert sum(shard.rows for shard in found.shards("train", "mixed")) == 3
    assert len(found.shards("train", "mixed")) == 2, "a shard without a usable row is left out"


def test_token_counts_are_those_of_the_rows_that_are_left(corpus, tokenizer):
    found = measured(corpus, tokenizer)
    for split in SPLITS:
        for category in found.categories:
            rows = found.sample(split, category, 100, 0)["messages"].to_pylist()
            encoded = [encode(tokenizer, messages, MAX_LENGTH) for messages in rows]
            tokens = found.manifest.details["tokens"][split][category]
            assert tokens == sum(len(row.input_ids) for row in encoded)
            response = [int(np.count_nonzero(row.response_mask)) for row in encoded]
            assert min(response) > 0
            assert mean_response_tokens(found, split)[category] == pytest.approx(np.mean(response))


def test_a_measured_shard_is_not_measured_again(corpus, tokenizer, monkeypatch):
    shard = corpus.manifest.shards[0]
    first = measure_shard(corpus, shard, corpus.base, tokenizer, MAX_LENGTH)
    monkeypatch.setattr(Corpus, "read_shard", None)
    assert measure_shard(corpus, shard, corpus.base, tokenizer, MAX_LENGTH) == first


def test_a_manifest_elsewhere_leaves_the_same_rows_out(corpus, tokenizer, tmp_path):
    found = measured(corpus, tokenizer)
    elsewhere = str(tmp_path / "other" / "place")
    moved = make_manifest(moved_shards(found, elsewhere))
    write_manifest(storage.join(elsewhere, "manifest.json"), moved)
    other = Corpus.open(storage.join(elsewhere, "manifest.json"))
    left = other.sample("train", "short", 100, 0)
    assert left.equals(found.sample("train", "short", 100, 0))
