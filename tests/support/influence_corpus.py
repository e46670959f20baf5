"""A small planted corpus and an untrained model, as earlier stages leave them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from ingest_builders import LENIENT, write_lines

from system.config import (
    ClusterConfig,
    InfluenceConfig,
    IngestConfig,
    ModelConfig,
    RunConfig,
    SolveConfig,
    SourceConfig,
    TinyModelConfig,
)
from system.data.ingest.ingest import ingest_local
from system.examples.planted import planted_world
from system.examples.tiny_model import new_model, train_tokenizer

TASKS = ("colour", "colour-reworded", "size")


def influence_config(root: Path, **influence: object) -> RunConfig:
    """Three planted categories; a run takes about a second."""
    values = {
        "rows_per_category": 48,
        "dose_rows": 32,
        "heldout_rows": 16,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "warm_rows_per_category": 16,
        **influence,
    }
    return RunConfig(
        run_dir=str(root / "run"),
        data_dir=str(root / "data"),
        seed=3,
        sources=tuple(SourceConfig(path=f"{name}.jsonl", category=name) for name in TASKS),
        ingest=IngestConfig(**LENIENT, estimate_share=0.15, test_share=0.1),
        model=ModelConfig(path=str(root / "model"), max_length=64),
        influence=InfluenceConfig.model_validate(values),
        solve=SolveConfig(budget=100),
        cluster=ClusterConfig(address="local", num_cpus=2, engine_memory_gib=0.1),
    )


def build_inputs(root: Path, *, num_rows: int = 160) -> RunConfig:
    """Writes data, corpus (`corpus/manifest.json`) and model (`model/`) below the directory."""
    config = influence_config(root)
    (root / "data").mkdir(parents=True)
    world = planted_world(0)
    for task in world.tasks:
        if task.name in TASKS:
            write_lines(root / "data" / f"{task.name}.jsonl", world.rows(task, num_rows))
    ingest_local(config, str(root / "corpus"))

    def texts() -> Iterator[str]:
        for task in world.tasks:
            for row in world.rows(task, 60):
                yield f"{row['instruction']} {row['output']}"

    tokenizer = train_tokenizer(texts(), 700, 64)
    torch.manual_seed(0)
    tiny = TinyModelConfig(vocab_size=700, hidden_size=64, num_layers=2, num_heads=2)
    new_model(tiny, len(tokenizer), 64).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return config
