"""Which fast ways are exact for a model, found by trying.

What a model does beyond the plain case (its own masks, recurrent layers, its own way with logits)
cannot be told from its class, so it is asked: short rows go through it in the fast layout and
through transformers' own forward, in float32; only where the losses agree is the fast way taken.
All ways give the same training, they differ in speed and memory.

FlashAttention knows half precision only, where small differences hide.  It is asked last, in the
precision of the training, forward and backward: it may be as far from the float32 losses as SDPA is
in that precision, and a little more.

Sliding windows are longer than most probes, so agreement is not enough there: every layer that the
configuration gives a window must hand it to attention, and where the window is short a row longer
than it goes through the model too.

M = labels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from system import schema
from system.errors import InstructMixError, ModelError
from system.training import attention
from system.training.microbatch import Head, Layout, build_microbatch
from system.training.plan import TrainPlan, build_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from system.training.objective import Objective

_PROBE_LENGTHS = (13, 9, 12)
_PROBE_TOLERANCE = 1e-4
"""Of the largest loss, at least of one nat, float32; contamination between rows is orders of
magnitude larger."""
_LONGEST_PROBE = 1024
"""Tokens; a longer window is only looked for in what attention is told."""
_HEADS: tuple[Head, ...] = ("blocks", "labels", "whole")
"""The leanest first."""
_FLASH_FACTOR = 3.0
_FLASH_TOLERANCE = 1e-2
"""Mean error of FlashAttention: at most the factor times SDPA's, and the tolerance times the mean
loss.  A row that sees its neighbours is off by tenths of it."""


@contextmanager
def training_layout(
    objective: Objective, group: dist.ProcessGroup | None = None
) -> Iterator[Layout]:
    """Within the block the objective uses the fastest layout that is exact for its model.

    Args:
        objective: its model whole, on its device.
        group: ranks that train together; they take what the first of them finds, so that all make
            the same passes.

    Raises:
        ModelError: the model's losses are not finite.
    """
    before = objective.model.config._attn_implementation or "eager"
    try:
        objective.layout = _decide(objective, group)
        if objective.layout.is_flat:
            attention.register()
            objective.model.set_attn_implementation(attention.NAME)
        if objective.layout.reason and (group is None or dist.get_rank(group) == 0):
            _tell_once(str(objective.layout))
        yield objective.layout
    finally:
        objective.model.set_attn_implementation(before)


def _decide(objective: Objective, group: dist.ProcessGroup | None) -> Layout:
    if group is None:
        return find_layout(objective)
    box: list[Layout | InstructMixError | None] = [None]
    try:
        if dist.get_rank(group) == 0:
            box[0] = find_layout(objective)
    except InstructMixError as error:
        box[0] = error
    finally:  # whatever happened: the others wait for it
        device = next(objective.model.parameters()).device
        dist.broadcast_object_list(
            box, src=dist.get_global_rank(group, 0), group=group, device=device
        )
    if isinstance(box[0], InstructMixError):
        raise box[0]
    if box[0] is None:
        raise RuntimeError("the first rank failed while it tried layouts; its own error says why")
    return box[0]


@functools.cache
def _tell_once(layout: str) -> None:
    """A slower way is worth a line, but not one for each of many short trainings."""
    logging.getLogger(__name__).warning("training layout: %s", layout)


def find_layout(objective: Objective) -> Layout:
    """The fastest layout that equals transformers' own forward.

    Raises:
        ModelError: the model's losses are not finite.
    """
    compute_dtype = objective.compute_dtype
    before = objective.model.config._attn_implementation or "eager"
    try:
        with _exact(objective):
            own = Layout(is_flat=False, head="whole")
            expected = _probe(objective, own)
            layout = _fastest(objective, expected)
            device = next(objective.model.parameters()).device
            if layout.is_flat and attention.may_use_flash(device, compute_dtype):
                objective.compute_dtype = compute_dtype
                layout = _with_flash(objective, layout, expected)
            return layout
    finally:
        objective.model.set_attn_implementation(before)


def probe_losses(objective: Objective) -> torch.Tensor:
    """[M] losses of a few fixed rows in the objective's own layout, float32, without dropout."""
    with _exact(objective):
        return _probe(objective, replace(objective.layout, has_flash=False))


@contextmanager
def _exact(objective: Objective) -> Iterator[None]:
    """Within the block the objective computes in float32, without dropout."""
    was_training = objective.model.training
    dtype, objective.compute_dtype = objective.compute_dtype, torch.float32
    objective.model.eval()
    try:
        yield
    finally:
        objective.compute_dtype = dtype
        objective.model.train(was_training)


def _fastest(objective: Objective, expected: torch.Tensor) -> Layout:
    """Leaves the model with the attention that the layout needs."""
    model = objective.model
    own_attention = model.config._attn_implementation or "eager"
    reasons = []
    if model._supports_attention_backend:
        with _watched_windows() as told:
            model.set_attn_implementation(attention.NAME)
            for head in _HEADS:
                layout = Layout(is_flat=True, head=head)
                told.clear()
                reason = _refusal(objective, layout, expected) or _deaf(objective, told)
                if not reason:
                    return replace(layout, reason="; ".join(dict.fromkeys(reasons)))
                reasons.append(reason)
        model.set_attn_implementation(own_attention)
    else:
        reasons.append("its attention cannot be replaced")
    for head in _HEADS:
        padded = Layout(is_flat=False, head=head)
        reason = "" if head == "whole" else _refusal(objective, padded, expected)
        if not reason:
            break
        reasons.append(reason)
    return replace(padded, reason="; ".join(dict.fromkeys(reasons)))


