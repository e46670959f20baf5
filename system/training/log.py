"""Metrics of a training: totals on every rank, files and trackers on rank 0.

Metrics have one JSON line per step, in part files that follow the checkpoints:
`part-00000050.jsonl` holds the steps from 50 to the next checkpoint and is written before that
checkpoint commits.  A training that resumes from step k deletes the parts from k on and writes
these steps again, so no step appears twice.
"""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from system import storage
from system.training.trackers import Trackers
from system.training.train import StepStats

_PART = re.compile(r"part-(\d{8})\.jsonl")
_PROGRESS_SECONDS = 2.0


class TrainTotals:
    """Totals of a training; a checkpoint saves them, so that a resumed training continues them.

    Args:
        counters: a value of `state` from the checkpoint; None starts at zero.
    """

    def __init__(self, counters: Mapping[str, Any] | None = None) -> None:
        counters = counters or {}
        self.num_tokens: int = counters.get("num_tokens", 0)
        self.num_labels: int = counters.get("num_labels", 0)
        self.seconds: float = counters.get("seconds", 0.0)
        self.losses: list[float] = list(counters.get("losses", []))
        self.heldout_loss: float | None = counters.get("heldout_loss")
        """The newest held-out loss; None if it is not measured."""
        self.best_step: int = counters.get("best_step", 0)
        self.best_loss: float | None = counters.get("best_loss")
        """The lowest held-out loss (first measured after `best_step` steps)."""

    def add(self, stats: StepStats) -> None:
        """Adds the numbers of a step."""
        self.num_tokens += stats.num_tokens
        self.num_labels += stats.num_labels
        self.seconds += stats.seconds
        self.losses.append(stats.loss)

    def add_heldout(self, step: int, loss: float) -> None:
        """Adds the held-out loss after `step` steps; of equal losses the first is the best."""
        self.heldout_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss = step, loss

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "num_tokens": self.num_tokens,
            "num_labels": self.num_labels,
            "seconds": self.seconds,
            "losses": list(self.losses),
            "heldout_loss": self.heldout_loss,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
        }

    def edges(self) -> tuple[float, float]:
        """Mean losses over the first and the last tenth of the steps."""
        losses = np.array(self.losses)
        tenth = max(1, len(losses) // 10)
        return float(losses[:tenth].mean()), float(losses[-tenth:].mean())


class TrainLog:
    """Files and trackers of one training.

    Args:
        output_uri: directory of the job.
        start_step: step that the training starts or resumes with.
        num_steps: steps of the plan.
        world_size: number of ranks, for the records.
        attempt: name of this attempt, for the records.
        device: its memory use is measured.
        flops_S: operations that each step needs; None: no MFU.
        peak_flops: operations per second of all devices; None: no MFU.
        trackers: names of experiment trackers.
        name: name of the run in the trackers.
    """

    def __init__(
        self,
        output_uri: str,
        *,
        start_step: int,
        num_steps: int,
        world_size: int,
        attempt: str,
        device: torch.device,
        flops_S: np.ndarray | None = None,
        peak_flops: float | None = None,
        trackers: Sequence[str] = (),
        name: str = "train",
    ) -> None:
        self._output_uri = output_uri
        self._uri = storage.join(output_uri, "metrics")
        self._num_steps = num_steps
        self._world_size, self._attempt = world_size, attempt
        self._device = device
        self._flops_S, self._peak_flops = flops_S, peak_flops
        self._records: list[dict[str, Any]] = []
        self._last_progress = 0.0
        self._trackers = Trackers(trackers, output_uri, name, is_resumed=start_step > 0)
        for part in storage.list_names(self._uri):
            match = _PART.fullmatch(part)
            if match and int(match.group(1)) >= start_step:
                storage.delete(storage.join(self._uri, part))

    def add(self, stats: StepStats, heldout_loss: float | None = None) -> None:
        """Records the numbers of a step, and the held-out loss after it if it was measured."""
        record = {
            "step": stats.step,
            "stage": stats.stage,
            "loss": stats.loss,
            "learning_rate": stats.learning_rate,
            "grad_norm": stats.grad_norm,
            "response_tokens": stats.num_labels,
            "tokens": stats.num_tokens,
            "tokens_per_second": round(stats.num_tokens / stats.seconds, 1),
            "mfu": self._utilisation(stats),
            "seconds": round(stats.seconds, 6),
            "memory_bytes": peak_memory(self._device),
            "world_size": self._world_size,
            "attempt": self._attempt,
            "layout": stats.layout,
            "time": round(time.time(), 3),
            "category_loss": {
                name: nll / count for name, (nll, count) in sorted(stats.category_nll.items())
            },
        }
        if heldout_loss is not None:
            record["heldout_loss"] = heldout_loss
        self._trackers.write(record)
        if self._trackers.lost:
            record["lost_trackers"] = dict(self._trackers.lost)
        self._records.append(record)
        if time.monotonic() - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = time.monotonic()
            self._show_progress(stats)

    def _show_progress(self, stats: StepStats) -> None:
        """Writes progress.json, from which the driver draws its progress bar."""
        progress = {
            "step": stats.step + 1,
            "of": self._num_steps,
            "loss": stats.loss,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            storage.write_json(storage.join(self._output_uri, "progress.json"), progress)
        except OSError as error:
            if storage.full_disk(error) is None:
                raise
            # Ignored here: the next checkpoint fails on the full disk, too, on all ranks together.

    def _utilisation(self, stats: StepStats) -> float | None:
        """Model FLOPs utilisation of a step; see `system.training.flops`."""
        if self._flops_S is None or self._peak_flops is None:
            return None
        return round(float(self._flops_S[stats.step]) / stats.seconds / self._peak_flops, 4)

    def flush(self) -> None:
        """Writes the steps since the last flush as a part file."""
        if not self._records:
            return
        name = f"part-{self._records[0]['step']:08d}.jsonl"
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in self._records)
        storage.write_bytes(storage.join(self._uri, name), lines.encode())
        self._records = []

    def close(self) -> str:
        """Concatenates the parts, in step order, to `metrics.jsonl`; returns its URI."""
        self.flush()
        self._trackers.close()
        target = storage.join(self._output_uri, "metrics.jsonl")
        parts = [name for name in storage.list_names(self._uri) if _PART.fullmatch(name)]
        data = b"".join(storage.read_bytes(storage.join(self._uri, name)) for name in parts)
        storage.write_bytes(target, data)
        storage.delete(storage.join(self._output_uri, "progress.json"))
        return target


def lost_trackers(metrics_uri: str) -> dict[str, str]:
    """Trackers that failed before the last step of a training: name -> reason."""
    last = storage.read_bytes(metrics_uri).decode().splitlines()[-1]
    return json.loads(last).get("lost_trackers", {})


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
