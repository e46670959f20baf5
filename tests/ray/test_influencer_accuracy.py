"""`influence.metric: accuracy` on a real Ray, with real trainings and real generations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from influence_corpus import influence_config
from influencer_world import World
from ingest_builders import write_lines

from system import storage
from system.config import RunConfig, SourceConfig, TinyModelConfig
from system.data.ingest.ingest import ingest_local
from system.errors import DataError
from system.examples.tiny_model import new_model, train_tokenizer
from system.influence.estimate.matrix import EffectMatrix

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ANSWERS = {"approve": "yes", "refuse": "no", "chat": None}


def rows(category: str) -> list[dict[str, str]]:
    """One form of words a category; where there is an answer it is always the same."""
    answer = ANSWERS[category]
    return [
        {"instruction": f"{category} number {n}", "output": answer or f"number {n} it is"}
        for n in range(160)
    ]


def build(root: Path) -> None:
    """Corpus and untrained model below the directory."""
    (root / "data").mkdir()
    for category in ANSWERS:
        write_lines(root / "data" / f"{category}.jsonl", rows(category))
    ingest_local(config(root), str(root / "corpus"))
    texts = [f"{row['instruction']} {row['output']}" for name in ANSWERS for row in rows(name)]
    tokenizer = train_tokenizer(iter(texts), 500, 64)
    torch.manual_seed(0)
    tiny = TinyModelConfig(vocab_size=500, hidden_size=64, num_layers=2, num_heads=2)
    new_model(tiny, len(tokenizer), 64).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("accuracy"), build, config)
    yield world
    world.cluster.shutdown()


def config(root: Path, **influence: object) -> RunConfig:
    """Two categories with verifiable answers, one without."""
    base = influence_config(root, metric="accuracy", max_new_tokens=6, **influence)
    sources = tuple(
        SourceConfig(path=f"{name}.jsonl", category=name, answer_pattern="(.+)" if answer else None)
        for name, answer in ANSWERS.items()
    )
    return base.model_copy(update={"sources": sources})


def test_answers_that_are_learnt_move_their_own_category(world):
    """Without its rows a category's answers are wrong; all of them are right with them."""
    dose = 96
    result = world.run(
        "learnt", rows_per_category=dose, dose_rows=dose, learning_rate=3e-3, batch_size=4
    )
    table = pq.read_table(world.path("learnt", "matrix.parquet"))
    matrix = EffectMatrix.from_table(table, direction="remove")
    assert set(matrix.targets) == {"approve", "refuse"} and len(matrix.sources) == 3
    for target in matrix.targets:
        row = matrix.targets.index(target)
        own = matrix.effect_TS[row, matrix.sources.index(target)] * dose
        assert 0.5 < own <= 1.0 + 1e-9, f"the share of right answers that {target} owes to itself"
    summary = storage.read_json(str(world.path("learnt", "summary.json")))
    assert summary["unit"] == "share of right answers"
    assert any("of right answers" in line for line in result.lines)
    scores = storage.read_table(str(world.path("learnt", "scores", "r00-reference.parquet")))
    assert set(np.unique(scores["nll"].to_numpy())) <= {0.0, 1.0}


def test_a_model_that_answers_nothing_right_is_told_so(world):
    with pytest.raises(DataError, match=r"answered every one of .* questions alike"):
        world.run("nothing", learning_rate=1e-9)
