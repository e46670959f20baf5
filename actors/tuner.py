"""The actor that trains intervention runs, one after the other, from weights kept in memory.

    influencer ── tune(plan URI, mask, ...) ──> Tuner ── checkpoint directory ──> storage
               <─────── TuneStats ────────────

A call blocks its actor until the checkpoint is written.  Nothing is kept between calls but what can
be read again, so a call that died with its actor is repeated elsewhere and gives the same bits:
every actor uses the same number of threads.
"""

from __future__ import annotations

import numpy as np

from system.influence.proxy import ProxyModel, TuneStats
from system.training.plan import TrainPlan, read_plan
from system.training.settings import TrainSettings


class Tuner:
    """One proxy model.

    Args:
        model_dir: local Hugging Face directory.
        num_threads: CPU threads, the same for all tuners of a run.
        use_gpu: train on the GPU that Ray gave this actor.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self, model_dir: str, num_threads: int, use_gpu: bool, trust_remote_code: bool
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._proxy = ProxyModel(
            model_dir, device="cuda" if use_gpu else "cpu", trust_remote_code=trust_remote_code
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
        if plan_uri not in self._plans:
            self._plans = {plan_uri: read_plan(plan_uri)}
        stats = self._proxy.tune(self._plans[plan_uri], active, settings, start_uri)
        self._proxy.save(output_uri)
        return stats
