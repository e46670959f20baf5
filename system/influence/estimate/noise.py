"""The error model of effects: training noise, shared reference run, held-out sampling.

The difference of target i, source j in replication r on held-out example h is modelled as

    D[r,i,j,h] = effect[i,j] + A[r,i,j] + B[i,j,h] + I[r,i,j,h]

A: training noise (order, drawn rows), equal for all examples of a target.  The reference run of the
replication enters every entry of row i, so A[r,i,j] and A[r,i,k] are correlated (`shared`).
B: the deviation of this example from the average example.  It is the same in every replication,
because the held-out rows are.
I: the rest.

The variance of the mean over R replications and H examples follows from the two-way crossed
random-effects layout (Searle, Casella & McCulloch 1992, chapter 4; Cornfield & Tukey 1956):

    Var = A/R + B/H + I/(R H) = between_r / R  +  (between_h - I/R) / H

where between_r is the variance over replications of the mean over examples (it contains I/H) and
between_h the variance over examples of the mean over replications (it contains I/R).

With two to five replications, which is what people can afford, between_r of one entry has one to
four degrees of freedom.  So the variances are pooled:

    variance[i,j] = row_i * source_j + (relative * effect[i,j])^2

- row_i: one variance per row, moderated towards the common one by empirical Bayes (Smyth 2004,
  doi 10.2202/1544-6115.1027).  A scaled inverse chi-square prior is fitted to the spread of the log
  variances, so the more similar the rows are, the more they are pooled.
- source_j: one factor per source, moderated in the same way.
- relative: the part that grows with the effect.  It is fitted to the own-category entries, whose
  effects are large: on real runs their noise is about a tenth of the effect, far more than the
  noise of the other entries.

Degrees of freedom account for correlated entries: the mean of n variances, each with f degrees of
freedom, whose noises have pairwise correlation c, has f n / (1 + (n-1) c^2).

Binary losses (`is_binary`) can be equal in every run; then there is no spread from which to
estimate an error.  Their held-out variance is therefore at least 1 / (H + 2)^2: that of a table of
paired answers without differences, with half a case added to every cell (Agresti and Min 2005,
Statistics in Medicine 24 (5)), as in `system.evaluation.contrast`.  A target that no other source
changes in any run (`Measurements.unresponsive_T`) tells nothing about the variance of others, so it
is left out of all pooling.

Legend of shape suffixes: R replications, T targets, S sources, H held-out examples of one target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special

from system.influence.estimate.measurements import Measurements, own_mask

_LARGE_DF = 1e6
# Lower bounds of correlations where degrees of freedom are counted: with two or three replications
# a large shared shock may be small by chance, and the errors would look more certain than they are.
# A reference run as noisy as the others gives 1/2 within a row by construction; one run that is
# scored on all targets gives some correlation across rows.
_MIN_SHARED = 0.5
_MIN_ACROSS_ROWS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingNoise:
    """Variance between replications of the mean difference, pooled over the matrix."""

    variance_TS: np.ndarray
    """[T, S] nats^2, for one replication."""
    df_TS: np.ndarray
    """[T, S] degrees of freedom of the variance."""
    shared: float
    """Correlation of the noise of two sources in one row, caused by the shared reference run."""
    own_shared: float
    """The same correlation between a row's own-category entry and its other entries."""
    across_rows: float
    """Mean squared correlation of the noise of two targets in one run."""
    relative: float
    """Standard deviation of the noise that grows with the effect, as a share of the effect."""
    row_prior_df: float
    """Degrees of freedom of the prior over rows; the larger, the more the rows are pooled."""
    source_prior_df: float
    """The same over sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorModel:
    """Sampling error of the differences averaged over replications and examples, in nats."""

    training: TrainingNoise | None
    """None with one replication: the errors then cover held-out sampling alone."""
    variance_TS: np.ndarray
    """[T, S] nats^2, total."""
    heldout_TS: np.ndarray
    """[T, S] nats^2, the part that only more held-out examples reduce."""
    df_TS: np.ndarray
    """[T, S] Satterthwaite degrees of freedom of `variance_TS`."""
    own_covariance_TS: np.ndarray
    """[T, S] nats^2: covariance of entry (i, j) with the own entry of row i; 0 if it has none."""
    common_T: np.ndarray
    """[T] nats^2, >= 0: mean covariance between two entries of a row, own entry excluded."""


def fit_errors(measured: Measurements) -> ErrorModel:
    """Fits the error model of the mean differences; the module docstring defines every term."""
    replications = measured.num_replications
    own_T = measured.own_T
    training = fit_training_noise(measured.mean_RTS, own_T) if replications > 1 else None
    shape = (len(measured.targets), len(measured.sources))
    heldout_TS, df_TS = np.empty(shape), np.empty(shape)
    variance_TS, own_covariance_TS = np.empty(shape), np.zeros(shape)
    common_T = np.zeros(shape[0])
    for row, difference_RSH in enumerate(measured.differences):
        heldout_SS = heldout_covariance(difference_RSH, is_binary=measured.is_binary)
        total_SS = heldout_SS.copy()
        heldout_df = difference_RSH.shape[2] - 1
        heldout_TS[row] = np.diag(heldout_SS)
        inverse_df_S = heldout_TS[row] ** 2 / heldout_df
        if training is not None:
            training_SS = _row_covariance(training, row, int(own_T[row])) / replications
            total_SS += training_SS
            inverse_df_S = inverse_df_S + np.diag(training_SS) ** 2 / training.df_TS[row]
        variance_TS[row] = np.diag(total_SS)
        # Satterthwaite; an entry with no variance at all keeps the held-out degrees of freedom.
        df_TS[row] = np.divide(
            variance_TS[row] ** 2,
            inverse_df_S,
            out=np.full(shape[1], float(heldout_df)),
            where=inverse_df_S > 0,
        )
        if own_T[row] >= 0:
            own_covariance_TS[row] = total_SS[own_T[row]]
        common_T[row] = _common_covariance(total_SS, int(own_T[row]))
    return ErrorModel(
        training=training,
        variance_TS=variance_TS,
        heldout_TS=heldout_TS,
        df_TS=df_TS,
        own_covariance_TS=own_covariance_TS,
        common_T=common_T,
    )


def heldout_covariance(difference_RSH: np.ndarray, *, is_binary: bool = False) -> np.ndarray:
    """[S, S] covariance of the held-out means that comes from the drawn examples.

    It is the covariance over examples of the mean over replications, minus the training noise of
    single examples (I/R in the module docstring).  Negative eigenvalues are set to zero.  With one
    replication I cannot be separated from B, so it stays in.  With binary losses (`is_binary`) the
    variances have the lower bound of the module docstring.
    """
    replications, _, examples = difference_RSH.shape
    mean_SH = difference_RSH.mean(axis=0)
    centred_SH = mean_SH - mean_SH.mean(axis=1, keepdims=True)
    between_SS = centred_SH @ centred_SH.T / (examples - 1)
    if replications > 1:
        rest_RSH = difference_RSH - difference_RSH.mean(axis=2, keepdims=True) - centred_SH
        rest_SS = np.einsum("rsh,rth->st", rest_RSH, rest_RSH)
        interaction_SS = rest_SS / ((replications - 1) * (examples - 1))
        between_SS = between_SS - interaction_SS / replications
        values, vectors = np.linalg.eigh(between_SS)
        between_SS = (vectors * np.clip(values, 0.0, None)) @ vectors.T
    heldout_SS = between_SS / examples
    if is_binary:
        bound = 1.0 / (examples + 2) ** 2
        heldout_SS += np.diag(np.maximum(bound - np.diag(heldout_SS), 0.0))
    return heldout_SS


def fit_training_noise(mean_RTS: np.ndarray, own_T: np.ndarray) -> TrainingNoise:
    """Fits the pooled variances and correlations of training noise.

    Args:
        mean_RTS: [R, T, S] mean differences of each replication, R >= 2.
        own_T: [T] column of each target's own category, -1 if it has none.
    """
    freedom = mean_RTS.shape[0] - 1
    effect_TS = mean_RTS.mean(axis=0)
    residual_RTS = mean_RTS - effect_TS
    own_TS = own_mask(own_T, mean_RTS.shape[2])
    square_TS = (residual_RTS**2).sum(axis=0) / freedom
    responsive_T = np.any(np.where(own_TS, 0.0, square_TS) > 0, axis=1)
    if responsive_T.any() and not responsive_T.all():
        return _with_unpooled_rows(
            fit_training_noise(mean_RTS[:, responsive_T], own_T[responsive_T]),
            square_TS,
            responsive_T,
            freedom,
        )
    common = _fit_common(residual_RTS, ~own_TS, freedom)
    relative = _relative_square(square_TS[own_TS], common.variance_TS[own_TS], effect_TS[own_TS])
    # Some off-diagonal effects are large too.  Fit once more, without the part of their noise that
    # grows with the effect, or they would inflate the variance of their row and source.
    grown_TS = relative * effect_TS**2
    share_TS = common.variance_TS / (common.variance_TS + grown_TS)
    common = _fit_common(residual_RTS * np.sqrt(share_TS), ~own_TS, freedom)
    variance_TS = common.variance_TS + grown_TS
    inverse_df_TS = np.full_like(variance_TS, common.inverse_df)
    if own_TS.any():
        # Own entries may be noisier or quieter than the model says: one more factor for each.
        factor_K, own_df, _ = moderate(
            square_TS[own_TS] / variance_TS[own_TS],
            freedom,
            common.across_rows * common.shared**2,
        )
        variance_TS[own_TS] *= np.maximum(factor_K, 1e-12)
        inverse_df_TS[own_TS] += 1.0 / own_df
    scaled_RTS = residual_RTS / np.sqrt(variance_TS)
    return TrainingNoise(
        variance_TS=variance_TS,
        df_TS=1.0 / inverse_df_TS,
        shared=common.shared,
        own_shared=_own_correlation(scaled_RTS, own_TS, freedom, common.shared),
        across_rows=common.across_rows,
        relative=float(np.sqrt(relative)),
        row_prior_df=common.row_prior,
        source_prior_df=common.source_prior,
    )


def _with_unpooled_rows(
    heard: TrainingNoise, square_TS: np.ndarray, responsive_T: np.ndarray, freedom: int
) -> TrainingNoise:
    """Adds the rows that were left out of pooling, each with its own sample variance."""
    variance_TS = square_TS.copy()
    df_TS = np.full_like(square_TS, float(freedom))
    variance_TS[responsive_T], df_TS[responsive_T] = heard.variance_TS, heard.df_TS
    return replace(heard, variance_TS=variance_TS, df_TS=df_TS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    """Variances (row times source) of the off-diagonal entries, and their correlations."""

    variance_TS: np.ndarray
    inverse_df: float
    shared: float
    across_rows: float
    row_prior: float
    source_prior: float


def _fit_common(residual_RTS: np.ndarray, other_TS: np.ndarray, freedom: int) -> _Common:
    """Alternates once: row variances from scaled residuals, then source factors from the rest."""
    square_TS = (residual_RTS**2).sum(axis=0) / freedom
    raw_T = _masked_mean(square_TS, other_TS, axis=1)
    # A row without any noise would be divided by zero below.
    raw_T = np.maximum(raw_T, max(1e-12 * float(raw_T.max()), np.finfo(float).tiny))
    scaled_RTS = residual_RTS / np.sqrt(raw_T)[None, :, None]
    shared = _pair_correlation(scaled_RTS, other_TS, freedom)
    shared_squared = max(shared, _MIN_SHARED) ** 2
    row_df = _pooled_df(freedom, other_TS.sum(axis=1).mean(), shared_squared)
    across_rows = _row_correlation_squared(scaled_RTS, other_TS, row_df)
    across_rows = max(across_rows, _MIN_ACROSS_ROWS)
    rows_T, row_df, row_prior = moderate(raw_T, row_df, across_rows)

    ratio_TS = square_TS / rows_T[:, None]
    raw_S = np.maximum(_masked_mean(ratio_TS, other_TS, axis=0), 1e-12)
    source_df = _pooled_df(freedom, other_TS.sum(axis=0).mean(), across_rows)
    factor_S, source_df, source_prior = moderate(raw_S, source_df, shared_squared)
    # Rows carry the scale, so factors have mean one: otherwise the product is not identified.
    factor_S = factor_S / factor_S.mean()
    return _Common(
        variance_TS=rows_T[:, None] * factor_S[None, :],
        inverse_df=1.0 / row_df + 1.0 / source_df,
        shared=shared,
        across_rows=across_rows,
        row_prior=row_prior,
        source_prior=source_prior,
    )


def _relative_square(square_K: np.ndarray, common_K: np.ndarray, effect_K: np.ndarray) -> float:
    """The r >= 0 for which the mean of square / (common + r * effect^2) is one."""
    if not square_K.size or not (effect_K != 0).any():
        return 0.0

    def excess(relative: float) -> float:
        return float((square_K / (common_K + relative * effect_K**2)).mean()) - 1.0

    if excess(0.0) <= 0.0:
        return 0.0
    high = 1e-6
    while excess(high) > 0.0 and high < 1e6:
        high *= 10.0
    # An own effect of exactly zero has noise that no r can explain.
    if excess(high) > 0.0:
        return 0.0
    return float(optimize.bisect(excess, 0.0, high, rtol=1e-9))  # pyright: ignore


def moderate(
    variance_K: np.ndarray, df: float, correlation_squared: float
) -> tuple[np.ndarray, float, float]:
    """Moderates sample variances: shrinks them towards a common value, the more the more similar.

    Source: Smyth 2004, section 6.2 (limma), with two changes.  Correlated noise makes sample
    variances more similar than their degrees of freedom suggest, so the expected spread is
    multiplied by 1 - correlation_squared.  And the total degrees of freedom are at most those of
    the whole pool.  Variances of exactly zero (accuracy can have them by chance) have no logarithm:
    the prior is fitted to the others and then applied to all.

    Args:
        variance_K: [K] sample variances, >= 0, each with `df` degrees of freedom.
        df: degrees of freedom of one sample variance.
        correlation_squared: mean squared correlation between the noises of two of them.

    Returns:
        [K] moderated variances, their degrees of freedom, and the degrees of freedom of the prior
        (0: not pooled; 1e6: all replaced by their mean).
    """
    count = variance_K.size
    positive_K = variance_K[variance_K > 0]
    if positive_K.size < 3:  # too few to estimate a spread
        return variance_K.copy(), df, 0.0
    # log of a scaled chi-square variable: subtract its expectation, compare its variance (trigamma)
    # with the observed one.
    half = df / 2.0
    log_K = np.log(positive_K) - special.digamma(half) + np.log(half)
    expected = float(special.polygamma(1, half)) * (1.0 - correlation_squared)
    excess = float(log_K.var(ddof=1)) - expected
    pool_df = _pooled_df(df, count, correlation_squared)
    # Not more spread than chance alone gives: the variances are taken to be equal.
    if excess <= 0.0:
        return np.full(count, variance_K.mean()), pool_df, _LARGE_DF
    prior_df = min(2.0 * _trigamma_inverse(excess), _LARGE_DF)
    prior = np.exp(log_K.mean() + special.digamma(prior_df / 2.0) - np.log(prior_df / 2.0))
    moderated_K = (prior_df * prior + df * variance_K) / (prior_df + df)
    return moderated_K, min(df + prior_df, pool_df), prior_df


def _trigamma_inverse(value: float) -> float:
    """The only x > 0 with trigamma(x) = value > 0; trigamma is strictly decreasing."""

    def excess(log_x: float) -> float:
        return float(np.log(special.polygamma(1, np.exp(log_x))) - np.log(value))

    return float(np.exp(optimize.bisect(excess, -30.0, 30.0, xtol=1e-12)))  # pyright: ignore


def _pooled_df(df: float, count: float, correlation_squared: float) -> float:
    return float(df * count / (1.0 + max(count - 1.0, 0.0) * correlation_squared))


def _masked_mean(values_TS: np.ndarray, mask_TS: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the masked entries along an axis; a line without any gets the mean of all."""
    count = mask_TS.sum(axis=axis)
    total = np.where(mask_TS, values_TS, 0.0).sum(axis=axis)
    fallback = values_TS[mask_TS].mean() if mask_TS.any() else values_TS.mean()
    return np.divide(total, count, out=np.full(total.shape, fallback), where=count > 0)


