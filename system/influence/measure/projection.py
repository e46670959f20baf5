"""Seeded random projection whose inner products are unbiased, in time linear in the input.

    (S x)[b] = sum over the positions p with bucket(p) = b of sign(p) x[p]

Every position falls into a random one of K buckets, with a random sign (count sketch: Charikar,
Chen & Farach-Colton 2002; for inner products Weinberger et al. 2009, arXiv 0902.2206, section 2).
E <Sx, Sy> = <x, y>, with variance at most (|x|^2 |y|^2 + <x, y>^2) / K, as for a dense Rademacher
matrix.  A dense matrix costs P K multiplications per vector, more than the gradient itself.  This
projection costs P additions for any K, so K can be large.  Memory: 5 bytes per position.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Positions that are projected at once; limits the memory of the signed copy."""


class Projection:
    """Projects vectors of length `size` to `dimension`; shorter vectors stay as they are.

    Args:
        size: P, length of a vector.
        dimension: K, at least 1.
        seed: of buckets and signs; they do not depend on the device.
        device: device of the vectors.
    """

    def __init__(self, size: int, dimension: int, seed: int, device: torch.device) -> None:
        self.is_exact = size <= dimension
        self.dimension = min(size, dimension)
        if self.is_exact:
            return
        generator = torch.Generator().manual_seed(seed)
        bucket = torch.empty(size, dtype=torch.int32)
        sign = torch.empty(size, dtype=torch.int8)
        for start in range(0, size, _BLOCK):  # random numbers come as int64
            part = slice(start, min(start + _BLOCK, size))
            count = part.stop - part.start
            bucket[part] = torch.randint(dimension, (count,), generator=generator).int()
            sign[part] = torch.randint(2, (count,), generator=generator).to(torch.int8) * 2 - 1
        self._bucket, self._sign = bucket.to(device), sign.to(device)

    def __call__(self, vector: Tensor) -> Tensor:
        """[P] float32 -> [dimension] float32."""
        if self.is_exact:
            return vector
        projected = torch.zeros(self.dimension, dtype=vector.dtype, device=vector.device)
        for start in range(0, vector.numel(), _BLOCK):
            part = slice(start, start + _BLOCK)
            projected.index_add_(0, self._bucket[part], vector[part] * self._sign[part])
        return projected
