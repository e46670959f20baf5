"""The worlds in which influence estimators are compared: planted truth, and real categories.

`planted` knows its truth, but most of its pairs are exactly zero, so no rank correlation over
sources can be high in it, `retrain` with itself included.  `real` has no truth, but interactions
everywhere: there a rank correlation means something.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config import ModelConfig, RunConfig, SolveConfig, SourceConfig, TinyModelConfig
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local
from system.examples.planted import planted_world
from system.examples.planted_command import MAX_LENGTH, write_planted
from system.examples.tiny_model import build_tiny_model

SPLIT = {"estimate_share": 0.15, "test_share": 0.1}
P3_TASKS = (
    "closed_book_qa", "commonsense_qa", "paraphrase", "science_qa", "sentiment",
    "structure_to_text", "topic_classification",
)  # fmt: skip
LONGEST_CHARS = 320
ROWS = 800


@dataclass(frozen=True, kw_only=True)
class World:
    """A corpus, a base model, and the size of an experiment on them."""

    name: str
    text: str
    model: ModelConfig
    corpus: Corpus
    knobs: dict[str, Any]
    """Influence configuration of the base setting."""
    truth: dict[str, Any] | None


def planted(folder: Path, seed: int, tasks: tuple[str, ...] = ()) -> World:
    """The planted world, or some of its tasks."""
    world = planted_world(seed)
    model = ModelConfig(path=str(folder / "world" / "model"), max_length=MAX_LENGTH)
    sources = tuple(
        SourceConfig(path=f"{task.name}.jsonl", category=task.name)
        for task in world.tasks
        if not tasks or task.name in tasks
    )
    if not (folder / "corpus" / "manifest.json").exists():
        write_planted(folder / "world", world, num_rows=1000, seed=seed)
        _ingest(folder, folder / "world" / "data", sources, model)
    return World(
        name="planted",
        text="nine planted categories; 160 base rows, a dose of 120, 64 held-out rows a category",
        model=model,
        corpus=Corpus.open(str(folder / "corpus" / "manifest.json")),
        knobs={
            "rows_per_category": 160,
            "dose_rows": 120,
            "heldout_rows": 64,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "warm_rows_per_category": 40,
        },
        truth=world.truth(),
    )


def real(folder: Path, data_dir: Path, seed: int) -> World:
    """Seven tasks of P3 and code: short rows, a tiny model warmed up on all of them as text."""
    data = folder / "data"
    model = ModelConfig(
        path="builtin:tiny",
        max_length=128,
        tiny=TinyModelConfig(
            vocab_size=2048, hidden_size=96, num_heads=3, num_layers=2, warmup_tokens=300_000
        ),
    )
    sources = tuple(
        SourceConfig(path=f"{name}.jsonl", category=name) for name in (*P3_TASKS, "code")
    )
    if not (folder / "model" / "config.json").exists():
        data.mkdir(parents=True, exist_ok=True)
        _write_short_rows(data_dir, data)
        _ingest(folder, data, sources, model)
        corpus = Corpus.open(str(folder / "corpus" / "manifest.json"))
        build_tiny_model(corpus, model, seed, folder / "model")
    return World(
        name="real",
        text="seven tasks of P3 and code; 96 base rows, a dose of 64, 48 held-out rows a category",
        model=model.model_copy(update={"path": str(folder / "model")}),
        corpus=Corpus.open(str(folder / "corpus" / "manifest.json")),
        knobs={
            "rows_per_category": 96,
            "dose_rows": 64,
            "heldout_rows": 48,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "warm_rows_per_category": 32,
        },
        truth=None,
    )


def _ingest(
    folder: Path, data_dir: Path, sources: tuple[SourceConfig, ...], model: ModelConfig
) -> None:
    config = RunConfig(
        run_dir=str(folder),
        data_dir=str(data_dir),
        sources=sources,
        ingest=SPLIT,  # pyright: ignore
        model=model,
        solve=SolveConfig(budget=1),
    )
    ingest_local(config, str(folder / "corpus"))


def _write_short_rows(data_dir: Path, target: Path) -> None:
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in (*P3_TASKS, "code")}
    with gzip.open(data_dir / "p3.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if row["task"] in rows:
                rows[row["task"]].append(
                    {"instruction": row["prompt"], "output": row["completion"]}
                )
    for row in json.loads((data_dir / "code_alpaca.json").read_text()):
        instruction = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        rows["code"].append({"instruction": instruction, "output": row["output"]})
    for name, found in rows.items():
        short = [
            row
            for row in found
            if row["output"].strip() and sum(map(len, row.values())) <= LONGEST_CHARS
        ]
        lines = [json.dumps(row) for row in short[:ROWS]]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
