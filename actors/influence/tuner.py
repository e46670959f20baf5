"""The actor that trains intervention runs one after the other, from base weights in memory.

    influencer ── tune(plan URI, mask, ...) ──> Tuner ── checkpoint directory ──> storage
               <─────── TuneStats ────────────
               ── warm_up(plan URI, ...) ────> Tuner ── checkpoints with moments > storage
               ── differentiate(plan URI, rows) ─> Tuner <── one of them ────────── storage
               <─────── Derivatives ─────────────

A call blocks its actor until the checkpoint is written.  Between calls the actor keeps only what
can be read again.  So if an actor dies, its call is repeated on another one and gives the same
bits; all actors use the same number of threads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from system import storage
from system.influence.measure.gradient import (
    Derivatives,
    GradientTask,
    checkpoint_path,
    differentiate,
    warm_up,
)
from system.influence.measure.proxy import ProxyModel, TuneStats
from system.training.plan import TrainPlan, read_plan
from system.training.settings import TrainSettings


class Tuner:
    """Trains one proxy model.

    Args:
        model_uri: Hugging Face directory.
        num_threads: CPU threads, the same for all tuners of a run.
        use_gpu: train on the GPU that Ray gave this actor.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self, model_uri: str, num_threads: int, use_gpu: bool, trust_remote_code: bool
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._copy = storage.LocalCopy(model_uri)
        self._proxy = ProxyModel(
            self._copy.path,
            device="cuda" if use_gpu else "cpu",
            trust_remote_code=trust_remote_code,
        )
        self._plans: dict[str, TrainPlan] = {}

    def tune(
        self,
        plan_uri: str,
        active: np.ndarray,
        settings: TrainSettings,
        start_uri: str | None,
        output_uri: str,
    ) -> TuneStats:
        """Trains one run and writes its checkpoint; changes the weights that the actor holds."""
        stats = self._proxy.tune(self._plan(plan_uri), active, settings, start_uri)
        self._proxy.save(output_uri)
        return stats

    def warm_up(
        self, plan_uri: str, settings: TrainSettings, num_checkpoints: int, output_uri: str
    ) -> TuneStats:
        """Trains a warm-up and writes its checkpoints; changes the weights as `tune` does."""
        storage.delete(output_uri)
        with tempfile.TemporaryDirectory(prefix="instructmix-warm-") as folder:
            target = storage.local_path(output_uri) or Path(folder)
            target.mkdir(parents=True, exist_ok=True)
            stats = warm_up(
                self._proxy.restored(), self._plan(plan_uri), settings, num_checkpoints, target
            )
            if target == Path(folder):
                storage.upload_directory(target, output_uri)
        return stats

    def differentiate(
        self,
        plan_uri: str,
        task: GradientTask,
        heldout: pa.Table,
        settings: TrainSettings,
        warm_uri: str,
    ) -> Derivatives:
        """Derivatives at one checkpoint of a warm-up; changes the weights as `tune` does."""
        with tempfile.TemporaryDirectory(prefix="instructmix-warm-") as folder:
            warm_dir = storage.download_directory(warm_uri, Path(folder))
            return differentiate(
                self._proxy.restored(),
                self._plan(plan_uri),
                task,
                heldout,
                settings,
                checkpoint_path(warm_dir, task.part),
            )

    def _plan(self, plan_uri: str) -> TrainPlan:
        if plan_uri not in self._plans:
            self._plans = {plan_uri: read_plan(plan_uri)}
        return self._plans[plan_uri]
