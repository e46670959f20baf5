"""Empirical-Bayes shrinkage of noisy effects.

*Model.*  Off the diagonal, e[i,j] is the estimate for target i and source j:

    e[i,j] = mu + row_i + entry_ij + noise_ij,   row_i ~ N(0, row_variance),
                                                 entry_ij ~ N(0, entry_variance)

The noise in row i has variances v[i,j].  A part of it is shared by all entries of the row (the
reference run), with standard deviation s[i,j]: entries j and k have covariance s[i,j] s[i,k].  The
shared part is one number in nats per dose, so s[i,j] is that number divided by dose j.  The row
term is a real difference between targets, the shared noise is not.  Because the model separates
them, the error of the reference run can be removed from a row.  Own-category effects are a group of
their own: e[i,i] ~ N(mu, entry_variance + v[i,i]).

*Fit.*  mu is the generalised least-squares mean.  The two variances maximise the marginal
likelihood plus the log of each standard deviation, the boundary-avoiding penalty of Chung et al.
2013 (doi 10.1007/s11336-013-9328-2).  Without the penalty the maximum is often at zero when there
are few categories, which would declare all effects equal.

*Result.*  Each effect is replaced by its posterior mean; the posterior deviation includes the
uncertainty of mu.  A normal prior shrinks a rare large effect (a duplicate category) too much, so
no effect moves by more than one standard error (limited translation with D = 1).  Where this limit
binds, the reported deviation is the root mean square of the posterior about the limited value,
sqrt(posterior variance + (limited - posterior mean)^2).  With the posterior deviation alone, a
limited effect of pure noise would look certain.

Sources: Efron & Morris 1972 and 1975; Searle, Casella & McCulloch 1992, chapter 7 (best linear
prediction).

Noise that rows share (one run is scored on all targets) is not modelled.  It does not bias the
means, and `system.influence.estimate.agreement` reports whether shrinkage predicts better.

Legend of shape suffixes: T targets, S sources, F the two factors that all entries of a row share
(shared noise, row term), K entries of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """The fitted prior distribution of the effects of one group, in effect units."""

    mean: float
    row_variance: float
    """Variance between rows; 0 for own-category effects."""
    entry_variance: float
    """Variance between entries of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunken:
    """Shrunken effects (at most one standard error from the estimates) and the priors."""

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
    unresponsive_T: np.ndarray | None = None,
) -> Shrunken:
    """Shrinks all effects; the module docstring describes the model.

    Args:
        effect_TS: [T, S] estimates.
        variance_TS: [T, S] sampling variances of the estimates, > 0.
        shared_TS: [T, S] >= 0, standard deviation of the noise that the entries of a row share; the
            covariance of two entries is the product of theirs.
        own_TS: [T, S] bool, true where the source is the target's own category.
        unresponsive_T: [T] bool, see `Measurements.unresponsive_T`.  These targets are not used to
            fit the priors, and their effects stay as they are.
    """
    shrunk_TS, se_TS = effect_TS.copy(), np.sqrt(variance_TS)
    responsive_T = (
        np.ones(len(effect_TS), bool)
        if unresponsive_T is None or unresponsive_T.all()
        else ~unresponsive_T
    )
    other_TS, own_TS = ~own_TS & responsive_T[:, None], own_TS & responsive_T[:, None]
    # Effects may be as small as 1e-6: the search for variances needs numbers around one.
    scale = _scale(effect_TS[responsive_T], variance_TS[responsive_T])
    square = scale**2
    others = _fit_rows(
        effect_TS / scale, variance_TS / square, shared_TS / scale, other_TS, shrunk_TS, se_TS
    )
    shrunk_TS[other_TS] *= scale
    se_TS[other_TS] *= scale
    own = None
    if own_TS.sum() >= 2:  # a single own effect gives no prior; it stays as it is
        own, shrunk_K, se_K = _fit_group(effect_TS[own_TS] / scale, variance_TS[own_TS] / square)
        shrunk_TS[own_TS], se_TS[own_TS] = shrunk_K * scale, se_K * scale
        own = _rescale(own, scale)
    # Limited translation: no effect moves by more than its standard error.
    reach_TS = np.sqrt(variance_TS)
    limited_TS = np.clip(shrunk_TS, effect_TS - reach_TS, effect_TS + reach_TS)
    se_TS = np.hypot(se_TS, limited_TS - shrunk_TS)
    return Shrunken(
        effect_TS=limited_TS, effect_se_TS=se_TS, others=_rescale(others, scale), own=own
    )


