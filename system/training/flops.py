"""Model FLOPs utilisation (MFU): operations that a step needs over those the devices could do.

Source: Chowdhery et al. 2022, PaLM, appendix B.  The numerator is the minimum for the rows, without
padding, recomputation, and optimiser.  The denominator is measured: the rate of the fastest of some
large matrix products in the precision of the training.  So the number has the same meaning on every
machine.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import PretrainedConfig

from system.training.plan import TrainPlan

_PRODUCTS = 8
_REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def step_flops(
    plan: TrainPlan, config: PretrainedConfig, *, is_lora: bool = False
) -> np.ndarray | None:
    """[S] operations that the rows of each step need at least, over all ranks.

    Six operations per weight and token (four if the weights are frozen and only activations have
    gradients); the head only at response tokens; attention over the causal triangle of each row.

    Args:
        plan: the rows; S steps.
        config: of a decoder with gated feed-forward layers (Llama, Qwen, Mistral, and similar); the
            result is None for other models (mixtures of experts, GPT-2).
        is_lora: whether the weights are frozen and adapters are trained; the adapters themselves
            are not counted.
    """
    if any(getattr(config, name, None) is None for name in _REQUIRED_FIELDS) or any(
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
    """Operations per second of the fastest of some matrix products on the device.

    It uses the current number of torch threads, and no random numbers.
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
