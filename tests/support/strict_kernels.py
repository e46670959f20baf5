"""An attention kernel that refuses what it was not promised."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional


def strict_varlen(
    query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa
):
    """What torch's operator computes, row by row, with its demands on the inputs."""
    assert query.dim() == 3 and torch.equal(starts, starts_k)
    for states in (query, key, value):
        if states.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"FlashAttention only support fp16 and bf16, not {states.dtype}")
    parts = []
    for start, stop in itertools.pairwise(starts):
        rows = [s[start:stop].transpose(0, 1)[None] for s in (query, key, value)]
        places = torch.arange(int(stop - start))
        distance = places[:, None] - places[None, :]
        mask = distance >= -window_size[1]
        if window_size[0] >= 0:
            mask &= distance <= window_size[0]
        out = functional.scaled_dot_product_attention(
            *rows, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
