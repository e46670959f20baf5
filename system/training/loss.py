"""Cross entropy at label positions, without storing the logits of a whole pass.

Only the hidden states in front of a response token go through the language-model head, one block at
a time.  The logits of a block are turned into its losses and its gradient at once, in place, and
are then freed.  The peak memory of the loss is

    block       its logits in float32, twice if they are capped; in half precision also a copy
                before and one after, at half the bytes
    [V, E]      the gradient of the head in float32; in half precision also the head, and the
                gradient of one block, in that precision
    [M, E]      the hidden states and their gradient

so it does not grow with M * V, the logits of a pass.  Every block updates the whole [V, E] gradient
once.  On a GPU this is slow compared with the matrix products, so blocks are larger there.

M = labels, V = vocabulary, E = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCK_BYTES = 64 * 2**20
"""Bytes of float32 logits in one block on a CPU."""
_GPU_BLOCK_BYTES = 2**30
"""Bytes on a GPU, at most `_GPU_SHARE` of its total memory (not of its free memory): equal GPUs get
equal blocks, so they add in the same order."""
_GPU_SHARE = 1 / 64


def block_bytes(device: torch.device) -> int:
    """Bytes of float32 logits in one block on a device."""
    if device.type != "cuda":
        return BLOCK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(BLOCK_BYTES, min(_GPU_BLOCK_BYTES, int(memory * _GPU_SHARE)))


@dataclass(frozen=True, slots=True)
class LogitForm:
    """How a model transforms its logits x before the softmax."""

    scale: float = 1.0
    """First, x is replaced by scale * x."""
    cap: float | None = None
    """Then x is replaced by cap * tanh(x / cap); None: no cap."""


_PLAIN = LogitForm()


def logit_form(config: PretrainedConfig) -> LogitForm:
    """The transformation that a configuration declares: Cohere and Granite scale, Gemma caps."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitForm(scale / divisor, getattr(config, "final_logit_softcapping", None))


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    compute_dtype: torch.dtype | None = None,
    form: LogitForm = _PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and values of the token losses.

    Args:
        hidden: [M, E], the last hidden state in front of each label.
        weight: [V, E] of the language-model head.
        bias: [V] or None.
        targets: [M] int64, the labels.
        compute_dtype: precision of the matrix products (losses are float32); None: the weight's.
        form: transformation of the logits, in float32.

    Returns:
        The sum in nats, differentiable in hidden, weight and bias; and [M] float32 losses in
        nats, detached.
    """
    with_grad = torch.is_grad_enabled()
    total, nll_M = _HeadLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, weight, bias, targets, compute_dtype or weight.dtype, form, with_grad
    )
    return total, nll_M


class _HeadLoss(torch.autograd.Function):
    """The forward pass computes the gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
        form: LogitForm,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for_hidden, for_weight, for_bias = (
            needed and with_grad for needed in ctx.needs_input_grad[:3]
        )
        states, table = hidden.to(dtype), weight.to(dtype)
        nll_M = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(states) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None  # pyright: ignore
        block = max(1, block_bytes(hidden.device) // (4 * len(weight)))
        for start in range(0, len(targets), block):
            part = slice(start, start + block)
            logits = states[part] @ table.T
            if bias is not None:
                logits = logits + bias
            logits, slope = _shape(logits.float(), form)
            grad, nll_M[part] = _softmax_step(logits, targets[part])
            if slope is not None:
                grad *= slope
            # Products run in the compute precision, sums over blocks in float32.
            lowered = grad.to(dtype)
            if grad_hidden is not None:
                torch.matmul(lowered, table, out=grad_hidden[part])
            if grad_weight is not None:
                if dtype == torch.float32:
                    grad_weight.addmm_(lowered.T, states[part])
                else:  # converted to float32 during the addition, without a copy
                    grad_weight += lowered.T @ states[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(nll_M)
        return nll_M.sum(), nll_M

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_total = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (  # in place: torch refuses a second backward pass, which would scale twice
            None if grad_hidden is None else grad_hidden.mul_(grad_total).to(hidden_dtype),
            None if grad_weight is None else grad_weight.mul_(grad_total).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_total),
            None,
            None,
            None,
            None,
        )


def _shape(
    logits: torch.Tensor, form: LogitForm
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """The transformed logits (in place), and the derivative of the transformation; None: 1."""
    if form.scale != 1.0:
        logits *= form.scale
    if form.cap is None:
        return logits, None if form.scale == 1.0 else form.scale
    logits /= form.cap
    logits.tanh_()
    slope = logits.square().neg_().add_(1.0).mul_(form.scale)
    logits *= form.cap
    return logits, slope


def _softmax_step(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the summed loss with respect to the logits (in place), and the losses."""
    logits -= logits.amax(dim=1, keepdim=True)
    picked = logits.gather(1, targets[:, None])
    logits.exp_()
    total = logits.sum(dim=1, keepdim=True)
    nll = (total.log() - picked)[:, 0]
    logits /= total
    logits.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0))
    return logits, nll
