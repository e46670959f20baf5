"""The training function that Ray Train runs on every worker: all jobs, one after the other.

    driver (trainer.fit) ── jobs ──> controller ──> worker 0 .. n-1   gloo or NCCL between them
           <── models | error ──────────────────── worker 0

Errors that a restart cannot solve (bad input, a diverged loss, a full disk) are returned as
`Outcome.error`; if they were raised, Ray Train would restart the workers for nothing.  All other
errors (a lost node, out of memory) are raised; the restarted workers resume from the newest
checkpoint.
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
    """The result of all jobs."""

    models: tuple[TrainedModel, ...]
    error: InstructMixError | None = None
    """The error of the job after `models`; None if all jobs are done."""


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
