"""Input and output of a training: `TrainJob` and `TrainedModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from system.training.settings import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """A training job: model, plan, settings, and output directory."""

    name: str
    plan_uri: str
    """A plan that `system.training.plan.write_plan` wrote."""
    output_uri: str
    """Directory of this job alone, on storage that all workers can access."""
    settings: TrainSettings
    model_dir: str
    """Directory (URI) of the base model."""
    base_model: str = ""
    """Name of the base model in the model card."""
    export_dtype: str = "float32"
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; 0 deletes all at the end of the job."""
    heldout_uri: str | None = None
    """A plan of held-out rows.  Their loss is measured at every checkpoint and at the end; the
    checkpoint with the lowest loss is kept."""
    export: Literal["last", "best"] = "last"
    """Which weights are exported; `best` needs `heldout_uri`."""
    trust_remote_code: bool = False
    log_to: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the inputs of the plan, for the model card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The result of a finished job."""

    name: str
    model_uri: str
    metrics_uri: str
    num_steps: int
    num_tokens: int
    """Tokens trained on, with prompts."""
    num_labels: int
    """Response tokens trained on."""
    first_loss: float
    last_loss: float
    """Means over the first and the last tenth of the steps, nats per response token."""
    seconds: float
    """Time of all steps; a repeated step counts once."""
    exported_step: int = -1
    """Number of steps after which the exported weights were taken."""
    heldout_loss: float | None = None
    """Of the exported weights, nats per response token; None if it is not measured."""
