"""The trained model as a Hugging Face directory that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from system import storage
from system.models.base import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from system.training.train import Training

_CARRIED = ("generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the exported model says about itself."""

    base_model: str
    """As the configuration names it."""
    method: str
    """Full weights or adapters, optimiser, schedule."""
    stages: tuple[str, ...]
    categories: Mapping[str, int]
    """Rows trained on, by category."""
    hashes: Mapping[str, str]
    """Plan, settings, base model, upstream fingerprints: what it was made from."""
    results: Mapping[str, str]
    """Steps, tokens, final loss."""

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
        output_uri: where the directory goes; files that are there are replaced.
        card: the model card.
        dtype: precision of the written weights.
        trust_remote_code: the base model's own code may be run to read its tokenizer.
    """
    tokenizer = load_tokenizer(base_dir, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="instructmix-export-") as folder:
        target = Path(folder)
        lowered = _in_precision(model.state_dict(), getattr(torch, dtype))
        use_cache = model.config.use_cache
        model.config.use_cache = True  # generation needs it; training had switched it off
        try:
            model.save_pretrained(target, state_dict=lowered)
        finally:
            model.config.use_cache = use_cache
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = dtype  # save_pretrained writes the dtype that training had
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(target)
        for name in _CARRIED:
            if (Path(base_dir) / name).is_file():
                shutil.copyfile(Path(base_dir) / name, target / name)
        (target / "README.md").write_text(card.render(), encoding="utf-8")
        storage.upload_directory(target, output_uri)


def _in_precision(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in a precision; tied ones stay one tensor."""
    converted: dict[int, torch.Tensor] = {}
    result = {}
    for name, value in state.items():
        key = value.data_ptr()
        if key not in converted or converted[key].shape != value.shape:
            converted[key] = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
        result[name] = converted[key]
    return result


def whole_state(training: Training) -> dict[str, torch.Tensor]:
    """Trained weights by name, on the CPU of rank 0, gathered where they are sharded.

    Every rank must call it; the others hold one tensor at a time and get nothing.
    """
    from torch.distributed.tensor import DTensor

    state: dict[str, torch.Tensor] = {}
    for name, parameter in training.model.named_parameters():
        if parameter.requires_grad:
            value: Any = parameter.detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if training.rank == 0:
                state[name] = whole.to("cpu", copy=True)
    return state