def _pair_correlation(scaled_RTS: np.ndarray, mask_TS: np.ndarray, freedom: int) -> float:
    """Mean correlation of two entries of a row, over all rows, kept within [0, 0.99].

    Scaled noise has mean square 1 in each row, so the mean product of two entries is their
    correlation; sum^2 - sum of squares adds up all products at once.
    """
    kept_RTS = np.where(mask_TS, scaled_RTS, 0.0)
    products = (kept_RTS.sum(axis=2) ** 2 - (kept_RTS**2).sum(axis=2)).sum() / freedom
    count_T = mask_TS.sum(axis=1)
    pairs = float((count_T * (count_T - 1)).sum())
    return float(np.clip(products / pairs, 0.0, 0.99)) if pairs else 0.0


def _own_correlation(
    scaled_RTS: np.ndarray, own_TS: np.ndarray, freedom: int, fallback: float
) -> float:
    """Mean correlation of a row's own entry with its other entries, within [0, 0.99]."""
    rows = own_TS.any(axis=1)
    others = int((~own_TS[rows]).sum())
    if not others:
        return fallback
    own_RT = np.where(own_TS, scaled_RTS, 0.0).sum(axis=2)[:, rows]
    rest_RT = np.where(own_TS, 0.0, scaled_RTS).sum(axis=2)[:, rows]
    return float(np.clip((own_RT * rest_RT).sum() / freedom / others, 0.0, 0.99))


