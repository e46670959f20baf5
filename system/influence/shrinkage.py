"""Empirical-Bayes shrinkage of noisy effects.

Off the diagonal, with e[i,j] the estimate of target i and source j,

    e[i,j] = mu + row_i + entry_ij + noise_ij,   row_i ~ N(0, row_variance),
                                                 entry_ij ~ N(0, entry_variance),

and the noise of row i has variances v[i,j] and a common covariance c_i between its entries (the
shared reference).  mu is the generalised least-squares mean; the two variances maximise the
marginal likelihood with the boundary-avoiding penalty of Chung et al. 2013 (doi
10.1007/s11336-013-9328-2: plus the log of each standard deviation), since with few categories the
plain maximum is often at zero and would declare all effects equal.  An effect is then replaced by
its posterior mean; the posterior deviation carries the uncertainty of mu too.  The row term is a
real difference between targets, the common covariance is not: keeping them apart lets the
reference's error be taken out of a row again.  Own-category effects are a group of their own,
e[i,i] ~ N(mu, entry_variance + v[i,i]).
A normal prior pulls a rare large effect (a duplicate category) too far, so no effect is moved by
more than one of its standard errors (limited translation with D = 1).  Where that limit holds the
answer is not the posterior mean, and its deviation is the root mean square of the posterior about
the limited value, sqrt(posterior variance + (limited - posterior mean)^2): with the posterior's own
deviation a limited effect of pure noise would be called certain to be there.
Source: Efron & Morris 1972 and 1975; Searle, Casella & McCulloch 1992, chapter 7 (best linear
prediction).

Noise that rows share (one run is scored on all targets) is not modelled here; it makes no mean
wrong, and `system.influence.agreement` reports whether shrinking predicts better.

Legend of shape suffixes: T targets, S sources, K entries of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What the effects of one group look like before one of them is seen, in effect units."""

    mean: float
    row_variance: float
    """Between rows; 0 for own-category effects."""
    entry_variance: float
    """Between entries of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunken:
    """Posterior means, limited to one standard error of the estimates, and the priors."""

    effect_TS: np.ndarray
    effect_se_TS: np.ndarray
    """[T, S] root mean square of the posterior about `effect_TS`."""
    others: Prior
    own: Prior | None


def shrink(
    effect_TS: np.ndarray, variance_TS: np.ndarray, common_T: np.ndarray, own_TS: np.ndarray
) -> Shrunken:
    """Posterior means of all effects.

    Args:
        effect_TS: [T, S] estimates.
        variance_TS: [T, S] their sampling variances, > 0.
        common_T: [T] sampling covariance between two entries of a row, >= 0.
        own_TS: [T, S] bool, true where the source is the target's own category.
    """
    shrunk_TS, se_TS = effect_TS.copy(), np.sqrt(variance_TS)
    scale = _scale(effect_TS, variance_TS)
    unit = scale**2
    others = _fit_rows(
        effect_TS / scale, variance_TS / unit, common_T / unit, ~own_TS, shrunk_TS, se_TS
    )
    shrunk_TS[~own_TS] *= scale
    se_TS[~own_TS] *= scale
    own = None
    if own_TS.sum() >= 2:
        own, shrunk_K, se_K = _fit_group(effect_TS[own_TS] / scale, variance_TS[own_TS] / unit)
        shrunk_TS[own_TS], se_TS[own_TS] = shrunk_K * scale, se_K * scale
        own = _rescale(own, scale)
    reach_TS = np.sqrt(variance_TS)
    limited_TS = np.clip(shrunk_TS, effect_TS - reach_TS, effect_TS + reach_TS)
    se_TS = np.hypot(se_TS, limited_TS - shrunk_TS)
    return Shrunken(
        effect_TS=limited_TS, effect_se_TS=se_TS, others=_rescale(others, scale), own=own
    )


def _scale(effect_TS: np.ndarray, variance_TS: np.ndarray) -> float:
    """A length of the problem, so that the search starts at numbers around one."""
    length = float(np.sqrt(np.mean(effect_TS**2 + variance_TS)))
    return length if length > 0 else 1.0


def _rescale(prior: Prior, scale: float) -> Prior:
    return Prior(
        mean=prior.mean * scale,
        row_variance=prior.row_variance * scale**2,
        entry_variance=prior.entry_variance * scale**2,
    )


def _fit_rows(
    effect_TS: np.ndarray,
    variance_TS: np.ndarray,
    common_T: np.ndarray,
    mask_TS: np.ndarray,
    shrunk_TS: np.ndarray,
    se_TS: np.ndarray,
) -> Prior:
    """Fits the off-diagonal prior; writes posterior means and deviations of the masked entries."""
    rows = np.flatnonzero(mask_TS.any(axis=1))
    effect_TS, variance_TS, mask_TS = effect_TS[rows], variance_TS[rows], mask_TS[rows]
    common_T = np.minimum(common_T[rows], 0.99 * variance_TS.min(axis=1))
    single_TS = variance_TS - common_T[:, None]

    def negative_log_likelihood(logs: np.ndarray) -> float:
        entry, row = np.exp(logs)
        precision_TS = np.where(mask_TS, 1.0 / (single_TS + entry), 0.0)
        total_T = precision_TS.sum(axis=1)
        joint_T = common_T + row
        shrink_T = joint_T / (1.0 + joint_T * total_T)
        mean = _profile_mean(effect_TS, precision_TS, total_T, shrink_T)
        residual_TS = effect_TS - mean
        linear_T = (precision_TS * residual_TS).sum(axis=1)
        quadratic = (precision_TS * residual_TS**2).sum() - (shrink_T * linear_T**2).sum()
        log_determinant = (
            np.log(single_TS + entry)[mask_TS].sum() + np.log1p(joint_T * total_T).sum()
        )
        return 0.5 * float(quadratic + log_determinant - logs.sum())

    entry, row = _search(negative_log_likelihood, 2)
    precision_TS = np.where(mask_TS, 1.0 / (single_TS + entry), 0.0)
    total_T = precision_TS.sum(axis=1)
    joint_T = common_T + row
    shrink_T = joint_T / (1.0 + joint_T * total_T)
    mean = _profile_mean(effect_TS, precision_TS, total_T, shrink_T)
    residual_TS = np.where(mask_TS, effect_TS - mean, 0.0)
    # V^-1 residual by the Sherman-Morrison formula; signal covariance = entry * I + row * 11'.
    solved_TS = precision_TS * (
        residual_TS - (shrink_T * (precision_TS * residual_TS).sum(axis=1))[:, None]
    )
    posterior_TS = mean + entry * solved_TS + row * solved_TS.sum(axis=1, keepdims=True)
    # diag(G - G V^-1 G) with G = entry I + row 11' restricted to the row's entries.
    whole_T = total_T - shrink_T * total_T**2  # 1' V^-1 1
    line_TS = precision_TS * (1.0 - (shrink_T * total_T)[:, None])  # V^-1 1
    corner_TS = precision_TS - shrink_T[:, None] * precision_TS**2  # diag V^-1
    explained_TS = entry**2 * corner_TS + 2 * entry * row * line_TS + row**2 * whole_T[:, None]
    # An error of mu enters as far as the posterior mean leans on it.
    leaning_TS = 1.0 - entry * line_TS - row * whole_T[:, None]
    mean_variance = 1.0 / whole_T.sum()
    spread_TS = np.sqrt(np.maximum(entry + row - explained_TS, 0.0) + leaning_TS**2 * mean_variance)
    full = np.zeros(shrunk_TS.shape, dtype=bool)
    full[rows] = mask_TS
    shrunk_TS[full] = posterior_TS[mask_TS]
    se_TS[full] = spread_TS[mask_TS]
    return Prior(mean=mean, row_variance=row, entry_variance=entry)


def _profile_mean(
    effect_TS: np.ndarray, precision_TS: np.ndarray, total_T: np.ndarray, shrink_T: np.ndarray
) -> float:
    """Generalised least squares mean at given variances."""
    sum_T = (precision_TS * effect_TS).sum(axis=1)
    weight = (total_T - shrink_T * total_T**2).sum()
    return float((sum_T - shrink_T * total_T * sum_T).sum() / weight)


def _fit_group(
    effect_K: np.ndarray, variance_K: np.ndarray
) -> tuple[Prior, np.ndarray, np.ndarray]:
    """Normal-normal empirical Bayes of exchangeable, independent estimates."""

    def moments(entry: float) -> tuple[np.ndarray, float]:
        precision_K = 1.0 / (variance_K + entry)
        return precision_K, float((precision_K * effect_K).sum() / precision_K.sum())

    def negative_log_likelihood(logs: np.ndarray) -> float:
        precision_K, mean = moments(float(np.exp(logs[0])))
        quadratic = (precision_K * (effect_K - mean) ** 2 - np.log(precision_K)).sum()
        return 0.5 * float(quadratic - logs[0])

    (entry,) = _search(negative_log_likelihood, 1)
    precision_K, mean = moments(entry)
    weight_K = entry / (entry + variance_K)
    posterior_K = mean + weight_K * (effect_K - mean)
    prior = Prior(mean=mean, row_variance=0.0, entry_variance=entry)
    variance_K = weight_K * variance_K + (1.0 - weight_K) ** 2 / precision_K.sum()
    return prior, posterior_K, np.sqrt(variance_K)


def _search(objective, dimensions: int) -> tuple[float, ...]:
    """Variances that minimise the objective: a coarse grid of logs, then a simplex from its best.

    The likelihood may have its maximum at zero variance; e^-20 of the problem's scale stands for
    it, so that every effect still has a posterior.
    """
    grid = np.linspace(-14.0, 3.0, 9)
    points = np.stack(np.meshgrid(*[grid] * dimensions), axis=-1).reshape(-1, dimensions)
    start = min(points, key=objective)
    found = optimize.minimize(
        lambda logs: objective(np.clip(logs, -20.0, 6.0)),
        start,
        method="Nelder-Mead",
        options={"xatol": 1e-4, "fatol": 1e-10, "maxiter": 400},
    )
    return tuple(float(value) for value in np.exp(np.clip(found.x, -20.0, 6.0)))
