"""Finds the fastest layout of forward passes that is exact for a model.

All layouts give the same training; they differ in speed and memory.  Whether a fast layout is
exact cannot be seen from the class of a model: it may have its own masks, recurrent layers, or its
own way to compute logits.  So each layout is probed: a few short rows go through the model in this
layout and through transformers' own forward pass, in float32.  A layout is used only if the losses
agree.

FlashAttention supports half precision only, in which small errors are hard to see.  It is probed
last, in the precision of the training, forward and backward.  Its error against the float32 losses
may be slightly larger than the error of SDPA in the same precision.

Sliding windows are longer than most probe rows, so equal losses are not enough.  Every layer to
which the configuration gives a window must also pass it to the attention function.  If the window
is short, the probe includes a row that is longer than it.

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
"""Allowed difference, relative to the largest loss (at least one nat).  If rows influence each
other, the difference is orders of magnitude larger."""
_LONGEST_PROBE = 1024
"""Tokens; for longer windows, only the argument of the attention function is checked."""
_HEADS: tuple[Head, ...] = ("blocks", "labels", "whole")
"""In order of memory, the least first."""
_FLASH_FACTOR = 3.0
_FLASH_TOLERANCE = 1e-2
"""The mean error of FlashAttention may be at most the factor times the error of SDPA plus the
tolerance times the mean loss.  A row that sees its neighbours is wrong by tenths of the loss."""


@contextmanager
def training_layout(
    objective: Objective, group: dist.ProcessGroup | None = None
) -> Iterator[Layout]:
    """Within the block the objective uses the fastest layout that is exact for its model.

    Args:
        objective: its model must not be sharded yet.
        group: ranks that train together; all use the layout that rank 0 finds, so that all make
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
            _log_once(str(objective.layout))
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
    finally:  # also after an error of any type: the other ranks wait for this broadcast
        device = next(objective.model.parameters()).device
        dist.broadcast_object_list(
            box, src=dist.get_global_rank(group, 0), group=group, device=device
        )
    if isinstance(box[0], InstructMixError):
        raise box[0]
    if box[0] is None:
        raise RuntimeError("rank 0 failed while it probed the layouts; see the error of rank 0")
    return box[0]


@functools.cache
def _log_once(layout: str) -> None:
    """Logs a slower layout once, not for each of many short trainings."""
    logging.getLogger(__name__).warning("training layout: %s", layout)


def find_layout(objective: Objective) -> Layout:
    """The fastest layout with the same losses as transformers' own forward pass.

    Raises:
        ModelError: the model's losses are not finite.
    """
    compute_dtype = objective.compute_dtype
    before = objective.model.config._attn_implementation or "eager"
    try:
        with _exact(objective):
            plain = Layout(is_flat=False, head="whole")
            expected = _probe(objective, plain)
            layout = _fastest(objective, expected)
            device = next(objective.model.parameters()).device
            if layout.is_flat and attention.may_use_flash(device, compute_dtype):
                objective.compute_dtype = compute_dtype
                layout = _try_flash(objective, layout, expected)
            return layout
    finally:
        objective.model.set_attn_implementation(before)


def probe_losses(objective: Objective) -> torch.Tensor:
    """[M] losses of the probe rows in the layout of the objective, float32, without dropout."""
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
    """The fastest exact layout in float32; the model keeps the attention that it needs."""
    model = objective.model
    own_attention = model.config._attn_implementation or "eager"
    reasons = []
    if model._supports_attention_backend:
        with _recorded_windows() as windows:
            model.set_attn_implementation(attention.NAME)
            for head in _HEADS:
                layout = Layout(is_flat=True, head=head)
                windows.clear()
                reason = _mismatch(objective, layout, expected)
                reason = reason or _unsupported_windows(objective, windows)
                if not reason:
                    return replace(layout, reason="; ".join(dict.fromkeys(reasons)))
                reasons.append(reason)
        model.set_attn_implementation(own_attention)
    else:
        reasons.append("its attention cannot be replaced")
    for head in _HEADS:
        padded = Layout(is_flat=False, head=head)
        reason = "" if head == "whole" else _mismatch(objective, padded, expected)
        if not reason:
            break
        reasons.append(reason)
    return replace(padded, reason="; ".join(dict.fromkeys(reasons)))


@contextmanager
def _recorded_windows() -> Iterator[list[int | None]]:
    """Within the block flat attention records the window of each call in the list."""
    windows: list[int | None] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        windows.append(kwargs.get("sliding_window"))
        return attention.segment_attention(*args, **kwargs)

    attention.register(recorded)
    try:
        yield windows
    finally:
        attention.register()


def _unsupported_windows(objective: Objective, windows: list[int | None]) -> str:
    """The reason why layers ignore the configured sliding windows; empty if they pass them on.

    Args:
        objective: its configuration declares a window for each layer.
        windows: the window of each call of attention, over one or several forward passes.
    """
    try:
        declared = attention.declared_windows(objective.model.config.get_text_config())
    except NotImplementedError as error:
        return str(error)
    if not any(declared) and not any(windows):
        return ""
    if windows == declared * (len(windows) // len(declared)):
        return ""
    return "its layers do not pass their sliding windows to the attention function"


def _mismatch(objective: Objective, layout: Layout, expected: torch.Tensor) -> str:
    """The reason why a layout is not exact for the model; empty if it is."""
    try:
        losses_M = _probe(objective, layout)
    except (TypeError, AttributeError, RuntimeError) as error:
        return _reason(error)
    gap = float((losses_M - expected).abs().max())
    if gap <= _PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        return ""
    return f"its losses would differ by {gap:.2g} nats on a probe"


def _reason(error: Exception) -> str:
    """The text of an error that a layout caused.

    Raises:
        Exception: the error itself, if the machine caused it (no memory, a broken GPU).
    """
    is_machine_error = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    if is_machine_error or "allocate memory" in str(error):
        raise error
    return " ".join(str(error).split())[:200] or type(error).__name__


def _try_flash(objective: Objective, layout: Layout, expected: torch.Tensor) -> Layout:
    """The flat layout, with FlashAttention if it works on this device with this model."""
    sdpa_error = float((_probe(objective, layout) - expected).abs().mean())
    flash = replace(layout, has_flash=True)
    try:
        losses_M = _probe(objective, flash, with_backward=True)
    except RuntimeError as error:  # an old GPU, or an unsupported head size
        reason = _reason(error)
    else:
        gap = float((losses_M - expected).abs().mean())
        allowed = _FLASH_FACTOR * sdpa_error + _FLASH_TOLERANCE * float(expected.abs().mean())
        if gap <= allowed:
            return flash
        reason = f"FlashAttention is off by {gap:.2g} nats on a probe, SDPA by {sdpa_error:.2g}"
    return replace(layout, reason="; ".join(filter(None, (layout.reason, reason))))


def _probe(objective: Objective, layout: Layout, *, with_backward: bool = False) -> torch.Tensor:
    """[M] losses of the probe rows in this layout, in plan order."""
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
            "expected finite losses for a probe of random tokens, found losses that are not "
            "finite: the weights of the model are damaged, or overflow the precision in which "
            "they were stored; use another copy of the model"
        )
    return losses_M


def _probe_plan(config: PretrainedConfig) -> TrainPlan:
    """Three short rows, and (if the window is short) a row longer than the window, as second step.

    Only the end of the long row has labels, so it needs few logits.
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
    """Runs the backward pass through all layers, down to one of the first weight vectors.

    A vector needs no memory worth mentioning, unlike the gradients of all weights.
    """
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    if vectors:
        torch.autograd.grad(total, vectors[:1], allow_unused=True)