def _row_correlation_squared(scaled_RTS: np.ndarray, mask_TS: np.ndarray, row_df: float) -> float:
    """Mean squared correlation between the noises of two targets, over runs and replications.

    The squared sample correlation of independent noises has expectation 1/df, which is subtracted.
    """
    count = scaled_RTS.shape[1]
    if count < 2:
        return 0.0
    kept_RTS = np.where(mask_TS, scaled_RTS, 0.0)
    flat_TN = np.moveaxis(kept_RTS, 1, 0).reshape(count, -1)
    gram_TT = flat_TN @ flat_TN.T
    scale_T = np.sqrt(np.maximum(np.diag(gram_TT), np.finfo(float).tiny))
    squared_TT = (gram_TT / scale_T[:, None] / scale_T[None, :]) ** 2
    mean = (squared_TT.sum() - np.trace(squared_TT)) / (count * (count - 1))
    by_chance = 1.0 / max(row_df, 1.0)
    if by_chance >= 1.0:
        return 1.0
    return float(np.clip((mean - by_chance) / (1.0 - by_chance), 0.0, 1.0))


def _row_covariance(training: TrainingNoise, row: int, own: int) -> np.ndarray:
    """[S, S] covariance of the training noise in one row, for one replication."""
    scale_S = np.sqrt(training.variance_TS[row])
    correlation_SS = np.full((scale_S.size, scale_S.size), training.shared)
    if own >= 0:
        correlation_SS[own, :] = correlation_SS[:, own] = training.own_shared
    np.fill_diagonal(correlation_SS, 1.0)
    return correlation_SS * scale_S[:, None] * scale_S[None, :]


def _common_covariance(total_SS: np.ndarray, own: int) -> float:
    keep = np.arange(total_SS.shape[0]) != own
    block_SS = total_SS[np.ix_(keep, keep)]
    count = block_SS.shape[0]
    if count < 2:
        return 0.0
    return max(float((block_SS.sum() - np.trace(block_SS)) / (count * (count - 1))), 0.0)
