"""The optimiser (AdamW) and its learning-rate schedule, one for the whole plan."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from system.training.settings import TrainSettings


def learning_rate(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step, a pure function of the step.

    It rises linearly over the first `warmup_share` of the steps, then falls to `min_lr_share` of
    the peak: along half a cosine, linearly, or (warmup-stable-decay) linearly over the last
    `decay_share` of the steps.

    Args:
        step: 0-based.
        num_steps: steps of the whole plan, all stages.
        settings: peak and shape.
    """
    warmup = math.ceil(settings.warmup_share * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if settings.lr_schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif settings.lr_schedule == "linear":
        factor = 1.0 - progress
    else:
        decay = max(1, math.ceil(settings.decay_share * num_steps))
        factor = min(1.0, (num_steps - step) / decay)
    floor = settings.min_lr_share
    return settings.learning_rate * (floor + (1.0 - floor) * factor)


def fused_choice(device: torch.device, *, is_sharded: bool) -> bool | None:
    """The argument `fused` of AdamW: True if the fused kernel is available, else None.

    Not False, because that would switch off the grouped kernels, too.  Sharded parameters can use
    the fused kernel on a GPU only; on a CPU, torch chooses its own loop.
    """
    return True if device.type == "cuda" or not is_sharded else None


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: TrainSettings,
    *,
    is_sharded: bool = False,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); norms and biases do not decay.

    Args:
        parameters: names and trainable parameters.
        settings: betas, epsilon, decay.
        is_sharded: whether the parameters are DTensors.
    """
    trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for _, parameter in trainable if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for _, parameter in trainable if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=fused_choice(trainable[0][1].device, is_sharded=is_sharded),
    )
    # Torch would create this state in the first step, but a checkpoint is loaded into it before.
    for _, parameter in trainable:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value
