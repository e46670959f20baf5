"""A training job by plain processes over gloo: no Ray, and nothing of it to import in them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import multiprocessing

from system.training.job import Ranks, run_job
from system.training.records import TrainJob


def run_by_plain_ranks(job: TrainJob, world_size: int) -> None:
    """Runs the job to its end."""
    multiprocessing.spawn(_run_rank, args=(world_size, job), nprocs=world_size)


def _run_rank(rank: int, world_size: int, job: TrainJob) -> None:
    torch.set_num_threads(1)  # as many as a training worker has: equal bits need that
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.output_uri}/rendezvous",
        rank=rank,
        world_size=world_size,
    )
    ranks = Ranks(dist.group.WORLD, dist.new_group(backend="gloo"))
    run_job(job, ranks, torch.device("cpu"))
    dist.destroy_process_group()
