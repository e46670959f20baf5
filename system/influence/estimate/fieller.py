"""Confidence sets of a ratio of two correlated estimates.

Source: Fieller 1954, "Some problems in interval estimation"; the set of all ratios g for which
numerator - g * denominator is compatible with zero:

    (x - g y)^2 <= t^2 (V_xx - 2 g V_xy + g^2 V_yy).

The set is an interval exactly if the denominator differs significantly from zero (y^2 > t^2 V_yy).
Otherwise it is the outside of an interval or the whole line, and the ratio is not identifiable.
"""

from __future__ import annotations

import numpy as np


def fieller_interval(
    numerator: np.ndarray,
    denominator: np.ndarray,
    numerator_variance: np.ndarray,
    denominator_variance: np.ndarray,
    covariance: np.ndarray,
    quantile: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends, elementwise over arrays of one shape; NaN if the set is unbounded.

    Args:
        numerator: estimates x.
        denominator: estimates y.
        numerator_variance: V_xx >= 0.
        denominator_variance: V_yy >= 0.
        covariance: V_xy; limited to plus or minus the geometric mean of the variances.
        quantile: two-sided t quantiles, > 0.
    """
    bound = np.sqrt(numerator_variance * denominator_variance)
    covariance = np.clip(covariance, -bound, bound)
    square = quantile**2
    a = denominator**2 - square * denominator_variance
    b = numerator * denominator - square * covariance
    c = numerator**2 - square * numerator_variance
    bounded = a > 0
    # For a > 0 the point estimate satisfies the inequality, so real roots exist: a negative
    # discriminant is rounding.
    root = np.sqrt(np.maximum(b**2 - a * c, 0.0))
    divisor = np.where(bounded, a, 1.0)
    low = np.where(bounded, (b - root) / divisor, np.nan)
    high = np.where(bounded, (b + root) / divisor, np.nan)
    return low, high
