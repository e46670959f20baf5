"""Differences between arms, with errors that hold for other trainings and other examples.

Performance y[k, s, i] of arm k, training seed s, held-out example i (minus a loss, or 1 / 0 for a
right answer), the same seeds and examples for all arms.  A contrast is d[s, i] = sum_k a_k y[k, s,
i].  Both seeds and examples are samples, crossed with each other:

    d[s, i] = mu + seed[s] + example[i] + rest[s, i]
    Var(mean d) = (MS_seed + MS_example - MS_rest) / (S n)        (two-way random effects, crossed)

The last term takes out what the first two both contain.  Over categories c with weights w_c the
seeds are common and the examples are not, so the seed part is the variance of the weighted means of
the seeds, with S - 1 degrees of freedom, and the example parts add up as w_c^2.  The seed part is
that of the contrast alone.  Pooling it over all arms would give more degrees of freedom, and did,
but arms are not equally noisy against each other: two shuffled arms share most of their order, so
their trainings differ less by chance than either differs from a curriculum, and pooled intervals
called mere orders better or worse.

The interval adds the squares of the two parts' own Student intervals, that of the examples with
Satterthwaite's degrees of freedom; it covers at least what it says whatever the two variances are
(Banerjee 1960, Sankhya 22), where one Welch-Satterthwaite interval for the sum covers too little
with so few seeds.  With one seed only the examples' part can be had; it says so.

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
"""Arm -> category -> [S, n] float64, larger is better; arms trained once have S = 1."""


_ROUNDING = 1e-12
"""Differences this much smaller than the values themselves are rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A weighted difference between arms."""

    value: float
    se: float
    se_seeds: float | None
    """Part of `se` that further seeds would make smaller; None: one seed, not measured."""
    se_heldout: float
    """Part of `se` that further held-out examples would make smaller."""
    low: float
    high: float
    verdict: Verdict
    """`tie` where the interval holds zero."""
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
        weights: category -> w_c; categories left out do not count.
        confidence: level of the interval.
        is_binary: values are 0 or 1.  A few answers that all agree then still have an error: each
            category's variance is that of a table of paired answers with half a case added to
            every cell when none differ, 1 / (n + 2)^2.  Source: Agresti and Min 2005, Statistics
            in Medicine 24 (5).

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

    Where the examples differ less than the noise of single examples lets expect, the unbiased
    estimate is near zero or below it by chance; the noise itself is then the least that counts.
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
