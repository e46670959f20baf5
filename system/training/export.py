"""Export of a trained model as a Hugging Face directory, which transformers and vLLM can load.

`job.run_job` calls `whole_state` on all ranks and then `export_job` on rank 0.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from system import storage
from system.models.base import load_model, load_tokenizer
from system.training.lora import add_adapters, merge_adapters
from system.training.plan import TrainPlan
from system.training.records import TrainedModel, TrainJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from system.training.train import Training

_CARRIED = ("generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Content of the model card."""

    base_model: str
    """Name of the base model in the configuration."""
    method: str
    """Full weights or adapters, optimiser, schedule, steps."""
    stages: tuple[str, ...]
    categories: Mapping[str, int]
    """Rows trained on, by category."""
    hashes: Mapping[str, str]
    """Hashes of plan, settings, and base model, and fingerprints of earlier stages."""
    results: Mapping[str, str]
    """Tokens and losses."""

    def render(self) -> str:
        """The card as Markdown with YAML front matter."""
        lines = [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [instructmix, sft]",
            "---",
            "",
            "# Fine-tuned with instructmix",
            "",
            f"Base model: `{self.base_model}`. {self.method}. Loss on response tokens only.",
            "",
            f"Stages of the curriculum, in order: {', '.join(self.stages)}.",
            "",
            "| category | rows |",
            "|---|---|",
            *(f"| {name} | {count} |" for name, count in sorted(self.categories.items())),
            "",
            "| what | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in self.results.items()),
            "",
            "Made from (SHA-256 or fingerprint):",
            "",
            *(f"- {name}: `{value}`" for name, value in self.hashes.items()),
            "",
        ]
        return "\n".join(lines)


def export_job(
    job: TrainJob,
    plan: TrainPlan,
    base_dir: Path,
    state: dict[str, torch.Tensor] | None,
    model: PreTrainedModel,
    hashes: Mapping[str, str],
    summary: TrainedModel,
) -> None:
    """Writes model, adapters, and model card of a finished job; only rank 0 calls it.

    Args:
        job: the job.
        plan: its plan.
        base_dir: directory of the base model.
        state: gathered weights (adapters or shards), which are loaded into a fresh base model; None
            if `model` itself has all trained weights.
        model: the trained model.
        hashes: identity of the training, for the model card.
        summary: results, for the model card.
    """
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


def export_model(
    model: PreTrainedModel,
    base_dir: str,
    output_uri: str,
    card: ModelCard,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Writes weights (safetensors), configuration, tokenizer, chat template and model card.

    Args:
        model: the trained model, adapters merged.
        base_dir: directory of the base model, for tokenizer and generation settings.
        output_uri: target directory; existing files are replaced.
        card: the model card.
        dtype: precision of the written weights.
        trust_remote_code: whether code of the base model may run to load its tokenizer.
    """
    tokenizer = load_tokenizer(base_dir, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="instructmix-export-") as folder:
        target = Path(folder)
        lowered = _in_precision(model.state_dict(), getattr(torch, dtype))
        use_cache = model.config.use_cache
        model.config.use_cache = True  # training switched it off, but generation needs it
        try:
            model.save_pretrained(target, state_dict=lowered)
        finally:
            model.config.use_cache = use_cache
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = dtype  # save_pretrained wrote the dtype of the training
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(target)
        for name in _CARRIED:
            if (Path(base_dir) / name).is_file():
                shutil.copyfile(Path(base_dir) / name, target / name)
        (target / "README.md").write_text(card.render(), encoding="utf-8")
        storage.upload_directory(target, output_uri)


def _in_precision(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights converted to `dtype`; tied weights stay one tensor."""
    converted: dict[int, torch.Tensor] = {}
    result = {}
    for name, value in state.items():
        key = value.data_ptr()
        if key not in converted or converted[key].shape != value.shape:
            converted[key] = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
        result[name] = converted[key]
    return result


def whole_state(training: Training) -> dict[str, torch.Tensor]:
    """Trained weights by name, on the CPU of rank 0; sharded weights are gathered.

    Every rank must call it.  The other ranks hold one tensor at a time and return an empty dict.
    """
    from torch.distributed.tensor import DTensor

    state: dict[str, torch.Tensor] = {}
    for name, parameter in training.model.named_parameters():
        if parameter.requires_grad:
            value: Any = parameter.detach()
            # Gathering is collective: every rank takes part, also those that keep nothing.
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if training.rank == 0:
                state[name] = whole.to("cpu", copy=True)
    return state
