"""Confidence intervals of shares (proportions)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As a JSON object."""
        return {"value": self.value, "low": self.low, "high": self.high}


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Share of successes with its Wilson score interval.

    Unlike the normal interval it stays inside [0, 1] and keeps its confidence level for few trials
    and for shares near 0 or 1.  Source: Wilson 1927, J. Am. Stat. Assoc. 22 (158).

    Args:
        successes: may be fractional, as the mean over repetitions of the same trials is.
        trials: number of independent trials; repetitions of the same trials do not count.
        confidence: level of the interval.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"expected 0 <= successes <= trials and trials >= 1, found {successes} of {trials}"
        )
    share = successes / trials
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    denominator = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / denominator
    return Interval(
        value=share,
        low=0.0 if successes == 0 else max(0.0, centre - half),
        high=1.0 if successes == trials else min(1.0, centre + half),
    )
