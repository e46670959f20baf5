"""What a training is asked for, and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from system.training.settings import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What to train and where to put it."""

    name: str
    plan_uri: str
    """A plan that `system.training.plan.write_plan` wrote."""
    output_uri: str
    """Directory of its own, on storage that all workers reach."""
    settings: TrainSettings
    model_dir: str
    """Directory (URI) of the base model."""
    base_model: str = ""
    """How the model card names the base model."""
    export_dtype: str = "float32"
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay; 0 deletes them all once the job is done."""
    heldout_uri: str | None = None
    """A plan of held-out rows: their loss is measured at every checkpoint and at the end, and the
    checkpoint where it is lowest stays."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model; `best` needs `heldout_uri`."""
    trust_remote_code: bool = False
    log_to: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """For the model card: fingerprints of what led to the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A finished job."""

    name: str
    model_uri: str
    metrics_uri: str
    num_steps: int
    num_tokens: int
    """Tokens trained on, prompts included."""
    num_labels: int
    """Response tokens trained on."""
    first_loss: float
    last_loss: float
    """Means of the first and the last tenth of the steps, nats per response token."""
    seconds: float
    """Spent in steps, over all attempts that count."""
    exported_step: int = -1
    """Steps that the exported weights have made."""
    heldout_loss: float | None = None
    """Of the exported weights, nats per response token; null where it is not measured."""
