"""A few seconds of the real thing: the proxy trains some steps and scores some rows, timed.

The training is the loop of the interventions (`system.training.train`), with their settings, on
rows of the corpus, with the threads that an actor gets.  Scoring is a forward pass of the same
model without gradients; the engine that a run scores with is not started, which takes longer than
all of the probe.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from system.errors import ConfigError
from system.forecast.rates import Rate, Rates
from system.models.base import describe_model, load_model
from system.training.microbatch import build_microbatch
from system.training.objective import Objective, training_layout
from system.training.pack import group_by_tokens
from system.training.plan import TrainPlan, build_plan
from system.training.train import Training

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel

    from system.training.settings import TrainSettings

_TRAIN_SECONDS = 4.0
_SCORE_SECONDS = 2.0
_FEWEST = 3
"""Steps, and forward passes, that are timed at least, beside the first, which is left out."""
_FULL_BYTES, _ADAPTED_BYTES = 16, 5
"""Of a parameter: weight, gradient and two moments in float32; weight and a little, adapted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """Where and how to measure."""

    num_threads: int
    trains_on_gpu: bool
    scores_on_gpu: bool
    batch_size: int
    max_length: int
    trust_remote_code: bool


def why_no_probe(model_dir: Path, training: TrainSettings, settings: ProbeSettings) -> str:
    """Why this machine cannot measure, or an empty text."""
    if (settings.trains_on_gpu or settings.scores_on_gpu) and not torch.cuda.is_available():
        return (
            "cluster.tuner_gpus or cluster.scorer_gpus asks for GPUs and this machine has none: "
            "run `check` where the tuners will run"
        )
    parameters = int(describe_model(model_dir)["parameters"])
    needed = parameters * (_FULL_BYTES if training.lora is None else _ADAPTED_BYTES)
    free = _free_memory(settings.trains_on_gpu)
    if needed > 0.8 * free:
        return (
            f"training the model takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free on this machine: run `check` where the tuners will run"
        )
    return ""


def run_probe(
    model_dir: Path, rows: pa.Table, training: TrainSettings, settings: ProbeSettings
) -> Rates:
    """Measures training and scoring; takes some seconds beside loading the model.

    Args:
        model_dir: local Hugging Face directory.
        rows: TOKENS to train on and to score.
        training: of an intervention.
        settings: threads, device, batch.

    Raises:
        ConfigError: fewer rows than four batches.
    """
    plan = build_plan(
        rows,
        ["probe"] * rows.num_rows,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        packing=False,
    )
    if plan.num_steps <= _FEWEST:
        raise ConfigError(
            f"the probe needs {_FEWEST + 1} batches of {settings.batch_size} rows and drew "
            f"{rows.num_rows} rows: lower influence.batch_size, or leave it out with --no-probe"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(settings.num_threads)
    try:
        started = time.perf_counter()
        model = load_model(
            model_dir,
            device="cuda" if settings.trains_on_gpu else "cpu",
            trust_remote_code=settings.trust_remote_code,
        )
        train, run_seconds = _time_steps(model, plan, training)
        move: Any = model.to
        score = _time_forward(move("cuda" if settings.scores_on_gpu else "cpu"), plan, training)
        seconds = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    threads = f"{settings.num_threads} thread" + ("s" if settings.num_threads > 1 else "")
    on_gpu = settings.trains_on_gpu or settings.scores_on_gpu
    where = f"{threads}, {torch.cuda.get_device_name()}" if on_gpu else threads
    return Rates(
        train=train,
        score=score,
        source=f"a probe of {seconds:.0f} s on this machine ({where}{_load(settings)})",
        is_probe=True,
        run_seconds=run_seconds,
    )


def _time_steps(
    model: PreTrainedModel, plan: TrainPlan, settings: TrainSettings
) -> tuple[Rate, float]:
    """Rate of the steps; seconds that a training takes before its first step."""
    rates: list[float] = []
    started = time.perf_counter()
    with Training(model, plan, settings) as training:
        entered = time.perf_counter()
        for step in range(plan.num_steps):
            stats = training.step(step)
            rates.append(stats.num_tokens / stats.seconds)
            if len(rates) > _FEWEST and time.perf_counter() - entered > _TRAIN_SECONDS:
                break
    return Rate.of(rates[1:]), entered - started


def _time_forward(model: PreTrainedModel, plan: TrainPlan, settings: TrainSettings) -> Rate:
    device = next(model.parameters()).device
    half = settings.dtype == "bfloat16" and device.type == "cuda"
    objective = Objective(model, torch.bfloat16 if half else torch.float32)
    rates: list[float] = []
    started = time.perf_counter()
    with training_layout(objective) as layout, torch.no_grad():
        for rows in _passes(plan, settings.micro_batch_tokens, is_padded=not layout.is_flat):
            began = time.perf_counter()
            batch = build_microbatch(
                plan,
                rows,
                is_flat=layout.is_flat,
                device=device,
                compute_dtype=objective.compute_dtype,
            )
            objective(batch)[1].cpu()  # waits for the device
            rates.append(int(plan.lengths(rows).sum()) / (time.perf_counter() - began))
            if len(rates) > _FEWEST and time.perf_counter() - started > _SCORE_SECONDS:
                break
    return Rate.of(rates[1:])


def _passes(plan: TrainPlan, max_tokens: int, *, is_padded: bool) -> list[np.ndarray]:
    """Forward passes in a fixed order, at least as many as are timed, of rows of all lengths."""
    everything = np.arange(plan.table.num_rows)
    parts = np.array_split(everything, max(_FEWEST + 1, plan.num_tokens // max_tokens))
    return [
        part[group]
        for part in parts
        for group in group_by_tokens(plan.lengths(part), max_tokens, is_padded=is_padded)
    ]


def _load(settings: ProbeSettings) -> str:
    """Says so where other work shares the CPUs that were measured."""
    cpus, load = os.cpu_count() or 1, os.getloadavg()[0]
    if (settings.trains_on_gpu and settings.scores_on_gpu) or load <= cpus:
        return ""
    return f", which was busy: load {load:.1f} on {cpus} CPUs, so it may be faster"


def _free_memory(use_gpu: bool) -> float:
    """Bytes."""
    if use_gpu:
        return float(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
