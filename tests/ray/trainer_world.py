"""A run directory with a base model and a selection, as the stages before `train` leave them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.cluster import Cluster
from actors.stage import StageContext
from system import schema, storage
from system.config import RunConfig
from system.progress import Progress
from system.rundir import RunDir, StageRecord

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from training_builders import CHATML, build_model, build_tokenizer

WORDS = (
    "Which city is the capital of France Paris Italy Rome add return answer poem sea".split()  # noqa: SIM905
)


def build_selection(num_rows: int) -> pa.Table:
    """Conversations of random words in two stages."""
    generator = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(generator.choice(WORDS, size=count))

    rows = [
        {
            "stage": "base" if k < num_rows // 2 else "dependent",
            "position": k,
            "id": f"id{k:05d}",
            "category": ("city", "code")[k % 2],
            "messages": [
                {"role": "user", "content": words(generator.integers(3, 12))},
                {"role": "assistant", "content": words(generator.integers(2, 20))},
            ],
        }
        for k in range(num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=schema.SELECTION)


def build_world(root: Path, *, num_rows: int = 64, hidden_size: int = 32) -> None:
    """Writes the model and the selection."""
    tokenizer = build_tokenizer(CHATML)
    model = build_model(vocab_size=len(tokenizer), hidden_size=hidden_size)
    model.save_pretrained(root / "model" / "m" / "model")
    tokenizer.save_pretrained(root / "model" / "m" / "model")
    table = build_selection(num_rows)
    files = []
    for part, start in enumerate(range(0, num_rows, 40)):
        path = f"part-{part}.parquet"
        storage.write_table(
            str(root / "selection" / "s" / "selection" / path), table.slice(start, 40)
        )
        files.append({"path": path})
    storage.write_json(str(root / "selection" / "s" / "manifest.json"), {"files": files})


def build_context(
    root: Path, attempt: str, cluster: Cluster | None = None, **train
) -> StageContext:
    """The context of stage `train`; `train` overrides fields of TrainConfig."""
    config = RunConfig.model_validate(
        {
            "run_dir": str(root),
            "sources": [{"path": "unused.jsonl"}],
            "model": {"path": "builtin:tiny", "max_length": 96},
            "solve": {"budget": 64},
            "train": {
                "num_workers": 2,
                "learning_rate": 3e-3,
                "batch_size": 8,
                "checkpoint_every": 3,
                "micro_batch_tokens": 256,
                **train,
            },
            "cluster": {"address": "local", "num_cpus": 2},
        }
    )
    outputs = {
        "model": {"model": "model/m/model"},
        "select": {
            "manifest": "selection/s/manifest.json",
            "selection": "selection/s/selection",
        },
    }
    upstream = {
        stage: StageRecord(
            stage=stage,
            fingerprint=f"{stage}-fingerprint",
            inputs={},
            outputs=paths,
            counts={},
            lines=(),
            seconds=0.0,
            finished="2026-01-01T00:00:00",
            versions={},
        )
        for stage, paths in outputs.items()
    }
    return StageContext(
        config=config,
        run_dir=RunDir(str(root)),
        attempt=str(root / attempt),
        upstream=upstream,
        progress=Progress(is_terminal=False),
        cluster=cluster or Cluster(config.cluster),
    )
