"""A run directory with a base model and a selection, as the stages before `train` leave them."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch
from plain_ranks import run_by_plain_ranks
from safetensors.torch import load_file
from training_builders import CHATML, build_model, build_tokenizer

from actors.cluster import Cluster
from actors.stage import StageContext
from actors.trainer import make_job, plan_selection
from system import schema, storage
from system.config import RunConfig
from system.data.corpus import make_manifest, shard_directory, write_manifest, write_shard
from system.progress import Progress
from system.rundir import RunDir, StageRecord
from system.training.plan import write_plan

WORDS = (
    "Which city is the capital of France Paris Italy Rome add return answer poem sea".split()  # noqa: SIM905
)

LONG = {"batch_size": 4, "checkpoint_every": 10, "learning_rate": 3e-4}
LONG_STEPS = 300
"""Steps of the long world: enough time to be killed in, also on a fast machine."""
SAME_WAY = 1e-4
"""Most that a training of the long world may stray (see `strayed`) where its number of workers
changes.  Measured: another order of the sums strays 5e-7; a step left out half-way 1e-2; moments of
the optimiser that are lost ten steps before the end, where the learning rate is all but zero,
1.6e-4."""
SAME_LOSS = 1e-5
"""Nats by which the loss of any of its steps may differ then.  Measured: 2e-7, and 4e-4 where the
moments are lost."""


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


def write_corpus(root: Path, num_rows: int = 12) -> None:
    """A corpus whose `estimate` split holds rows of both categories."""
    generator = np.random.default_rng(1)
    shards = []
    for category in ("city", "code"):
        rows = [
            {
                "id": f"{category}{k:03d}",
                "category": category,
                "source": "made",
                "messages": [
                    {"role": "user", "content": " ".join(generator.choice(WORDS, size=6))},
                    {"role": "assistant", "content": " ".join(generator.choice(WORDS, size=9))},
                ],
            }
            for k in range(num_rows)
        ]
        table = pa.Table.from_pylist(rows, schema=schema.CORPUS)
        path = f"{shard_directory('estimate', category)}/00000-000.arrow"
        shards.append(write_shard(str(root / "tags" / "t"), path, table, "estimate", category))
    write_manifest(str(root / "tags" / "t" / "manifest.json"), make_manifest(shards))


def build_world(
    root: Path, *, num_rows: int = 64, hidden_size: int = 32, spread: float = 0.2
) -> None:
    """Writes the model (random weights of that spread), the selection, what the card names."""
    write_corpus(root)
    storage.write_json(str(root / "mix" / "m" / "mix.json"), {"status": "optimal"})
    storage.write_json(str(root / "curriculum" / "c" / "curriculum.json"), {"stages": []})
    tokenizer = build_tokenizer(CHATML)
    model = build_model(vocab_size=len(tokenizer), hidden_size=hidden_size, spread=spread)
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
    root: Path,
    attempt: str,
    cluster: Cluster | None = None,
    address: str = "local",
    **train,
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
            "cluster": {"address": address, "num_cpus": 2},
        }
    )
    outputs = {
        "tag": {"manifest": "tags/t/manifest.json"},
        "model": {"model": "model/m/model"},
        "solve": {"mix": "mix/m/mix.json"},
        "curriculum": {"curriculum": "curriculum/c/curriculum.json"},
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


def train_without_ray(root: Path, attempt: str, **train) -> Path:
    """What stage `train` trains on two workers, by two plain processes; returns its directory."""
    context = build_context(root, attempt, **train)
    manifest = storage.read_json(context.input("select", "manifest"))
    folder = context.input("select", "selection")
    tables = [storage.read_table(storage.join(folder, file["path"])) for file in manifest["files"]]
    plan, _ = plan_selection(tables, context.input("model", "model"), context)
    plan_uri = storage.join(context.attempt, "plan.arrow")
    write_plan(plan_uri, plan)
    job = make_job("train", plan_uri, context.attempt, context, seed=context.config.seed)
    run_by_plain_ranks(job, world_size=2)
    return Path(context.attempt)


def weights(root: Path, attempt: str) -> dict[str, torch.Tensor]:
    return load_file(root / attempt / "model" / "model.safetensors")


def steps_logged(root: Path, attempt: str) -> list[int]:
    lines = (root / attempt / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


def strayed(root: Path, attempt: str, reference: Path) -> float:
    """How far a training ended from the reference, as a share of the way that this one went.

    Source of the measure: the usual relative error, with the update in the denominator, since most
    of what the weights are was there before the training.
    """
    start = load_file(root / "model/m/model/model.safetensors")
    end = load_file(reference / "model/model.safetensors")
    found = weights(root, attempt)
    assert start.keys() == end.keys() == found.keys()
    apart = sum(float((found[name] - end[name]).double().square().sum()) for name in end)
    way = sum(float((end[name] - start[name]).double().square().sum()) for name in end)
    return (apart / way) ** 0.5


def wait_until_gone(pid: int, seconds: float = 300.0) -> None:
    """Waits for the end of a process; one that nobody collects counts as ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        deadline = time.monotonic() + seconds
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} did not end in {seconds} s"
            time.sleep(0.05)


def wait_for_checkpoint(attempt: Path, step: int, seconds: float = 400.0) -> dict:
    """The progress of a training that has committed a checkpoint of a step or later."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            progress = json.loads((attempt / "progress.json").read_text())
            commits = attempt.glob("checkpoints/*/COMMIT.json")
            if any(int(commit.parent.name.split("-")[1]) >= step for commit in commits):
                return progress
        assert not (attempt / "done.json").exists(), "the training ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} in {seconds} s")


def records(root: Path, attempt: str) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (root / attempt / "metrics.jsonl").open()]


def resumed_steps(root: Path, attempt: str) -> list[int]:
    """First step of every attempt but the first: where a training went on."""
    lines = records(root, attempt)
    pairs = itertools.pairwise(lines)
    return [after["step"] for before, after in pairs if before["attempt"] != after["attempt"]]


def newest_commit(attempt: Path) -> int:
    """Step of the newest committed checkpoint."""
    commits = attempt.glob("checkpoints/*/COMMIT.json")
    return max(int(commit.parent.name.split("-")[1]) for commit in commits)
