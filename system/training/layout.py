"""Which fast ways are exact for a model, found by trying.

What a model does beyond the plain case (its own masks, recurrent layers, scaled logits) cannot be
told from its class, so it is asked: short rows go through it in the fast layout and through
transformers' own forward, in float32; only where the losses agree is the fast way taken.  All ways
give the same training, they differ in speed and memory.

FlashAttention knows half precision only, where small differences hide.  It is asked last, in the
precision of the training, forward and backward: it may be as far from the float32 losses as SDPA is
in that precision, and a little more.

Sliding windows are longer than most probes, so agreement is not enough there: every layer that the
configuration gives a window must hand it to attention, and where the window is short a row longer
than it goes through the model too.

M = labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from system import schema
from system.errors import ModelError
from system.training import attention
from system.training.microbatch import Layout, build_microbatch
from system.training.plan import TrainPlan, build_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from system.training.objective import Objective

_PROBE_LENGTHS = (13, 9, 12)
_PROBE_TOLERANCE = 1e-4
"""Nats per token, float32; contamination between rows is orders of magnitude larger."""
_LONGEST_PROBE = 1024
"""Tokens; a longer window is only looked for in what attention is told."""
_FLASH_FACTOR = 3.0
_FLASH_TOLERANCE = 1e-2
"""Mean error of FlashAttention: at most the factor times SDPA's, and the tolerance times the mean
loss.  A row that sees its neighbours is off by tenths of it."""


@contextmanager
def training_layout(objective: Objective) -> Iterator[Layout]:
    """Within the block the objective uses the fastest layout that is exact for its model."""
    before = objective.model.config._attn_implementation or "eager"
    objective.layout = find_layout(objective)
    try:
        yield objective.layout
    finally:
        objective.model.set_attn_implementation(before)


def find_layout(objective: Objective) -> Layout:
    """The fastest layout that equals transformers' own forward.

    Leaves the model with the attention implementation that the layout needs.

    Raises:
        ModelError: the model's losses are not finite.
    """
    compute_dtype = objective.compute_dtype
    with _exact(objective):
        own = Layout(is_flat=False, has_plain_head=False)
        expected = _probe(objective, own)
        layout = _agreeing(objective, expected) or own
        device = next(objective.model.parameters()).device
        if layout.is_flat and attention.may_use_flash(device, compute_dtype):
            objective.compute_dtype = compute_dtype
            layout = _with_flash(objective, layout, expected)
        return layout


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


def _agreeing(objective: Objective, expected: torch.Tensor) -> Layout | None:
    model = objective.model
    own_attention = model.config._attn_implementation or "eager"
    if model._supports_attention_backend:
        with _watched_windows() as told:
            model.set_attn_implementation(attention.NAME)
            for has_plain_head in (True, False):
                layout = Layout(is_flat=True, has_plain_head=has_plain_head)
                told.clear()
                if _agrees(objective, layout, expected) and _tells_windows(objective, told):
                    return layout
        model.set_attn_implementation(own_attention)
    padded = Layout(is_flat=False, has_plain_head=True)
    return padded if _agrees(objective, padded, expected) else None


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


def _tells_windows(objective: Objective, told: list[int | None]) -> bool:
    """Whether attention was told the windows that the configuration declares, and no others."""
    try:
        declared = attention.declared_windows(objective.model.config.get_text_config())
    except NotImplementedError:
        return False
    if not any(declared) and not any(told):
        return True
    return told == declared * (len(told) // len(declared))


def _agrees(objective: Objective, layout: Layout, expected: torch.Tensor) -> bool:
    try:
        found = _probe(objective, layout)
    except (TypeError, AttributeError, RuntimeError):
        return False  # the model does not take these inputs, so this layout is not for it
    return bool((found - expected).abs().max() <= _PROBE_TOLERANCE)


def _with_flash(objective: Objective, layout: Layout, expected: torch.Tensor) -> Layout:
    """The flat layout with FlashAttention, where this device and this model can have it."""
    usual = float((_probe(objective, layout) - expected).abs().mean())
    flash = replace(layout, has_flash=True)
    try:
        found = _probe(objective, flash, with_backward=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return layout  # the GPU is older than Ampere, or the heads have a size that it lacks
    gap = float((found - expected).abs().mean())
    most = _FLASH_FACTOR * usual + _FLASH_TOLERANCE * float(expected.abs().mean())
    return flash if gap <= most else layout


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
