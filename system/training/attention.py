"""Attention inside rows that lie end to end: block-diagonal, exact, without a mask of its size.

A forward pass holds its rows one behind the other, [1, N], with no padding; every layer but
attention is blind to that.  Attention runs row by row: in half precision on CUDA with torch's
variable-length FlashAttention, elsewhere with SDPA over buckets of rows of similar length.  Rows in
a bucket are padded at their end, which a causal query never sees, so the result is as unpacked.

Registered with transformers under `NAME`; the layout travels in the keyword `segments`.

N = tokens of a pass, H = heads, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from system.errors import ModelError

NAME = "instructmix_segments"
_MIN_FILL = 0.8
"""A row joins a bucket when it is at least this share of the bucket's longest."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring rows of similar length."""

    start: int
    """First token of the bucket in the pass."""
    stop: int
    num_rows: int
    width: int
    gather: torch.Tensor | None
    """[num_rows * width] int64, token (from `start`) under each padded place; None: no padding."""
    scatter: torch.Tensor | None
    """[stop - start] int64, padded place of each token."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the rows of a pass lie."""

    starts: torch.Tensor
    """[rows + 1] int32, first token of each row and N."""
    max_length: int
    buckets: tuple[Bucket, ...]
    """Empty: FlashAttention needs none."""


def may_use_flash(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether FlashAttention can be tried: it knows CUDA and the two half precisions."""
    return device.type == "cuda" and compute_dtype in (torch.bfloat16, torch.float16)


def build_segments(lengths: np.ndarray, device: torch.device, *, has_flash: bool) -> Segments:
    """The layout of rows that lie end to end; rows should come longest first.

    Args:
        lengths: [rows] int64.
        device: where the tensors go.
        has_flash: attention is FlashAttention, which needs no buckets.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Segments(
        torch.from_numpy(starts.astype(np.int32)).to(device),
        int(lengths.max()),
        () if has_flash else tuple(_buckets(lengths, starts, device)),
    )


def _buckets(lengths: np.ndarray, starts: np.ndarray, device: torch.device) -> list[Bucket]:
    buckets = []
    first = 0
    for row in range(1, len(lengths) + 1):
        if row < len(lengths):
            longest = max(lengths[first : row + 1])
            if min(lengths[first : row + 1]) >= _MIN_FILL * longest:
                continue
        part = lengths[first:row]
        width = int(part.max())
        gather = scatter = None
        if part.min() < width:
            place = np.arange(width)[None, :]
            begins = (starts[first:row] - starts[first])[:, None]
            valid = place < part[:, None]
            gather = torch.from_numpy((begins + np.where(valid, place, 0)).reshape(-1)).to(device)
            scatter = torch.from_numpy(np.flatnonzero(valid.reshape(-1))).to(device)
        start, stop = int(starts[first]), int(starts[row])
        buckets.append(Bucket(start, stop, row - first, width, gather, scatter))
        first = row
    return buckets


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment, in transformers' attention interface.

    Args:
        module: the attention layer.
        query: [1, H, N, D].
        key: [1, H or fewer, N, D].
        value: as key.
        attention_mask: ignored; the layout is in `segments`.
        segments: where the rows lie.
        scaling: factor of the scores.
        dropout: probability with which attention weights are dropped.
        kwargs: what other implementations need.

    Returns:
        [1, N, H, D] and no weights.

    Raises:
        ModelError: dropout where FlashAttention is used, which has none.
    """
    if not segments.buckets:
        if dropout:
            raise ModelError(
                f"the model's configuration asks for attention dropout ({dropout:g}), which "
                "variable-length FlashAttention does not have: set attention_dropout to 0 in its "
                "config.json, or train in float32 (model.dtype)"
            )
        return _varlen(query, key, value, segments, scaling), None
    parts = [_bucket(query, key, value, bucket, scaling, dropout) for bucket in segments.buckets]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _bucket(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bucket: Bucket,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """[tokens of the bucket, H, D]."""

    def padded(states: torch.Tensor) -> torch.Tensor:
        states = states[0, :, bucket.start : bucket.stop]
        if bucket.gather is not None:
            states = states.index_select(1, bucket.gather)
        return states.unflatten(1, (bucket.num_rows, bucket.width)).transpose(0, 1)

    out = functional.scaled_dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        is_causal=True,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat = out.transpose(1, 2).flatten(0, 1)
    return flat if bucket.scatter is None else flat.index_select(0, bucket.scatter)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention import varlen

    # Rotary embedding gives float32 where the hidden states are float32, and no autocast rule
    # lowers the inputs of this operator as one does for SDPA.
    device = value.device.type
    lowers = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lowers else value.dtype
    query, key, value = (s[0].transpose(0, 1).to(dtype) for s in (query, key, value))
    out = varlen.varlen_attn(
        query,
        key,
        value,
        segments.starts,
        segments.starts,
        segments.max_length,
        segments.max_length,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def register(implementation: Callable[..., Any] | None = None) -> None:
    """Makes the implementation (by default `segment_attention`) known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, implementation or segment_attention)
