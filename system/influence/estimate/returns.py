"""How effects per example change with the dose: whether returns diminish.

For two doses d < e of source j, measured against the same reference run and on the same held-out
examples,

    change[i,j] = difference(e) / e - difference(d) / d          nats per response token per example

is formed inside every replication and for every held-out example, so that what both doses share
(the schedule, the reference's noise, the example) is taken out before errors are estimated.  The
errors are those of any measured difference (`system.influence.estimate.noise`): training noise
between replications, pooled over the matrix, and held-out sampling.  As `difference` is minus the
loss that the data adds, concave returns mean that the effect falls with the dose where data is
*added*, and rises where it is *removed*: the first rows to go are missed least.

Beside single pairs, the *worth* of a source, its mean effect on all targets: what a mix moves by.
Its noise is estimated from the replications' mean effects, since one run moves all targets at once.

With one replication nothing is known of training noise, and no change is called significant.

Legend of shape suffixes: R replications, T targets, S sources, H held-out examples of one target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from system.influence.estimate.measurements import Measurements
from system.influence.estimate.noise import fit_errors, fit_training_noise, heldout_covariance


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Estimates with the ends of their t intervals; arrays of one shape."""

    value: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def sign(self) -> np.ndarray:
        """int: +1 or -1 where the interval leaves out zero, else 0."""
        return (self.low > 0).astype(int) - (self.high < 0).astype(int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From a smaller dose to a larger one, of the sources whose doses differ."""

    sources: tuple[str, ...]
    effect_TS: Interval
    """Per example."""
    worth_S: Interval
    """Per example, mean over targets."""


def estimate_change(
    smaller: Measurements, larger: Measurements, *, confidence: float = 0.95
) -> Change | None:
    """The change of effects between two doses; None where no source has both.

    Args:
        smaller: losses at the smaller dose, of the same runs' design and direction as `larger`.
        larger: at the larger dose.
        confidence: level of the intervals.
    """
    columns = np.flatnonzero(larger.dose_S > smaller.dose_S)
    if not columns.size:
        return None
    scale_S = (larger.dose_S / smaller.dose_S)[columns]
    change = replace(
        larger,
        sources=tuple(larger.sources[column] for column in columns),
        dose_S=larger.dose_S[columns],
        dose_tokens_S=larger.dose_tokens_S[columns],
        # In nats of the larger dose: what it brought beyond the smaller one's slope.
        differences=tuple(
            many_RSH[:, columns] - scale_S[None, :, None] * few_RSH[:, columns]
            for many_RSH, few_RSH in zip(larger.differences, smaller.differences, strict=True)
        ),
    )
    errors = fit_errors(change)
    return Change(
        sources=change.sources,
        effect_TS=_interval(
            change.mean_RTS.mean(axis=0), errors.variance_TS, errors.df_TS, change, confidence
        ),
        worth_S=worth(change, confidence=confidence),
    )


def own_effects(measured: Measurements, *, confidence: float = 0.95) -> Interval:
    """[S] effect of each source on its own category, per example; NaN where it is no target."""
    errors = fit_errors(measured)
    every = _interval(
        measured.mean_RTS.mean(axis=0), errors.variance_TS, errors.df_TS, measured, confidence
    )
    rows = [measured.targets.index(s) if s in measured.targets else -1 for s in measured.sources]
    is_target = np.array(rows) >= 0
    place = (np.maximum(rows, 0), np.arange(len(rows)))
    return Interval(
        **{
            name: np.where(is_target, getattr(every, name)[place], np.nan)
            for name in ("value", "se", "low", "high")
        }
    )


def worth(measured: Measurements, *, confidence: float = 0.95) -> Interval:
    """[S] mean effect of each source on all targets, per example."""
    replications = measured.num_replications
    mean_RS = measured.mean_RTS.mean(axis=1)
    share = 1.0 / len(measured.targets)
    heldout_TS = np.stack(
        [
            share**2 * np.diag(heldout_covariance(row_RSH, is_binary=measured.is_binary))
            for row_RSH in measured.differences
        ]
    )
    freedom_T = np.array([row_RSH.shape[2] - 1 for row_RSH in measured.differences])
    variance_S = heldout_TS.sum(axis=0)
    inverse_df_S = (heldout_TS**2 / freedom_T[:, None]).sum(axis=0)
    if replications > 1:
        training = fit_training_noise(mean_RS[:, None, :], np.array([-1]))
        training_S = training.variance_TS[0] / replications
        variance_S = variance_S + training_S
        inverse_df_S = inverse_df_S + training_S**2 / training.df_TS[0]
    df_S = np.divide(
        variance_S**2,
        inverse_df_S,
        out=np.full(variance_S.shape, float(freedom_T.min())),
        where=inverse_df_S > 0,
    )
    return _interval(mean_RS.mean(axis=0), variance_S, df_S, measured, confidence)


def _interval(
    mean: np.ndarray,
    variance: np.ndarray,
    df: np.ndarray,
    measured: Measurements,
    confidence: float,
) -> Interval:
    """Per example; the last axis of all arrays is S."""
    se = np.sqrt(variance) / measured.dose_S
    reach = stats.t.ppf(0.5 + confidence / 2.0, np.maximum(df, 1.0)) * se
    value = mean / measured.dose_S
    return Interval(value=value, se=se, low=value - reach, high=value + reach)
