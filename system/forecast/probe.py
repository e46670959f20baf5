"""Times training and scoring for a few seconds, with the base model and rows of the corpus.

Training uses the loop of the intervention runs (`system.training.train`), with their settings and
with the number of threads of an actor.  Scoring is timed as a forward pass of the same model
without gradients, since starting a vLLM engine would take longer than the whole probe.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from system.forecast.hours import Rate, Rates
from system.models.base import describe_model, load_model
from system.training.layout import training_layout
from system.training.microbatch import build_microbatch
from system.training.objective import Objective
from system.training.pack import group_by_tokens
from system.training.plan import TrainPlan, build_plan
from system.training.train import Training

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel

    from system.training.settings import TrainSettings

_TRAIN_SECONDS = 4.0
_SCORE_SECONDS = 2.0
_STEP_SECONDS = 2.5
"""Approximate limit of the time of one step, or one forward pass, of a slow model."""
_FEWEST = 3
"""Smallest number of timed steps, and of timed forward passes.  The first one is not timed, since
it includes one-time costs."""
_FULL_BYTES, _ADAPTED_BYTES = 16, 5
"""Bytes for each parameter: weight, gradient and two moments in float32; with adapters, the weight
and a little for the adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """The device and the batches of the probe."""

    num_threads: int
    trains_on_gpu: bool
    scores_on_gpu: bool
    batch_size: int
    max_length: int
    trust_remote_code: bool


def why_no_probe(
    model_dir: Path, num_rows: int, training: TrainSettings, settings: ProbeSettings
) -> str:
    """The reason why the probe cannot run on this machine; empty if it can."""
    if (settings.trains_on_gpu or settings.scores_on_gpu) and not torch.cuda.is_available():
        return (
            "cluster.tuner_gpus or cluster.scorer_gpus needs GPUs and this machine has none: run "
            "`check` on a machine of the tuners"
        )
    if num_rows <= _FEWEST:
        return f"the probe needs {_FEWEST + 1} rows, and the corpus has {num_rows} usable ones"
    parameters = int(describe_model(model_dir)["parameters"])
    needed = parameters * (_FULL_BYTES if training.lora is None else _ADAPTED_BYTES)
    free = _free_memory(settings.trains_on_gpu)
    if needed > 0.8 * free:
        return (
            f"training the model takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free on this machine: run `check` on a machine of the tuners"
        )
    return ""


def run_probe(
    model_dir: Path, rows: pa.Table, training: TrainSettings, settings: ProbeSettings
) -> Rates:
    """Times training and scoring; takes some seconds, plus the loading of the model.

    A first training with one row a step shows how many rows a step can have and still be short.  A
    small model gets the whole batch.

    Args:
        model_dir: local Hugging Face directory.
        rows: TOKENS rows to train on and to score, at least four.
        training: training settings of an intervention run.
        settings: threads, device, batch.
    """
    # The number of threads is global; it must be restored for the rest of the process.
    before = torch.get_num_threads()
    torch.set_num_threads(settings.num_threads)
    try:
        started = time.perf_counter()
        model = load_model(
            model_dir,
            device="cuda" if settings.trains_on_gpu else "cpu",
            trust_remote_code=settings.trust_remote_code,
        )
        pilot, _ = _time_steps(model, _plan(rows.slice(0, 2), 1, settings), training)
        mean_tokens = _plan(rows, 1, settings).num_tokens / rows.num_rows
        affordable = int(_STEP_SECONDS * pilot.mean / mean_tokens)
        step_rows = min(settings.batch_size, rows.num_rows // (_FEWEST + 1), max(1, affordable))
        plan = _plan(rows, step_rows, settings)
        train, run_seconds = _time_steps(model, plan, training)
        move: Any = model.to
        scorer = move("cuda" if settings.scores_on_gpu else "cpu")
        score = _time_forward(scorer, plan, training, int(_STEP_SECONDS * train.mean))
        seconds = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return Rates(
        train=train,
        score=score,
        source=(
            f"a probe of {seconds:.0f} s on this machine ({_where(settings)}, steps of "
            f"{step_rows} rows{_load(settings)})"
        ),
        is_probe=True,
        run_seconds=run_seconds,
    )


def _plan(rows: pa.Table, batch_size: int, settings: ProbeSettings) -> TrainPlan:
    return build_plan(
        rows,
        ["probe"] * rows.num_rows,
        batch_size=batch_size,
        max_length=settings.max_length,
        packing=False,
    )


def _time_steps(
    model: PreTrainedModel, plan: TrainPlan, settings: TrainSettings
) -> tuple[Rate, float]:
    """Rate of all steps but the first, and the seconds before the first step."""
    samples: list[tuple[float, float]] = []
    started = time.perf_counter()
    with Training(model, plan, settings) as training:
        entered = time.perf_counter()
        for step in range(plan.num_steps):
            stats = training.step(step)
            samples.append((stats.num_tokens, stats.seconds))
            if len(samples) > _FEWEST and time.perf_counter() - entered > _TRAIN_SECONDS:
                break
    return Rate.of(samples[1:]), entered - started


def _time_forward(
    model: PreTrainedModel, plan: TrainPlan, settings: TrainSettings, pass_tokens: int
) -> Rate:
    """Rate of all forward passes but the first."""
    device = next(model.parameters()).device
    half = settings.dtype == "bfloat16" and device.type == "cuda"
    objective = Objective(model, torch.bfloat16 if half else torch.float32)
    max_tokens = min(settings.micro_batch_tokens, pass_tokens)
    samples: list[tuple[float, float]] = []
    started = time.perf_counter()
    with training_layout(objective) as layout, torch.no_grad():
        for rows in _passes(plan, max_tokens, is_padded=not layout.is_flat):
            began = time.perf_counter()
            batch = build_microbatch(plan, rows, layout=layout, device=device)
            objective(batch)[1].cpu()  # waits for the device
            samples.append((int(plan.lengths(rows).sum()), time.perf_counter() - began))
            if len(samples) > _FEWEST and time.perf_counter() - started > _SCORE_SECONDS:
                break
    return Rate.of(samples[1:])


def _passes(plan: TrainPlan, max_tokens: int, *, is_padded: bool) -> list[np.ndarray]:
    """The rows of each forward pass, in the order of the plan; at least as many as are timed."""
    parts = max(_FEWEST + 1, plan.num_tokens // max_tokens)
    everything = np.arange(plan.table.num_rows)
    return [
        part[group]
        for part in np.array_split(everything, min(parts, len(everything)))
        for group in group_by_tokens(plan.lengths(part), max_tokens, is_padded=is_padded)
    ]


def _where(settings: ProbeSettings) -> str:
    threads = f"{settings.num_threads} thread" + ("s" if settings.num_threads > 1 else "")
    if settings.trains_on_gpu or settings.scores_on_gpu:
        return f"{threads}, {torch.cuda.get_device_name()}"
    return threads


def _load(settings: ProbeSettings) -> str:
    """A remark if other work used the measured CPUs at the same time."""
    cpus, load = os.cpu_count() or 1, os.getloadavg()[0]
    if (settings.trains_on_gpu and settings.scores_on_gpu) or load <= cpus:
        return ""
    return f", which was busy: load {load:.1f} on {cpus} CPUs, so a run may be faster"


def _free_memory(use_gpu: bool) -> float:
    """Free memory of the device, in bytes."""
    if use_gpu:
        return float(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
