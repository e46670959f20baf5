"""The training objective of one causal language model: token losses at label places only.

What a model does beyond the plain case (its own masks, recurrent layers, scaled logits) cannot be
told from its class, so it is asked: two short rows go through it in the fast layout and through
transformers' own forward; only where the losses agree is the fast way taken.  Both ways are exact,
they differ in speed and memory.

M = labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

from system import schema
from system.errors import ModelError
from system.training import attention
from system.training.loss import head_loss
from system.training.microbatch import MicroBatch, build_microbatch
from system.training.plan import build_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_LENGTHS = (13, 9, 12)
_PROBE_TOLERANCE = 1e-4
"""Nats per token, float32; contamination between rows is orders of magnitude larger."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which of the fast ways are exact for a model."""

    is_flat: bool
    """Rows may lie end to end."""
    has_plain_head: bool
    """Logits are the output embedding times the last hidden state."""


class Objective(torch.nn.Module):
    """Token losses of a micro-batch.  A module, so that sharded parameters gather around it."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.layout = Layout(is_flat=False, has_plain_head=False)

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the batch's token losses in nats, differentiable; [M] float32 losses, detached."""
        with self._precision(batch.input_ids.device):
            if self.layout.has_plain_head:
                head: Any = self.model.get_output_embeddings()
                hidden = self._hidden(batch)
                states = hidden.flatten(0, 1).index_select(0, batch.label_places)
                return head_loss(
                    states,
                    head.weight,
                    getattr(head, "bias", None),
                    batch.targets,
                    self.compute_dtype,
                )
            logits = self._logits(batch).flatten(0, 1).index_select(0, batch.label_places)
        nll_M = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        return nll_M.sum(), nll_M.detach()

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if batch.segments is None:
            inputs["attention_mask"] = batch.attention_mask
        else:
            inputs["segments"] = batch.segments
        return inputs

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        return self.model.get_decoder()(**self._inputs(batch)).last_hidden_state

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        return self.model(**self._inputs(batch)).logits


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
    """The fastest layout that equals transformers' own forward, found by trying.

    Leaves the model with the attention implementation that the layout needs.
    """
    model = objective.model
    was_training = model.training
    dtype, objective.compute_dtype = objective.compute_dtype, torch.float32
    model.eval()
    own_attention = model.config._attn_implementation or "eager"
    try:
        expected = _probe(objective, Layout(is_flat=False, has_plain_head=False))
        if model._supports_attention_backend:
            attention.register()
            model.set_attn_implementation(attention.NAME)
            for layout in (Layout(True, True), Layout(True, False)):
                if _agrees(objective, layout, expected):
                    return layout
            model.set_attn_implementation(own_attention)
        padded = Layout(is_flat=False, has_plain_head=True)
        if _agrees(objective, padded, expected):
            return padded
        return Layout(is_flat=False, has_plain_head=False)
    finally:
        objective.compute_dtype = dtype
        model.train(was_training)


def probe_losses(objective: Objective) -> torch.Tensor:
    """[M] losses of a few fixed rows in the objective's own layout, float32, without dropout."""
    was_training = objective.model.training
    dtype, objective.compute_dtype = objective.compute_dtype, torch.float32
    objective.model.eval()
    try:
        return _probe(objective, objective.layout)
    finally:
        objective.compute_dtype = dtype
        objective.model.train(was_training)


def _agrees(objective: Objective, layout: Layout, expected: torch.Tensor) -> bool:
    try:
        found = _probe(objective, layout)
    except (TypeError, AttributeError, RuntimeError):
        return False  # the model does not take these inputs, so this layout is not for it
    return bool((found - expected).abs().max() <= _PROBE_TOLERANCE)


def _probe(objective: Objective, layout: Layout) -> torch.Tensor:
    """Losses of a few fixed rows, in plan order."""
    model = objective.model
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, vocabulary, size=n).tolist() for n in _PROBE_LENGTHS]
    tokens = pa.table(
        {
            "id": [str(k) for k in range(len(rows))],
            "category": ["probe"] * len(rows),
            "input_ids": rows,
            "response_mask": [[False] + [True] * (len(row) - 1) for row in rows],
        }
    ).cast(schema.TOKENS)
    plan = build_plan(
        tokens, ["probe"] * len(rows), batch_size=len(rows), max_length=64, packing=True
    )
    batch = build_microbatch(
        plan,
        np.arange(len(rows)),
        is_flat=layout.is_flat,
        device=device,
        compute_dtype=torch.float32,
    )
    before, objective.layout = objective.layout, layout
    try:
        with torch.no_grad():
            _, nll_M = objective(batch)
    finally:
        objective.layout = before
    if not bool(torch.isfinite(nll_M).all()):
        raise ModelError(
            "the model gives losses that are not finite for a probe of random tokens: its weights "
            "are damaged, or were stored in a precision that they overflow"
        )
    return nll_M
