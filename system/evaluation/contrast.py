"""Differences between arms, with errors that include the variation of trainings and examples.

Performance y[k, s, i] of arm k, training seed s, held-out example i (minus a loss, or 1 / 0 for a
right answer), the same seeds and examples for all arms.  A contrast is d[s, i] = sum_k a_k y[k, s,
i].  Both seeds and examples are samples, crossed with each other:

    d[s, i] = mu + seed[s] + example[i] + rest[s, i]
    Var(mean d) = (MS_seed + MS_example - MS_rest) / (S n)        (two-way random effects, crossed)

The last term removes what the first two both contain.  Several categories c with weights w_c share
their seeds, but not their examples.  So the seed part is the variance of the weighted means of the
seeds, with S - 1 degrees of freedom, and the example parts are added with factors w_c^2.

The seed part is estimated from this contrast alone.  Pooling it over all arms would give more
degrees of freedom, but arms are not equally noisy: two shuffled arms share most of their order, so
the chance difference between them is smaller than that to a curriculum.  Pooled intervals declared
mere differences of order as better or worse.

The squared half-width of the interval is the sum of the squared half-widths of the Student
intervals of both parts; the example part uses Satterthwaite's degrees of freedom.  Its coverage is
at least the nominal one for any two variances (Banerjee 1960, Sankhya 22).  A single
Welch-Satterthwaite interval for the sum would cover too little with so few seeds.  With one seed,
only the example part is known, and `se_seeds` is None.

S = seeds, n = examples of a category.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

Verdict = Literal["better", "worse", "tie"]
Performance = Mapping[str, Mapping[str, np.ndarray]]
"""Arm -> category -> [S, n] float64, larger is better; arms that were trained once have S = 1."""


_ROUNDING = 1e-12
"""A difference that is smaller than this share of the values is rounding error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A weighted difference between arms."""

    value: float
    se: float
    se_seeds: float | None
    """Part of `se` that comes from training; more seeds make it smaller.  None: one seed."""
    se_heldout: float
    """Part of `se` that comes from the held-out examples; more examples make it smaller."""
    low: float
    high: float
    verdict: Verdict
    """`tie` if the interval contains zero."""
    seeds: int
    rows: int
    """Held-out examples."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "value": self.value,
            "se": self.se,
            "se_seeds": self.se_seeds,
            "se_heldout": self.se_heldout,
            "low": self.low,
            "high": self.high,
            "verdict": self.verdict,
            "seeds": self.seeds,
            "rows": self.rows,
        }


def contrast(
    performance: Performance,
    coefficients: Mapping[str, float],
    weights: Mapping[str, float],
    confidence: float,
    *,
    is_binary: bool = False,
) -> Contrast:
    """Estimate, error and interval of a weighted difference.

    Args:
        performance: all arms.
        coefficients: arm -> a_k.
        weights: category -> w_c; categories without a weight do not count.
        confidence: level of the interval.
        is_binary: whether values are 0 or 1.  Then a few answers that all agree still have an
            error: the variance of a category without differences is that of a table of paired
            answers with half a case added to every cell, 1 / (n + 2)^2.  Source: Agresti and Min
            2005, Statistics in Medicine 24 (5).

    Raises:
        ValueError: trained arms differ in their number of seeds.
    """
    lengths = {arm: len(next(iter(performance[arm].values()))) for arm in coefficients}
    seeds = max(lengths.values())
    if any(length not in (1, seeds) for length in lengths.values()):
        raise ValueError(f"arms have different numbers of seeds: {lengths}")
    difference = {
        category: sum(
            (a * performance[arm][category] for arm, a in coefficients.items()),
            start=np.zeros((seeds, performance[next(iter(coefficients))][category].shape[1])),
        )
        for category in weights
    }
    value = sum(w * float(difference[c].mean()) for c, w in weights.items())
    seed_variance = _seed_variance(difference, weights, seeds)
    heldout = _heldout_parts(difference, weights, seeds)
    if is_binary:
        sizes = {c: difference[c].shape[1] for c in weights}
        heldout += [((w / (sizes[c] + 2)) ** 2, sizes[c] - 1.0) for c, w in weights.items()]
    heldout_variance = max(0.0, sum(part for part, _ in heldout))
    largest = max(float(np.abs(performance[arm][c]).max()) for arm in lengths for c in weights)
    se = math.sqrt(seed_variance + heldout_variance)
    se = se if se > _ROUNDING * largest else 0.0
    half = 0.0
    if se > 0:
        spread = sum(part**2 / df for part, df in heldout)
        half = math.sqrt(
            seed_variance * _quantile(confidence, seeds - 1.0) ** 2
            + heldout_variance * _quantile(confidence, heldout_variance**2 / (spread or 1.0)) ** 2
        )
    value = value if se > 0 or abs(value) > _ROUNDING * largest else 0.0
    low, high = value - half, value + half
    return Contrast(
        value=value,
        se=se,
        se_seeds=None if seeds == 1 else math.sqrt(seed_variance),
        se_heldout=math.sqrt(heldout_variance),
        low=low,
        high=high,
        verdict="better" if low > 0 else "worse" if high < 0 else "tie",
        seeds=seeds,
        rows=sum(difference[c].shape[1] for c in weights),
    )


def _heldout_parts(
    difference: Mapping[str, np.ndarray], weights: Mapping[str, float], seeds: int
) -> list[tuple[float, float]]:
    """Signed variance parts of the examples with their degrees of freedom.

    If examples differ less than expected from the noise of single examples, the unbiased estimate
    can be near zero or negative by chance.  Then the noise itself is used as a lower bound.
    """
    parts = []
    for category, w in weights.items():
        values = difference[category]
        rows = values.shape[1]
        if rows < 2:
            raise ValueError(f"category {category!r} has {rows} held-out examples; 2 are needed")
        of_example = values.mean(axis=0)
        between = float(of_example.var(ddof=1)) / rows
        if seeds == 1:
            parts.append((w**2 * between, rows - 1.0))
            continue
        rest = values - of_example - values.mean(axis=1, keepdims=True) + values.mean()
        degrees = (seeds - 1.0) * (rows - 1.0)
        noise = float((rest**2).sum()) / degrees / (seeds * rows)
        if between < 2 * noise:
            parts.append((w**2 * noise, degrees))
        else:
            parts += [(w**2 * between, rows - 1.0), (-(w**2) * noise, degrees)]
    return parts


def _quantile(confidence: float, degrees: float) -> float:
    """Two-sided quantile of Student's t; 0 where there are no degrees of freedom to use."""
    return float(stats.t.ppf(0.5 + confidence / 2, degrees)) if degrees > 0 else 0.0


def _seed_variance(
    difference: Mapping[str, np.ndarray], weights: Mapping[str, float], seeds: int
) -> float:
    """Variance of the contrast's mean that comes from training, with S - 1 degrees of freedom."""
    if seeds == 1:
        return 0.0
    mean_S = sum((w * difference[c].mean(axis=1) for c, w in weights.items()), np.zeros(seeds))
    return float(mean_S.var(ddof=1)) / seeds
