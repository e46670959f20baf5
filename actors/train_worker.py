"""What Ray Train runs on every worker: one job after the other, in one process group.

    driver (trainer.fit) ── jobs ──> controller ──> worker 0 .. n-1   gloo or NCCL between them
           <── models | error ──────────────────── worker 0

An error that is the input's, or that a repetition would meet again (a diverged loss, a full disk),
is the answer: raising it would only make Ray Train start the workers over.  Everything else (a lost
node, memory) is raised, and the restarted workers go on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from system.errors import InstructMixError
from system.training.job import Ranks, run_job
from system.training.records import TrainedModel, TrainJob


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the workers leave."""

    models: tuple[TrainedModel, ...]
    error: InstructMixError | None = None
    """Why the next job could not be done."""


def train_jobs(config: dict[str, Any]) -> Outcome:
    """The training function: `config` holds `jobs` (TrainJob) and `num_threads`."""
    jobs: Sequence[TrainJob] = config["jobs"]
    torch.set_num_threads(config["num_threads"])
    device: Any = ray.train.torch.get_device()
    cpu_group: Any = dist.new_group(backend="gloo")
    ranks = Ranks(dist.group.WORLD, cpu_group)
    models: list[TrainedModel] = []
    for job in jobs:
        try:
            models.append(run_job(job, ranks, device, ray.train.report))
        except InstructMixError as error:
            return Outcome(tuple(models), error)
    return Outcome(tuple(models))
