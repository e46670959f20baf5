"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) put into a model, and merged back.

peft injects its layers into the model in place, so everything that trains, saves or scores a model
sees an ordinary one.
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
    """Freezes the model and puts adapters into it, in place.

    Args:
        model: a plain model.
        lora: rank, scale, dropout, names of the layers.
        seed: of the adapters' random halves, which do not depend on anything else.

    Raises:
        ModelError: no layer of the model has one of the names, or the head is among them.
    """
    from peft import LoraConfig as PeftConfig
    from peft import TaskType, get_peft_model

    forbidden = sorted(set(NEVER_ADAPTED) & set(lora.targets))
    if forbidden:
        raise ModelError(
            f"lora.targets names {forbidden}: adapters on the head or the embedding are not "
            "supported by the scoring engine; leave them out"
        )
    wanted = PeftConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, wanted)
        except ValueError as error:
            names = sorted(
                {
                    name.rsplit(".", 1)[-1]
                    for name, module in model.named_modules()
                    if isinstance(module, torch.nn.Linear)
                }
            )
            raise ModelError(
                f"lora.targets {list(lora.targets)} fit no layer of this model, whose linear "
                f"layers are called {names}; name some of those"
            ) from error
    return adapted  # pyright: ignore[reportReturnType]


def merge_adapters(adapted: PeftModel) -> PreTrainedModel:
    """Adds the adapters to the weights they adapt and takes them out, in place."""
    merged = adapted.merge_and_unload(safe_merge=False)  # pyright: ignore[reportCallIssue]
    merged.requires_grad_(True)
    return merged
