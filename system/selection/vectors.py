"""Vectors with 8 bits a component, and their exact cosines.

A vector is stored as integers from -127 to 127; its length is dropped, since no cosine depends on
it.  Dot products of such vectors are whole numbers below 2^24 (or 2^53, in float64, beyond 1,040
components), so a matrix product computes them exactly: no cosine depends on batches, threads or
the order of additions.

D = components, N = rows.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_EXACT_IN_FLOAT32 = 2**24 // 127**2
"""Largest number of components at which float32 holds a dot product exactly."""


def quantise(vectors_ND: np.ndarray) -> np.ndarray:
    """[N, D] int8: each row scaled so that its largest component is 127; a zero row stays zero."""
    largest = np.abs(vectors_ND).max(axis=1, keepdims=True, initial=0.0)
    scale = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(vectors_ND * scale).astype(np.int8)


def spread(vectors_ND: np.ndarray) -> np.ndarray:
    """[N, D'] float64: the rows, rotated so that large components spread over all of them.

    Random signs from a fixed seed, then a Walsh-Hadamard transform over the next power of two; dot
    products stay the same up to the factor D'.  Hidden states have a few components that are far
    larger than the others; without the rotation these would use up the 8 bits.
    """
    rows, num_components = vectors_ND.shape
    size = 1 << max(0, int(num_components - 1).bit_length())
    signs = np.random.Generator(np.random.PCG64(0)).integers(0, 2, num_components) * 2.0 - 1.0
    rotated = np.zeros((rows, size))
    rotated[:, :num_components] = vectors_ND * signs
    step = 1
    while step < size:
        pairs = rotated.reshape(rows, size // (2 * step), 2, step)
        rotated = np.stack(
            [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2
        ).reshape(rows, size)
        step *= 2
    return rotated


def _squares(vectors_ND: np.ndarray) -> np.ndarray:
    """[N] float64: squared Euclidean lengths of int8 rows."""
    wide = vectors_ND.astype(np.int64)
    return np.einsum("nd,nd->n", wide, wide).astype(np.float64)


def cosines(left_AD: np.ndarray, right_BD: np.ndarray) -> np.ndarray:
    """[A, B] float64: cosines of int8 rows, never above 1; 0 with a zero row."""
    kind = np.float32 if left_AD.shape[1] <= _EXACT_IN_FLOAT32 else np.float64
    dots = (left_AD.astype(kind) @ right_BD.astype(kind).T).astype(np.float64)
    # The root of the product, not the product of roots: a row is at exactly 1 to itself.
    scale = np.sqrt(np.outer(_squares(left_AD), _squares(right_BD)))
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)


def pack(vectors_ND: np.ndarray, has_vector: np.ndarray) -> pa.Table:
    """The table of a shard's vectors: one vector a row, null if the row has none."""
    values = pa.array(np.ascontiguousarray(vectors_ND).reshape(-1), pa.int8())
    mask = pa.array(~has_vector)
    column = pa.FixedSizeListArray.from_arrays(values, vectors_ND.shape[1], mask=mask)
    return pa.table({"vector": column})


def unpack(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] int8 vectors, zero if a row has none, and [N] bool which rows have one."""
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    size = column.type.list_size
    has_vector = ~np.asarray(column.is_null())
    # `flatten` would leave nulls out; the values of all rows lie one after the other.
    values = np.asarray(column.values)[column.offset * size : (column.offset + len(column)) * size]
    vectors = values.reshape(len(column), size)
    return np.where(has_vector[:, None], vectors, 0).astype(np.int8), has_vector
