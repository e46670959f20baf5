"""Differences between arms, with errors that hold for other trainings and other examples.

Performance y[k, s, i] of arm k, training seed s, held-out example i (minus a loss, or 1 / 0 for a
right answer), the same seeds and examples for all arms.  A contrast is d[s, i] = sum_k a_k y[k, s,
i].  Both seeds and examples are samples, crossed with each other:

    d[s, i] = mu + seed[s] + example[i] + rest[s, i]
    Var(mean d) = (MS_seed + MS_example - MS_rest) / (S n)        (two-way random effects, crossed)

The last term takes out what the first two both contain.  Over categories c with weights w_c the
seeds are common and the examples are not, so the seed part comes from the weighted means of each
seed and the example parts add up as w_c^2.  With the few seeds people can afford, MS_seed from one
contrast has S - 1 degrees of freedom; it is therefore pooled over all arms, whose trainings are
taken to be equally noisy: the residual of the arm x seed table (arm and seed means taken out), with
(K - 1)(S - 1) degrees of freedom.  Contrasts whose coefficients do not sum to zero over the trained
arms (one arm against the untrained base) keep the common effect of the seed and take the mean
variance within arms, with S - 1.  Intervals are Student's with Welch-Satterthwaite degrees of
freedom (Satterthwaite 1946).  With one seed only the examples' part can be had; it says so.

S = seeds, n = examples of a category, K = arms.
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
    degrees: float
    """Welch-Satterthwaite degrees of freedom."""
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
            "degrees": self.degrees,
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
        performance: all arms, also those that the contrast leaves out: they tell how much
            trainings differ by chance.
        coefficients: arm -> a_k.
        weights: category -> w_c; categories left out do not count.
        confidence: level of the interval.
        is_binary: values are 0 or 1.  A few answers that all agree then still have an error: each
            category's variance is that of a table of paired answers with half a case added to
            every cell when none differ, 1 / (n + 2)^2.  Source: Agresti and Min 2005, Statistics
            in Medicine 24 (5).

    Raises:
        ValueError: trained arms differ in their number of seeds, or a contrast over several of
            them sums to neither zero nor a single arm.
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
    parts: list[tuple[float, float]] = []
    seed_variance, seed_degrees = _seed_variance(performance, coefficients, weights, seeds)
    if seed_variance:
        parts.append((seed_variance, seed_degrees))
    heldout = _heldout_parts(difference, weights, seeds)
    if is_binary:
        sizes = {c: difference[c].shape[1] for c in weights}
        heldout += [((w / (sizes[c] + 2)) ** 2, sizes[c] - 1.0) for c, w in weights.items()]
    heldout_variance = sum(part for part, _ in heldout)
    if heldout_variance > 0:
        parts += heldout
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / df for part, df in parts)
    degrees = variance**2 / spread if spread > 0 else math.inf
    largest = max(float(np.abs(performance[arm][c]).max()) for arm in lengths for c in weights)
    se = math.sqrt(variance) if math.sqrt(variance) > _ROUNDING * largest else 0.0
    half = se * float(stats.t.ppf(0.5 + confidence / 2, degrees)) if se > 0 else 0.0
    value = value if se > 0 or abs(value) > _ROUNDING * largest else 0.0
    low, high = value - half, value + half
    return Contrast(
        value=value,
        se=se,
        se_seeds=None if seeds == 1 else math.sqrt(seed_variance),
        se_heldout=math.sqrt(max(0.0, heldout_variance)),
        degrees=min(degrees, 1e6),
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


def _seed_variance(
    performance: Performance,
    coefficients: Mapping[str, float],
    weights: Mapping[str, float],
    seeds: int,
) -> tuple[float, float]:
    """Variance of the contrast's mean that comes from training, and its degrees of freedom."""
    if seeds == 1:
        return 0.0, 1.0
    trained = [arm for arm, of in performance.items() if len(next(iter(of.values()))) == seeds]
    table_KS = np.array(
        [
            sum((w * performance[arm][c].mean(axis=1) for c, w in weights.items()), np.zeros(seeds))
            for arm in trained
        ]
    )
    used = {arm: a for arm, a in coefficients.items() if arm in trained}
    squares = sum(a * a for a in used.values())
    if abs(sum(used.values())) < 1e-12:
        rest = table_KS - table_KS.mean(axis=1, keepdims=True) - table_KS.mean(axis=0)
        rest += table_KS.mean()
        degrees = (len(trained) - 1.0) * (seeds - 1.0)
        return squares * float((rest**2).sum()) / degrees / seeds, degrees
    if len(used) != 1:
        raise ValueError(f"coefficients over trained arms must sum to zero: {dict(used)}")
    return squares * float(table_KS.var(axis=1, ddof=1).mean()) / seeds, seeds - 1.0