@contextmanager
def _watched_windows() -> Iterator[list[int | None]]:
    """Within the block flat attention works, and notes the window of each call."""
    told: list[int | None] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs.get("sliding_window"))
        return attention.segment_attention(*args, **kwargs)

    attention.register(watched)
    try:
        yield told
    finally:
        attention.register()


def _deaf(objective: Objective, told: list[int | None]) -> str:
    """Why attention does not know the windows that the configuration declares; empty: it does."""
    try:
        declared = attention.declared_windows(objective.model.config.get_text_config())
    except NotImplementedError as error:
        return str(error)
    if not any(declared) and not any(told):
        return ""
    if told == declared * (len(told) // len(declared)):
        return ""
    return "its layers do not hand their sliding windows to attention"


def _refusal(objective: Objective, layout: Layout, expected: torch.Tensor) -> str:
    """Why a layout is not for the model; empty: it is."""
    try:
        found = _probe(objective, layout)
    except (TypeError, AttributeError, RuntimeError) as error:
        return _reason(error)
    gap = float((found - expected).abs().max())
    if gap <= _PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        return ""
    return f"its losses would differ by {gap:.2g} nats on a probe"


def _reason(error: Exception) -> str:
    """What an error says about a layout.

    Raises:
        Exception: the error itself, where it is the machine's: no memory, a broken GPU.
    """
    machine = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    if machine or "allocate memory" in str(error):
        raise error
    return " ".join(str(error).split())[:200] or type(error).__name__


def _with_flash(objective: Objective, layout: Layout, expected: torch.Tensor) -> Layout:
    """The flat layout with FlashAttention, where this device and this model can have it."""
    usual = float((_probe(objective, layout) - expected).abs().mean())
    flash = replace(layout, has_flash=True)
    try:
        found = _probe(objective, flash, with_backward=True)
    except RuntimeError as error:  # an old GPU, or heads of a size that the operator lacks
        reason = _reason(error)
    else:
        gap = float((found - expected).abs().mean())
        most = _FLASH_FACTOR * usual + _FLASH_TOLERANCE * float(expected.abs().mean())
        if gap <= most:
            return flash
        reason = f"FlashAttention is off by {gap:.2g} nats on a probe, SDPA by {usual:.2g}"
    return replace(layout, reason="; ".join(filter(None, (layout.reason, reason))))


def _probe(objective: Objective, layout: Layout, *, with_backward: bool = False) -> torch.Tensor:
    """Losses of a few fixed rows, in plan order."""
    model = objective.model
    device = next(model.parameters()).device
    plan = _probe_plan(model.config.get_text_config())
    parts = []
    before, objective.layout = objective.layout, layout
    try:
        for step in range(plan.num_steps):
            batch = build_microbatch(plan, plan.rows(step), layout=layout, device=device)
            with torch.set_grad_enabled(with_backward):
                total, nll_M = objective(batch)
            if with_backward:
                _backward(model, total)
            parts.append(nll_M)
    finally:
        objective.layout = before
    losses_M = torch.cat(parts)
    if not bool(torch.isfinite(losses_M).all()):
        raise ModelError(
            "the model gives losses that are not finite for a probe of random tokens: its weights "
            "are damaged, or were stored in a precision that they overflow"
        )
    return losses_M


def _probe_plan(config: PretrainedConfig) -> TrainPlan:
    """Three short rows, and in a step of its own one that is longer than a short window.

    Of the long row only the end is a label: it costs one pass, and few logits.
    """
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, config.vocab_size, size=n).tolist() for n in _PROBE_LENGTHS]
    labels = [[False] + [True] * (len(row) - 1) for row in rows]
    window = getattr(config, "sliding_window", None)
    longest = min(_LONGEST_PROBE, getattr(config, "max_position_embeddings", _LONGEST_PROBE))
    size = (window or 0) + max(_PROBE_LENGTHS)
    if window is not None and size <= longest:
        rows.append(generator.integers(0, config.vocab_size, size=size).tolist())
        labels.append([place >= window for place in range(size)])
    tokens = pa.table(
        {
            "id": [str(k) for k in range(len(rows))],
            "category": ["probe"] * len(rows),
            "input_ids": rows,
            "response_mask": labels,
        }
    ).cast(schema.TOKENS)
    return build_plan(
        tokens,
        ["probe"] * len(rows),
        batch_size=len(_PROBE_LENGTHS),
        max_length=_LONGEST_PROBE,
        packing=True,
    )


def _backward(model: torch.nn.Module, total: torch.Tensor) -> None:
    """Walks back to one of the first vectors of weights: through all layers, at no memory."""
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    if vectors:
        torch.autograd.grad(total, vectors[:1], allow_unused=True)
