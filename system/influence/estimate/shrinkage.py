"""Empirical-Bayes shrinkage of noisy effects.

Off the diagonal, with e[i,j] the estimate of target i and source j,

    e[i,j] = mu + row_i + entry_ij + noise_ij,   row_i ~ N(0, row_variance),
                                                 entry_ij ~ N(0, entry_variance),

and the noise of row i has variances v[i,j] and one part that all its entries share (the reference
run), of deviation s[i,j]: entries j and k covary by s[i,j] s[i,k].  The shared part is one number
in nats of a dose, so s[i,j] is that divided by dose j.  mu is the generalised least-squares mean;
the two variances maximise the marginal likelihood with the boundary-avoiding penalty of Chung et
al. 2013 (doi 10.1007/s11336-013-9328-2: plus the log of each standard deviation), since with few
categories the plain maximum is often at zero and would declare all effects equal.  An effect is
then replaced by its posterior mean; the posterior deviation carries the uncertainty of mu too.  The
row term is a real difference between targets, the shared part is not: keeping them apart lets the
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
wrong, and `system.influence.estimate.agreement` reports whether shrinking predicts better.

Legend of shape suffixes: T targets, S sources, F what all entries of a row move with (the shared
noise, the row term), K entries of one group.
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
    effect_TS: np.ndarray,
    variance_TS: np.ndarray,
    shared_TS: np.ndarray,
    own_TS: np.ndarray,
    silent_T: np.ndarray | None = None,
) -> Shrunken:
    """Posterior means of all effects.

    Args:
        effect_TS: [T, S] estimates.
        variance_TS: [T, S] their sampling variances, > 0.
        shared_TS: [T, S] >= 0, deviation of the noise that the entries of a row share: two of them
            covary by the product of theirs.
        own_TS: [T, S] bool, true where the source is the target's own category.
        silent_T: [T] bool, targets that nothing changes (`Measurements.silent_T`): they are not
            like the others, say nothing about them, and stay as they are.
    """
    shrunk_TS, se_TS = effect_TS.copy(), np.sqrt(variance_TS)
    heard_T = np.ones(len(effect_TS), bool) if silent_T is None or silent_T.all() else ~silent_T
    other_TS, own_TS = ~own_TS & heard_T[:, None], own_TS & heard_T[:, None]
    scale = _scale(effect_TS[heard_T], variance_TS[heard_T])
    unit = scale**2
    others = _fit_rows(
        effect_TS / scale, variance_TS / unit, shared_TS / scale, other_TS, shrunk_TS, se_TS
    )
    shrunk_TS[other_TS] *= scale
    se_TS[other_TS] *= scale
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
    shared_TS: np.ndarray,
    mask_TS: np.ndarray,
    shrunk_TS: np.ndarray,
    se_TS: np.ndarray,
) -> Prior:
    """Fits the off-diagonal prior; writes posterior means and deviations of the masked entries."""
    rows = np.flatnonzero(mask_TS.any(axis=1))
    effect_TS, variance_TS, mask_TS = effect_TS[rows], variance_TS[rows], mask_TS[rows]
    # The noise that entries share is less than all of their noise.
    share_TS = shared_TS[rows] ** 2 / variance_TS
    factor_T = np.minimum(1.0, np.sqrt(0.99 / np.maximum(share_TS.max(axis=1), 1e-300)))
    shared_TS = shared_TS[rows] * factor_T[:, None]
    single_TS = variance_TS - shared_TS**2
    ones_TS = np.ones_like(effect_TS)

    def negative_log_likelihood(logs: np.ndarray) -> float:
        entry, row = np.exp(logs)
        inverse = _RowInverse.of(single_TS + entry, shared_TS, row, mask_TS)
        line_TS = inverse.times(ones_TS)
        residual_TS = effect_TS - (line_TS * effect_TS).sum() / line_TS.sum()
        quadratic = (residual_TS * inverse.times(residual_TS)).sum()
        return 0.5 * float(quadratic + inverse.log_determinant - logs.sum())

    entry, row = _search(negative_log_likelihood, 2)
    inverse = _RowInverse.of(single_TS + entry, shared_TS, row, mask_TS)
    line_TS = inverse.times(ones_TS)
    whole_T = line_TS.sum(axis=1)
    mean = float((line_TS * effect_TS).sum() / whole_T.sum())
    solved_TS = inverse.times(effect_TS - mean)
    # The signal's covariance within a row is G = entry I + row 11'.
    posterior_TS = mean + entry * solved_TS + row * solved_TS.sum(axis=1, keepdims=True)
    # diag(G - G V^-1 G), restricted to the row's entries.
    explained_TS = (
        entry**2 * inverse.diagonal_TS + 2 * entry * row * line_TS + row**2 * whole_T[:, None]
    )
    # An error of mu enters as far as the posterior mean leans on it.
    leaning_TS = 1.0 - entry * line_TS - row * whole_T[:, None]
    mean_variance = 1.0 / whole_T.sum()
    spread_TS = np.sqrt(np.maximum(entry + row - explained_TS, 0.0) + leaning_TS**2 * mean_variance)
    full = np.zeros(shrunk_TS.shape, dtype=bool)
    full[rows] = mask_TS
    shrunk_TS[full] = posterior_TS[mask_TS]
    se_TS[full] = spread_TS[mask_TS]
    return Prior(mean=mean, row_variance=row, entry_variance=entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowInverse:
    """Inverse covariance of each row, diagonal + s s' + row 11', by the Woodbury formula.

    With P the inverse of the diagonal and L the two columns s and sqrt(row) 1 it is
    P - P L (I + L'PL)^-1 L'P, and the log determinant is that of I + L'PL less that of P.
    """

    precision_TS: np.ndarray
    """[T, S] diagonal of P; 0 outside of the group."""
    loading_TSF: np.ndarray
    middle_TFF: np.ndarray
    """[T, 2, 2] (I + L'PL)^-1."""
    log_determinant: float
    """Of the covariance of all entries, rows being independent."""

    @classmethod
    def of(
        cls, diagonal_TS: np.ndarray, shared_TS: np.ndarray, row: float, mask_TS: np.ndarray
    ) -> _RowInverse:
        precision_TS = np.where(mask_TS, 1.0 / diagonal_TS, 0.0)
        loading_TSF = np.stack([shared_TS, np.full_like(shared_TS, np.sqrt(row))], axis=2)
        inner_TFF = np.einsum("tsf,ts,tsg->tfg", loading_TSF, precision_TS, loading_TSF) + np.eye(2)
        log_inner_T = np.linalg.slogdet(inner_TFF)[1]
        return cls(
            precision_TS=precision_TS,
            loading_TSF=loading_TSF,
            middle_TFF=np.linalg.inv(inner_TFF),
            log_determinant=float(np.log(diagonal_TS)[mask_TS].sum() + log_inner_T.sum()),
        )

    def times(self, values_TS: np.ndarray) -> np.ndarray:
        """[T, S] the inverse times a vector of each row; entries outside of the group are zero."""
        weighted_TS = self.precision_TS * values_TS
        through_TF = np.einsum("tsf,ts->tf", self.loading_TSF, weighted_TS)
        moved_TF = np.einsum("tfg,tg->tf", self.middle_TFF, through_TF)
        return weighted_TS - self.precision_TS * np.einsum("tsf,tf->ts", self.loading_TSF, moved_TF)

    @property
    def diagonal_TS(self) -> np.ndarray:
        """[T, S] its diagonal."""
        taken_TS = np.einsum("tsf,tfg,tsg->ts", self.loading_TSF, self.middle_TFF, self.loading_TSF)
        return self.precision_TS - self.precision_TS**2 * taken_TS


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
