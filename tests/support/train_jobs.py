"""Small training jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_builders import (
    CHATML,
    build_model,
    build_settings,
    build_small_plan,
    build_tokenizer,
    build_tokens,
)

from system.training.job import Ranks, run_job
from system.training.plan import write_plan
from system.training.records import TrainJob

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer(CHATML)
    build_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_job(root: Path, base: Path, **changes) -> TrainJob:
    """Six steps, a checkpoint every two."""
    plan_uri = str(root / "plan.arrow")
    write_plan(plan_uri, build_small_plan(build_tokens(48), batch_size=8))
    values = {
        "name": "job",
        "plan_uri": plan_uri,
        "output_uri": str(root / "out"),
        "settings": build_settings(),
        "model_dir": str(base),
        "checkpoint_every": 2,
    }
    return TrainJob(**(values | changes))


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output_uri) / "model" / "model.safetensors")


def metrics(job: TrainJob) -> list[dict]:
    lines = (Path(job.output_uri) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(records: list[dict]) -> list[dict]:
    kept = ("step", "stage", "loss", "learning_rate", "grad_norm", "tokens", "category_loss")
    return [{name: record[name] for name in kept} for record in records]


def run_killed(job: TrainJob, at_step: int) -> None:
    def kill(report: dict) -> None:
        if report["step"] == at_step:
            raise Killed

    with pytest.raises(Killed):
        run_job(job, Ranks(), CPU, kill)
