"""The proxy model that intervention runs train: loaded once, restored from memory for each run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from system import storage
from system.errors import ModelError
from system.models.base import load_model
from system.training.plan import TrainPlan
from system.training.settings import TrainSettings
from system.training.train import train_on_plan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneStats:
    """Cost and training loss of one run."""

    trained_tokens: int
    """Forward and backward, prompts included."""
    trained_labels: int
    """Number of response tokens with a loss."""
    seconds: float
    first_loss: float
    last_loss: float
    """Mean nats per response token over the first and the last tenth of the steps."""


class ProxyModel:
    """A model whose weights can be restored to the base, or to another start, from memory.

    Args:
        model_dir: local Hugging Face directory.
        device: `cpu` or a CUDA device.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(self, model_dir: str, *, device: str, trust_remote_code: bool) -> None:
        self._model = load_model(
            model_dir, dtype="float32", device=device, trust_remote_code=trust_remote_code
        )
        self._base = self._snapshot()
        self._starts: dict[str, dict[str, Tensor]] = {}

    def tune(
        self,
        plan: TrainPlan,
        active: np.ndarray,
        settings: TrainSettings,
        start_uri: str | None = None,
    ) -> TuneStats:
        """Trains from the base weights, or from those saved at `start_uri`.

        Changes the weights of the model; the result does not depend on the weights before.

        Args:
            plan: the replication's common schedule.
            active: [plan rows] bool, the run's mask.
            settings: optimiser and seed, the same for all runs of a replication.
            start_uri: directory that `save` wrote (`branch`).
        """
        self._restore(self._base if start_uri is None else self._start(start_uri))
        result = train_on_plan(self._model, plan, settings, active=active)
        tenth = max(1, result.losses.size // 10)
        return TuneStats(
            trained_tokens=result.num_tokens,
            trained_labels=result.num_labels,
            seconds=result.seconds,
            first_loss=float(result.losses[:tenth].mean()),
            last_loss=float(result.losses[-tenth:].mean()),
        )

    def restored(self) -> PreTrainedModel:
        """Restores the base weights and returns the model; the caller may change it."""
        self._restore(self._base)
        return self._model

    def save(self, uri: str) -> None:
        """Writes the weights as a Hugging Face directory; replaces an existing one."""
        storage.delete(uri)
        with tempfile.TemporaryDirectory(prefix="instructmix-tuned-") as folder:
            local = storage.local_path(uri)
            target = Path(folder) if local is None else local
            target.mkdir(parents=True, exist_ok=True)
            self._model.save_pretrained(target)
            if local is None:
                storage.upload_directory(target, uri)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._model.state_dict().items()}

    def _restore(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self._model.load_state_dict(weights)

    def _start(self, uri: str) -> dict[str, Tensor]:
        """The weights saved at the URI.  Only the last loaded ones are kept in memory."""
        if uri not in self._starts:
            self._starts.clear()
            self._starts[uri] = self._read(uri)
        return self._starts[uri]

    def _read(self, uri: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory(prefix="instructmix-start-") as folder:
            directory = storage.download_directory(uri, Path(folder))
            files = sorted(directory.glob("*.safetensors"))
            if not files:
                raise ModelError(f"{uri}: expected the weights of a warm-up run, found none there")
            loaded = {name: value for file in files for name, value in load_file(file).items()}
        self._restore(self._base)
        outcome = self._model.load_state_dict(loaded, strict=False)
        # Tied weights are saved under one of their names; loading that one sets the others.
        own = self._model.state_dict()
        filled = {own[name].data_ptr() for name in loaded if name in own}
        absent = [name for name in outcome.missing_keys if own[name].data_ptr() not in filled]
        if absent or outcome.unexpected_keys:
            raise ModelError(
                f"{uri}: expected the weights of this model; missing {absent[:3]}, unknown "
                f"{list(outcome.unexpected_keys)[:3]}. Run the stage again with --redo influence."
            )
        return self._snapshot()
