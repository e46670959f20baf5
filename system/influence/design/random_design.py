"""Estimator `random-design`: random doses of all categories in every run, and the regression.

If each run changes one category, it informs about one effect only, and its error shares the one
reference run with all others.  A weighing design (Hotelling 1944; Plackett & Burman 1946) switches
about half of all doses in every run, so every run informs about every effect.  With n runs of equal
noise variance s^2, the variance of an effect is 4 s^2 / n; n - 1 single interventions and a
reference give 2 s^2.  For fifteen categories that is an eighth.

The measured quantity differs slightly: it is the effect of a dose at a mix in which half of the
other doses are active, not at the whole base mix.

The regression is linear in the losses, so it is solved per held-out example.  Its coefficients
replace the paired differences; all later steps (errors over replications and examples, gamma,
shrinkage) are the same as for single interventions.

Legend of shape suffixes: N runs of one replication, S sources.
"""

from __future__ import annotations

import numpy as np

_RIDGE = 0.1
"""Ridge penalty if there are fewer runs than categories, per run and unit variance of a dose."""


def dose_patterns(seed: int, num_runs: int, num_sources: int) -> np.ndarray:
    """[N, S] bool: whether the dose of source S is active in run N.

    The columns come from a Hadamard matrix of size `num_runs` if one is known and has enough
    columns: every dose is then active in exactly half of the runs, and any two doses are
    uncorrelated.  Otherwise each column is a random half.
    """
    rng = np.random.default_rng(seed)
    hadamard = _hadamard(num_runs)
    if hadamard is not None and num_runs > num_sources:
        columns = 1 + rng.permutation(num_runs - 1)[:num_sources]
        sign_S = rng.choice([-1, 1], size=num_sources)
        return (hadamard[:, columns] * sign_S > 0)[rng.permutation(num_runs)]
    half = np.arange(num_runs) % 2 == 0
    return np.stack([rng.permutation(half) for _ in range(num_sources)], axis=1)


def runs_needed(num_sources: int) -> int:
    """The smallest number of runs for which a Hadamard matrix has enough columns."""
    runs = 4 * -(-(num_sources + 1) // 4)
    while _hadamard(runs) is None:
        runs += 4
    return runs


def design_runs(num_sources: int, directions: tuple[str, ...]) -> list[tuple[str, int]]:
    """Kind and pattern of every run of a replication (see `system.influence.design.estimators`)."""
    return [
        (f"mix-{direction}", run)
        for direction in directions
        for run in range(runs_needed(num_sources))
    ]


def effect_weights(pattern_NS: np.ndarray) -> np.ndarray:
    """[S, N] weights: weights @ losses of the runs = change of the loss that each dose causes.

    Least squares with an intercept.  If the patterns do not determine all effects, ridge
    regression, whose estimates are biased towards zero.
    """
    centred_NS = pattern_NS - pattern_NS.mean(axis=0)
    gram_SS = centred_NS.T @ centred_NS
    num_runs, num_sources = pattern_NS.shape
    if np.linalg.matrix_rank(centred_NS) < num_sources:
        gram_SS = gram_SS + _RIDGE * num_runs * 0.25 * np.eye(num_sources)
    return np.linalg.solve(gram_SS, centred_NS.T)


def _hadamard(size: int) -> np.ndarray | None:
    """A matrix of +-1 with orthogonal rows and a first column of ones; None if none is known here.

    Sylvester's doubling and Paley's first construction (size q + 1 for a prime q = 3 mod 4).
    """
    if size in (1, 2):
        return np.array([[1]]) if size == 1 else np.array([[1, 1], [1, -1]])
    if size % 4:
        return None
    if _is_prime(size - 1):
        return _paley(size - 1)
    smaller = _hadamard(size // 2)
    return None if smaller is None else np.kron(smaller, np.array([[1, 1], [1, -1]]))


def _paley(prime: int) -> np.ndarray:
    squares = {(value * value) % prime for value in range(1, prime)}
    difference = (np.arange(prime)[:, None] - np.arange(prime)[None, :]) % prime
    character = np.where(difference == 0, 0, np.where(np.isin(difference, list(squares)), 1, -1))
    matrix = np.ones((prime + 1, prime + 1), dtype=int)
    matrix[1:, 1:] = character - np.eye(prime, dtype=int)
    # Every row but the first sums to zero with its leading one; so does every column.
    return matrix * matrix[:, :1]


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % factor for factor in range(2, int(value**0.5) + 1))