def _scale(effect_TS: np.ndarray, variance_TS: np.ndarray) -> float:
    """The typical size of the effects, by which the search is scaled."""
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
    """Fits the off-diagonal prior.

    Writes the posterior means and deviations of the masked entries into `shrunk_TS` and `se_TS`.
    """
    rows = np.flatnonzero(mask_TS.any(axis=1))
    effect_TS, variance_TS, mask_TS = effect_TS[rows], variance_TS[rows], mask_TS[rows]
    # Shared noise is a part of the total.  Both are estimates, so cap the share at 99 %: otherwise
    # the covariance of a row would not be positive definite.
    share_TS = shared_TS[rows] ** 2 / variance_TS
    factor_T = np.minimum(1.0, np.sqrt(0.99 / np.maximum(share_TS.max(axis=1), 1e-300)))
    shared_TS = shared_TS[rows] * factor_T[:, None]
    single_TS = variance_TS - shared_TS**2
    ones_TS = np.ones_like(effect_TS)

    def negative_log_likelihood(logs: np.ndarray) -> float:
        entry, row = np.exp(logs)
        inverse = _RowInverse.of(single_TS + entry, shared_TS, row, mask_TS)
        line_TS = inverse.times(ones_TS)
        # Residuals from the generalised least-squares mean at these variances.
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
    # The posterior mean contains mu with this weight, and so the error of mu.
    weight_TS = 1.0 - entry * line_TS - row * whole_T[:, None]
    mean_variance = 1.0 / whole_T.sum()
    spread_TS = np.sqrt(np.maximum(entry + row - explained_TS, 0.0) + weight_TS**2 * mean_variance)
    full = np.zeros(shrunk_TS.shape, dtype=bool)
    full[rows] = mask_TS
    shrunk_TS[full] = posterior_TS[mask_TS]
    se_TS[full] = spread_TS[mask_TS]
    return Prior(mean=mean, row_variance=row, entry_variance=entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowInverse:
    """Inverse of the covariance of each row, diagonal + s s' + row 11', by the Woodbury formula.

    P is the inverse of the diagonal and L has the two columns s and sqrt(row) 1.  The inverse is
    P - P L (I + L'PL)^-1 L'P; the log determinant is log det(I + L'PL) - log det(P).
    """

    precision_TS: np.ndarray
    """[T, S] diagonal of P; 0 outside the group."""
    loading_TSF: np.ndarray
    middle_TFF: np.ndarray
    """[T, 2, 2] (I + L'PL)^-1."""
    log_determinant: float
    """Log determinant of the covariance of all entries; rows are independent."""

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
        """[T, S] the inverse times a vector, row by row; entries outside the group are zero."""
        weighted_TS = self.precision_TS * values_TS
        factor_TF = np.einsum("tsf,ts->tf", self.loading_TSF, weighted_TS)
        solved_TF = np.einsum("tfg,tg->tf", self.middle_TFF, factor_TF)
        correction_TS = np.einsum("tsf,tf->ts", self.loading_TSF, solved_TF)
        return weighted_TS - self.precision_TS * correction_TS

    @property
    def diagonal_TS(self) -> np.ndarray:
        """[T, S] diagonal of the inverse."""
        loading_TSF = self.loading_TSF
        correction_TS = np.einsum("tsf,tfg,tsg->ts", loading_TSF, self.middle_TFF, loading_TSF)
        return self.precision_TS - self.precision_TS**2 * correction_TS


def _fit_group(
    effect_K: np.ndarray, variance_K: np.ndarray
) -> tuple[Prior, np.ndarray, np.ndarray]:
    """Normal-normal empirical Bayes for exchangeable, independent estimates."""

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
    """Minimises the objective over log variances: a coarse grid, then Nelder-Mead from its best.

    The likelihood may have its maximum at zero variance.  The search stops at e^-20 of the scale
    instead, so that every effect still has a posterior.
    """
    grid = np.linspace(-14.0, 3.0, 9)
    points = np.stack(np.meshgrid(*[grid] * dimensions), axis=-1).reshape(-1, dimensions)
    start = min(points, key=objective)
    optimum = optimize.minimize(
        lambda logs: objective(np.clip(logs, -20.0, 6.0)),
        start,
        method="Nelder-Mead",
        options={"xatol": 1e-4, "fatol": 1e-10, "maxiter": 400},
    )
    return tuple(float(value) for value in np.exp(np.clip(optimum.x, -20.0, 6.0)))
