"""The end of a job: the trained weights, the adapters and the model card go to storage."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from system import storage
from system.models.base import load_model
from system.training.export import ModelCard, export_model
from system.training.lora import add_adapters, merge_adapters
from system.training.plan import TrainPlan
from system.training.records import TrainedModel, TrainJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def deliver(
    job: TrainJob,
    plan: TrainPlan,
    base_dir: Path,
    state: dict[str, torch.Tensor] | None,
    model: PreTrainedModel,
    hashes: Mapping[str, str],
    summary: TrainedModel,
) -> None:
    """Writes the model; on rank 0 alone.  With a gathered state it goes into a fresh base model."""
    if state is not None:
        model = load_model(base_dir, trust_remote_code=job.trust_remote_code)
        lora = job.settings.lora
        adapted = None if lora is None else add_adapters(model, lora, job.settings.seed)
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, f"trained weights that the base model lacks: {unexpected}"
        if adapted is not None:
            with tempfile.TemporaryDirectory(prefix="instructmix-adapter-") as folder:
                adapted.save_pretrained(folder)
                storage.upload_directory(Path(folder), storage.join(job.output_uri, "adapter"))
            model = merge_adapters(adapted)
    stages = dict.fromkeys(plan.table.column("stage").to_pylist())
    categories = Counter(plan.table.column("category").to_pylist())
    lora = job.settings.lora
    card = ModelCard(
        base_model=job.base_model or base_dir.name,
        method=(
            f"{'All weights' if lora is None else f'Adapters of rank {lora.rank}, merged'}, AdamW "
            f"at {job.settings.learning_rate:g}, {job.settings.lr_schedule} schedule, "
            f"{plan.num_steps} steps"
        ),
        stages=tuple(stages),
        categories=dict(categories),
        hashes={**job.hashes, **{f"training {name}": value for name, value in hashes.items()}},
        results={
            "response tokens": f"{summary.num_labels:,}",
            "tokens": f"{summary.num_tokens:,}",
            "loss, first tenth of the steps": f"{summary.first_loss:.4f}",
            "loss, last tenth of the steps": f"{summary.last_loss:.4f}",
            **_heldout_lines(job, plan, summary),
        },
    )
    export_model(
        model,
        str(base_dir),
        summary.model_uri,
        card,
        dtype=job.export_dtype,
        trust_remote_code=job.trust_remote_code,
    )


def _heldout_lines(job: TrainJob, plan: TrainPlan, summary: TrainedModel) -> dict[str, str]:
    if summary.heldout_loss is None:
        return {}
    which = "the best checkpoint" if job.export == "best" else "the last step"
    return {
        "weights": f"after step {summary.exported_step} of {plan.num_steps}, {which}",
        "held-out loss": f"{summary.heldout_loss:.4f}",
    }
