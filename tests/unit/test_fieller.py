import numpy as np
import pytest
from scipy import stats

from system.influence.estimate.fieller import fieller_interval


def interval(x, y, vxx, vyy, vxy, t=1.96):
    low, high = fieller_interval(
        *(np.array([value], dtype=float) for value in (x, y, vxx, vyy, vxy, t))
    )
    return float(low[0]), float(high[0])


def test_ends_solve_the_quadratic_exactly():
    x, y, vxx, vyy, vxy, t = 0.3, 1.2, 0.04, 0.02, 0.01, 2.1
    for end in interval(x, y, vxx, vyy, vxy, t):
        statistic = (x - end * y) ** 2 / (vxx - 2 * end * vxy + end**2 * vyy)
        assert statistic == pytest.approx(t**2, rel=1e-9)


def test_a_denominator_compatible_with_zero_gives_no_interval():
    low, high = interval(0.3, 0.1, 0.04, 0.01, 0.0)
    assert np.isnan(low) and np.isnan(high)


def test_a_ratio_of_a_number_with_itself_is_one_exactly():
    assert interval(0.5, 0.5, 0.01, 0.01, 0.01) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_without_noise_the_interval_is_the_ratio():
    assert interval(-0.4, 0.8, 0.0, 0.0, 0.0) == pytest.approx((-0.5, -0.5))


def test_shared_noise_narrows_the_interval_of_a_ratio_near_one():
    alone = interval(1.0, 1.0, 0.02, 0.02, 0.0)
    together = interval(1.0, 1.0, 0.02, 0.02, 0.015)
    assert together[1] - together[0] < 0.6 * (alone[1] - alone[0])


def test_a_negative_denominator_keeps_the_ends_in_order():
    low, high = interval(0.3, -1.2, 0.01, 0.01, 0.0)
    assert low < -0.25 < high


def test_intervals_cover_the_true_ratio_at_the_nominal_rate():
    rng = np.random.default_rng(7)
    true = np.array([0.3, 1.0])
    covariance = np.array([[0.05, 0.03], [0.03, 0.06]])
    draws, df = 4000, 6
    noise = rng.multivariate_normal([0, 0], covariance, (draws, df + 1))
    mean = true + noise.mean(axis=1)
    centred = noise - noise.mean(axis=1, keepdims=True)
    sample = np.einsum("nki,nkj->nij", centred, centred) / df / (df + 1)
    quantile = np.full(draws, stats.t.ppf(0.975, df))
    low, high = fieller_interval(
        mean[:, 0], mean[:, 1], sample[:, 0, 0], sample[:, 1, 1], sample[:, 0, 1], quantile
    )
    bounded = np.isfinite(low)
    assert bounded.mean() > 0.95
    covered = (low <= 0.3) & (high >= 0.3)
    assert covered[bounded].mean() == pytest.approx(0.95, abs=0.015)
