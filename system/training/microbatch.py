"""Rows of a plan as the tensors of one forward pass.

Two layouts give the same losses.  `flat` concatenates the rows without padding: positions start at
0 in each row, and attention stays within a row.  `padded` is the usual rectangle; it is needed for
models with layers other than attention that mix tokens, such as recurrent ones.

B = rows of a pass, L = length of the longest, N = number of tokens, M = labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from system.training.attention import Segments, build_segments, to_device
from system.training.plan import TrainPlan

Head = Literal["blocks", "labels", "whole"]
_HEADS: dict[Head, str] = {
    "blocks": "head in blocks",
    "labels": "the model's own head at labels",
    "whole": "the model's own head everywhere",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a training arranges its forward passes; `layout.py` checked that it is exact."""

    is_flat: bool
    """Whether rows are concatenated without padding."""
    head: Head
    """How the language-model head is applied.  `blocks`: by our own code (`loss.py`), to one block
    of labels at a time.  `labels`: by the model, to all labels at once.  `whole`: by the model, to
    every token."""
    has_flash: bool = False
    """Whether flat rows use FlashAttention; otherwise SDPA over buckets."""
    reason: str = field(default="", compare=False)
    """Why a faster layout is not used; empty if this is the fastest."""

    def __str__(self) -> str:
        """The layout in words, for logs."""
        attends = "FlashAttention" if self.has_flash else "SDPA over buckets"
        parts = [
            f"flat rows, {attends}" if self.is_flat else "padded rows, transformers' attention",
            _HEADS[self.head],
        ]
        return ", ".join(parts) + (f" (because {self.reason})" if self.reason else "")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass."""

    rows: np.ndarray
    """[B] plan rows, longest first."""
    input_ids: torch.Tensor
    """[1, N] or [B, L] int64."""
    position_ids: torch.Tensor
    """Same shape as input_ids."""
    attention_mask: torch.Tensor | None
    """[B, L] int64, padded layout only."""
    segments: Segments | None
    """Flat layout only."""
    label_positions: torch.Tensor
    """[M] int64, position in the flattened hidden states before each label."""
    targets: torch.Tensor
    """[M] int64."""
    label_rows: np.ndarray
    """[M] int64, plan row of each label."""


def build_microbatch(
    plan: TrainPlan,
    rows: np.ndarray,
    *,
    layout: Layout,
    device: torch.device,
) -> MicroBatch:
    """The tensors of a forward pass over rows of a plan.

    Args:
        plan: the plan.
        rows: [B] plan rows.
        layout: flat or padded, and the kernel of attention.
        device: where the tensors go.
    """
    lengths = plan.lengths(rows)
    order = np.argsort(-lengths, kind="stable")
    rows, lengths = rows[order], lengths[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    source = np.repeat(plan.offsets[rows], lengths) + within
    ids = plan.input_ids[source].astype(np.int64)
    # The first token of a row has no token before it that could predict it.
    is_label = plan.response_mask[source] & (within > 0)
    labels = np.flatnonzero(is_label)
    owner = np.repeat(np.arange(len(rows)), lengths)
    width = int(lengths[0])
    if layout.is_flat:
        position = np.arange(len(ids))
        shape = (1, len(ids))
    else:
        position = owner * width + within
        shape = (len(rows), width)
    size = shape[0] * shape[1]

    def spread(values: np.ndarray, fill: int) -> torch.Tensor:
        full = np.full(size, fill, dtype=np.int64)
        full[position] = values
        return to_device(full.reshape(shape), device)

    return MicroBatch(
        rows=rows,
        input_ids=spread(ids, 0),
        position_ids=spread(within, 0),
        attention_mask=None if layout.is_flat else spread(np.ones_like(ids), 0),
        segments=(
            build_segments(lengths, device, has_flash=layout.has_flash) if layout.is_flat else None
        ),
        label_positions=to_device(position[labels] - 1, device),
        targets=to_device(ids[labels], device),
        label_rows=rows[owner[labels]],
    )
