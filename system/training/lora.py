"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): adding them to a model, and merging them.

The package peft adds its layers to the model in place, so the code that trains, saves, or scores a
model needs no changes for adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from system.config import LoraConfig
from system.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NEVER_ADAPTED = ("lm_head", "embed_tokens")


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Freezes the model and adds adapters to it, in place.

    Args:
        model: a plain model.
        lora: rank, scale, dropout, names of the layers.
        seed: of the random initialisation of the adapters.

    Raises:
        ModelError: no layer of the model has one of the names, or the head is among them.
    """
    from peft import LoraConfig as PeftConfig
    from peft import TaskType, get_peft_model

    forbidden = sorted(set(NEVER_ADAPTED) & set(lora.targets))
    if forbidden:
        raise ModelError(
            f"lora.targets has {forbidden}, but the scoring engine does not support adapters on "
            "the head or the embedding; remove them"
        )
    peft_config = PeftConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, peft_config)
        except ValueError as error:
            names = sorted(
                {
                    name.rsplit(".", 1)[-1]
                    for name, module in model.named_modules()
                    if isinstance(module, torch.nn.Linear)
                }
            )
            raise ModelError(
                f"lora.targets {list(lora.targets)} match no layer of this model; its linear "
                f"layers are called {names}; use some of these names"
            ) from error
    return adapted  # pyright: ignore[reportReturnType]


def merge_adapters(adapted: PeftModel) -> PreTrainedModel:
    """Adds the adapters to the weights and removes them, in place."""
    merged = adapted.merge_and_unload(safe_merge=False)  # pyright: ignore[reportCallIssue]
    merged.requires_grad_(True)
    return merged
