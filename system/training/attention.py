"""Attention for rows that are concatenated without padding ("flat" layout).

A forward pass holds its rows one after the other, [1, N].  Only attention must know where a row
ends; all other layers work on single tokens.  The result is the same as with a block-diagonal mask,
but without the memory of such a mask.  In half precision on CUDA, torch's variable-length
FlashAttention is used; elsewhere SDPA over buckets of rows of similar length.  Rows in a bucket are
padded at the end, where a causal query never looks, so the result is the same as without packing.

Sliding windows are supported: a query sees its own key and the window - 1 keys before it.  Other
features of a layer (sinks, caps, chunks, biases) raise an error; they are never ignored.

The function is registered with transformers under `NAME`; the positions of the rows are in the
keyword argument `segments`.

N = tokens of a pass, H = heads, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "instructmix_segments"
_MIN_FILL = 0.8
"""Smallest length of a row in a bucket, as a share of the longest row in it."""
_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "past_key_values",
        "use_cache",
        "layer_past",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_causal",
    }
)
"""Keyword arguments that do not change what attention computes in a causal training pass."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive rows of similar length."""

    start: int
    """First token of the bucket, as a position in the pass."""
    stop: int
    num_rows: int
    width: int
    gather: torch.Tensor | None
    """[num_rows * width] int64, token (counted from `start`) at each padded position; None: no
    padding."""
    scatter: torch.Tensor | None
    """[stop - start] int64, padded position of each token."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Positions of the rows of a pass."""

    starts: torch.Tensor
    """[rows + 1] int32, first token of each row and N."""
    max_length: int
    buckets: tuple[Bucket, ...]
    """Empty if FlashAttention is used, which needs no buckets."""


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The values on a device, copied without waiting for earlier work of the device."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from memory that is not pinned waits for the GPU
    return tensor.to(device, non_blocking=True)


def may_use_flash(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether FlashAttention can be tried: it supports CUDA and the two half precisions."""
    return device.type == "cuda" and compute_dtype in (torch.bfloat16, torch.float16)


def build_segments(lengths: np.ndarray, device: torch.device, *, has_flash: bool) -> Segments:
    """The positions of concatenated rows; rows should be sorted by length, longest first.

    Args:
        lengths: [rows] int64.
        device: where the tensors go.
        has_flash: whether attention uses FlashAttention, which needs no buckets.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Segments(
        to_device(starts.astype(np.int32), device),
        int(lengths.max()),
        () if has_flash else tuple(_buckets(lengths, starts, device)),
    )


def declared_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer of a decoder in its configuration; None: no window.

    Raises:
        NotImplementedError: a layer uses another kind of attention.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        if getattr(config, "attention_chunk_size", None) is not None:
            raise NotImplementedError("its layers use chunked attention")
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        return [window] * config.num_hidden_layers
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        raise NotImplementedError(f"it has layers of type {', '.join(others)}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _buckets(lengths: np.ndarray, starts: np.ndarray, device: torch.device) -> list[Bucket]:
    # A bucket grows until the next row would differ too much in length.
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
            gather = to_device((begins + np.where(valid, place, 0)).reshape(-1), device)
            scatter = to_device(np.flatnonzero(valid.reshape(-1)), device)
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
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row; the signature is transformers' attention interface.

    Args:
        module: the attention layer.
        query: [1, H, N, D].
        key: [1, H or fewer, N, D].
        value: as key.
        attention_mask: ignored; the positions of the rows are in `segments`.
        segments: positions of the rows.
        scaling: factor of the scores.
        dropout: probability with which attention weights are dropped.
        sliding_window: keys that a query sees, its own included; None: all keys before it.
        kwargs: arguments of other implementations.

    Returns:
        [1, N, H, D], and None instead of attention weights.

    Raises:
        ModelError: attention dropout is set, but FlashAttention does not support it.
        NotImplementedError: the layer needs more than causal attention in a window.
    """
    unknown = [name for name in kwargs.keys() - _HARMLESS if kwargs[name] is not None]
    if unknown:
        raise NotImplementedError(f"its attention uses {', '.join(sorted(unknown))}")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise NotImplementedError("its attention is not causal")
    if not segments.buckets:
        if dropout:
            raise ModelError(
                f"the model's configuration asks for attention dropout ({dropout:g}), which "
                "variable-length FlashAttention does not support: set attention_dropout to 0 in "
                "its config.json, or train in float32 (model.dtype)"
            )
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    parts = [
        _bucket(query, key, value, bucket, scaling, dropout, sliding_window)
        for bucket in segments.buckets
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _bucket(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bucket: Bucket,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """[tokens of the bucket, H, D]."""
    is_shared = query.shape[1] != key.shape[1]
    mask = None
    if window is not None and window < bucket.width:
        mask = _band(bucket.width, window, query.device)
        if is_shared:  # no fast GPU kernel supports a mask together with shared heads
            key, value = (
                s.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for s in (key, value)
            )
            is_shared = False

    def padded(states: torch.Tensor) -> torch.Tensor:
        states = states[0, :, bucket.start : bucket.stop]
        if bucket.gather is not None:
            states = states.index_select(1, bucket.gather)
        return states.unflatten(1, (bucket.num_rows, bucket.width)).transpose(0, 1)

    out = functional.scaled_dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=is_shared,
    )
    flat = out.transpose(1, 2).flatten(0, 1)
    return flat if bucket.scatter is None else flat.index_select(0, bucket.scatter)


def _band(width: int, window: int, device: torch.device) -> torch.Tensor:
    """[width, width] bool: whether a query (row) sees a key (column)."""
    place = torch.arange(width, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention import varlen

    # Rotary embedding returns float32 if the hidden states are float32, and autocast has no rule
    # for this operator (it has one for SDPA), so the inputs are converted here.
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
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    if out.grad_fn is not None and torch.is_deterministic_algorithms_warn_only_enabled():
        _force_deterministic(out.grad_fn)
    return out[None]


def _force_deterministic(node: torch.autograd.graph.Node) -> None:
    """Makes the backward pass of FlashAttention deterministic (fixed order of sums, but slower).

    Torch chooses the deterministic version of this operator only in strict mode, not if
    nondeterministic operators give a warning.  So strict mode is on while this operator runs.
    """

    def before(_: object) -> None:
        torch.use_deterministic_algorithms(True, warn_only=False)

    def after(*_: object) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    node.register_prehook(before)
    node.register_hook(after)


def register(implementation: Callable[..., Any] | None = None) -> None:
    """Registers the implementation (default: `segment_attention`) with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, implementation or segment_attention)
