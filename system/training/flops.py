"""How much arithmetic a step needs, and how much the machine can do: model FLOPs utilisation.

MFU (Chowdhery et al. 2022, PaLM, appendix B) is the arithmetic that the rows need at least, over
the arithmetic that the devices could have done in the same time.  Padding, recomputation and the
optimiser do not count as needed.  What the devices can do is measured: the fastest of some large
matrix products in the precision of the training, so the figure means the same on every machine.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import PretrainedConfig

from system.training.plan import TrainPlan

_PRODUCTS = 8
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def step_flops(
    plan: TrainPlan, config: PretrainedConfig, *, is_lora: bool = False
) -> np.ndarray | None:
    """[S] operations that each step's rows need at least, over all ranks.

    Six per weight of the layers and token (four where the weights are frozen and only activations
    have gradients), the head at response tokens only, attention over each row's causal triangle.

    Args:
        plan: its rows, S steps.
        config: of a decoder with gated feed-forward layers (Llama, Qwen, Mistral and their like);
            for others (experts, GPT-2) no figure is given: None.
        is_lora: adapters are trained, the weights are frozen; the adapters themselves are left out.
    """
    if any(getattr(config, name, None) is None for name in _NEEDED) or any(
        getattr(config, name, None) for name in _EXPERTS
    ):
        return None
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    per_layer = hidden * (2 * query + 2 * key) + 3 * hidden * config.intermediate_size
    lengths_R = np.diff(plan.offsets).astype(np.float64)
    starts = plan.step_starts[:-1]
    tokens_S = np.add.reduceat(lengths_R, starts)
    squares_S = np.add.reduceat(lengths_R**2, starts)
    labels_S = plan.denominators.astype(np.float64)
    per_weight = 4 if is_lora else 6
    dense_S = layers * per_layer * tokens_S + config.vocab_size * hidden * labels_S
    return per_weight * dense_S + 6 * layers * query * squares_S


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest matrix product seen on the device.

    Uses the threads that torch uses now, and no random numbers.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
    best = float("inf")
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        _ = left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
