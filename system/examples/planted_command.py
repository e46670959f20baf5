"""`instructmix planted`: writes a corpus with known interactions and a configuration for it."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from system.errors import ConfigError
from system.examples.planted import PlantedWorld, planted_world

if TYPE_CHECKING:
    from system.data.corpus import Corpus

MAX_LENGTH = 64
WARM_ROWS = 12_000
TINY = {
    "vocab_size": 1536,
    "hidden_size": 96,
    "num_layers": 3,
    "num_heads": 3,
    "warmup_tokens": 200_000,
    "batch_tokens": 1024,
    "learning_rate": 2e-3,
}
"""Settings of the base model: `builtin:tiny` with a vocabulary of the made-up words."""
WARM_BATCH_SIZE = 16
WARM_LEARNING_RATE = 2e-3
"""Supervised warm-up after that of `builtin:tiny`.  Only the losses of answers count in it; they
teach the model to find the answer of a key."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", required=True, help="directory to write; it must not exist")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each category (1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of words and facts (0)")
    parser.add_argument(
        "--no-model", action="store_true", help="do not build the base model (saves a minute)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes data, truth, configuration, and model; prints the directory.

    Raises:
        ConfigError: the directory exists, or there are too few rows.
    """
    out = Path(arguments.out).absolute()
    if out.exists():
        raise ConfigError(
            f"--out {out}: expected a new directory, but it exists; choose another name"
        )
    if arguments.rows < 200:
        raise ConfigError(
            f"--rows {arguments.rows}: expected at least 200; with fewer, the held-out rows of a "
            "category are too few to measure effects"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_planted(
        partial,
        planted_world(arguments.seed),
        num_rows=arguments.rows,
        seed=arguments.seed,
        with_model=not arguments.no_model,
        home=out,
    )
    partial.rename(out)
    print(
        f"planted corpus in {out}: {len(list((out / 'data').glob('*.jsonl')))} categories of "
        f"{arguments.rows} rows; the true interactions are in truth.json\n"
        f"measure them: instructmix run {out / 'config.yaml'} --until influence"
    )
    return 0


def write_planted(
    out: Path,
    world: PlantedWorld,
    *,
    num_rows: int,
    seed: int,
    with_model: bool = True,
    home: Path | None = None,
) -> None:
    """Writes `data/CATEGORY.jsonl`, `warm.jsonl`, `truth.json`, `config.yaml` and `model/`.

    Args:
        out: directory, which is created.
        world: what to write.
        num_rows: rows of each category.
        seed: of the base model.
        with_model: whether to build a base model and warm it up on `warm.jsonl`.
        home: final place of the directory, for the paths in `config.yaml`; None: `out`.
    """
    (out / "data").mkdir(parents=True)
    for task in world.tasks:
        _write_lines(out / "data" / f"{task.name}.jsonl", world.rows(task, num_rows))
    _write_lines(out / "warm.jsonl", world.warm_rows(WARM_ROWS))
    (out / "truth.json").write_text(json.dumps(world.truth(), indent=2) + "\n")
    (out / "config.yaml").write_text(
        yaml.safe_dump(_config(world, seed, home or out), sort_keys=False)
    )
    if with_model:
        _build_model(out, seed)


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _config(world: PlantedWorld, seed: int, home: Path) -> dict:
    """The configuration of a run that finds the truth in a few minutes on two cores."""
    return {
        "run_dir": str(home / "run"),
        "data_dir": str(home / "data"),
        "seed": seed,
        "sources": [
            {"path": f"{task.name}.jsonl", "format": "alpaca", "category": task.name}
            for task in world.tasks
        ],
        "ingest": {"estimate_share": 0.15, "test_share": 0.1},
        "model": {"path": str(home / "model"), "max_length": MAX_LENGTH},
        "influence": {
            "rows_per_category": 160,
            "dose_rows": 120,
            "heldout_rows": 64,
            "replications": 3,
            "batch_size": 8,
            "learning_rate": 1e-3,
        },
        "solve": {"budget": 160 * len(world.tasks), "importance": "uniform"},
    }


def _build_model(out: Path, seed: int) -> None:
    """Trains tokenizer and model on the warm-up rows only: first as text, then on the answers."""
    from system.config import (
        IngestConfig,
        ModelConfig,
        RunConfig,
        SolveConfig,
        SourceConfig,
        TinyModelConfig,
    )
    from system.data.corpus import Corpus
    from system.data.ingest.ingest import ingest_local
    from system.examples.tiny_model import build_tiny_model

    model = ModelConfig(
        path="builtin:tiny", max_length=MAX_LENGTH, tiny=TinyModelConfig.model_validate(TINY)
    )
    config = RunConfig(
        run_dir=str(out),
        data_dir=str(out),
        seed=seed,
        sources=(SourceConfig(path="warm.jsonl", category="warm"),),
        ingest=IngestConfig(estimate_share=0.01, test_share=0.01),
        model=model,
        solve=SolveConfig(budget=1),
    )
    with tempfile.TemporaryDirectory(prefix="instructmix-planted-") as folder:
        ingest_local(config, folder)
        corpus = Corpus.open(str(Path(folder) / "manifest.json"))
        (out / "model").mkdir()
        build_tiny_model(corpus, model, seed, out / "model")
        _teach_answers(corpus, out / "model", seed)


def _teach_answers(corpus: Corpus, model_dir: Path, seed: int) -> None:
    from system.models.base import load_model, load_tokenizer
    from system.models.chat import encode_table
    from system.training.plan import build_plan
    from system.training.settings import TrainSettings
    from system.training.train import train_on_plan

    rows = corpus.sample("train", "warm", corpus.num_rows("train", "warm"), seed)
    tokens, _ = encode_table(rows, load_tokenizer(model_dir), MAX_LENGTH)
    plan = build_plan(
        tokens,
        ["warm-up"] * tokens.num_rows,
        batch_size=WARM_BATCH_SIZE,
        max_length=MAX_LENGTH,
        packing=False,
    )
    model = load_model(model_dir)
    settings = TrainSettings(
        learning_rate=WARM_LEARNING_RATE, lr_schedule="cosine", warmup_share=0.05, seed=seed
    )
    train_on_plan(model, plan, settings)
    model.save_pretrained(model_dir)
