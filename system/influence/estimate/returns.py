"""Changes of effects per example with the dose: whether returns diminish.

Two doses d < e of source j are measured against the same reference run and on the same held-out
examples.  The change

    change[i,j] = difference(e) / e - difference(d) / d          nats per response token per example

is computed inside every replication and for every held-out example.  So everything that both doses
share (the schedule, the noise of the reference run, the example) cancels before errors are
estimated.  The errors are those of any difference (`system.influence.estimate.noise`): training
noise, pooled over the matrix, and held-out sampling.

With diminishing returns the effect per example falls with the dose if data is *added*, and rises if
data is *removed*: the first rows that go are missed least.

Besides single pairs, this module estimates the *worth* of a source: its mean effect over all
targets, by which a mix moves.  The noise of worth is estimated from the mean effects of the
replications, because one run moves all targets at once.

With one replication training noise is unknown, and no change is called significant.

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
    """Estimates with their t intervals; all arrays have one shape."""

    value: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def sign(self) -> np.ndarray:
        """int: +1 or -1 if the interval excludes zero, else 0."""
        return (self.low > 0).astype(int) - (self.high < 0).astype(int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Changes from a smaller dose to a larger one, of the sources whose two doses differ."""

    sources: tuple[str, ...]
    effect_TS: Interval
    """Per example."""
    worth_S: Interval
    """Per example, mean over targets."""


def estimate_change(
    smaller: Measurements, larger: Measurements, *, confidence: float = 0.95
) -> Change | None:
    """Estimates the change of effects between two doses; None if no source has two doses.

    Args:
        smaller: losses at the smaller dose, of the same design and direction as `larger`.
        larger: losses at the larger dose.
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
        # In nats of the larger dose: its difference beyond the slope of the smaller dose.
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
    """[S] effect of each source on its own category, per example; NaN if it is not a target."""
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
    """[S] worth of each source: its mean effect over all targets, per example."""
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
    """Divides by the dose and adds t intervals; the last axis of all arrays is S."""
    se = np.sqrt(variance) / measured.dose_S
    reach = stats.t.ppf(0.5 + confidence / 2.0, np.maximum(df, 1.0)) * se
    value = mean / measured.dose_S
    return Interval(value=value, se=se, low=value - reach, high=value + reach)
