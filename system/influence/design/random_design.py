"""Random doses for every category in every run, and the regression that takes them apart.

Leaving one category out at a time uses every run for one effect, and compares it with one reference
whose error it then shares with all others.  A weighing design (Hotelling 1944; Plackett & Burman
1946) switches about half of all doses in every run, independently: every run then speaks about
every effect.  With n runs of equal noise s^2 the variance of an effect is 4 s^2 / n, where n - 1
interventions and a reference give 2 s^2.  For fifteen categories that is an eighth.

What is measured differs a little: the effect of a dose around a mix in which the other doses are
half there, not around the whole base mix.

The regression is linear in the losses, so it is done per held-out example: its coefficients take
the place of the paired differences, and everything after it (errors over replications and examples,
gamma, shrinkage) is the same as for one-at-a-time runs.

Legend of shape suffixes: N runs of one replication, S sources.
"""

from __future__ import annotations

import numpy as np

_RIDGE = 0.1
"""Penalty where there are fewer runs than categories, per run and unit variance of a dose."""


def dose_patterns(seed: int, num_runs: int, num_sources: int) -> np.ndarray:
    """[N, S] bool: whose dose is in which run.

    Columns of a Hadamard matrix where there is one of `num_runs` and it has enough of them: every
    dose is then in exactly half of the runs, and any two doses are uncorrelated.  Else each
    column is a random half.
    """
    rng = np.random.default_rng(seed)
    hadamard = _hadamard(num_runs)
    if hadamard is not None and num_runs > num_sources:
        columns = 1 + rng.permutation(num_runs - 1)[:num_sources]
        sign_S = rng.choice([-1, 1], size=num_sources)
        return (hadamard[:, columns] * sign_S > 0)[rng.permutation(num_runs)]
    half = np.arange(num_runs) % 2 == 0
    return np.stack([rng.permutation(half) for _ in range(num_sources)], axis=1)


def enough_runs(num_sources: int) -> int:
    """The smallest number of runs with a Hadamard matrix that fits the categories."""
    runs = 4 * -(-(num_sources + 1) // 4)
    while _hadamard(runs) is None:
        runs += 4
    return runs


def design_runs(num_sources: int, directions: tuple[str, ...]) -> list[tuple[str, int]]:
    """Kind and pattern of every run of a replication (see `system.influence.design.estimators`)."""
    return [
        (f"mix-{direction}", run)
        for direction in directions
        for run in range(enough_runs(num_sources))
    ]


def effect_weights(pattern_NS: np.ndarray) -> np.ndarray:
    """[S, N] weights W with which the runs' losses give the change of loss that a dose makes.

    Least squares with an intercept; ridge where there are not more runs than doses, whose
    estimates are pulled towards zero and to be read as such.
    """
    centred_NS = pattern_NS - pattern_NS.mean(axis=0)
    gram_SS = centred_NS.T @ centred_NS
    num_runs, num_sources = pattern_NS.shape
    if np.linalg.matrix_rank(centred_NS) < num_sources:
        gram_SS = gram_SS + _RIDGE * num_runs * 0.25 * np.eye(num_sources)
    return np.linalg.solve(gram_SS, centred_NS.T)


def _hadamard(size: int) -> np.ndarray | None:
    """A matrix of +-1 with orthogonal rows, first column all ones; None where not built here.

    Sylvester's doubling and Paley's first construction (q + 1 for a prime q = 3 mod 4).
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
