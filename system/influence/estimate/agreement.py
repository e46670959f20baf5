"""Agreement of independent replications of an effect matrix, and of two matrices.

Split-half agreement answers two questions.  Do two halves of the replications rank the
*interactions* (off-diagonal effects) in the same order?  And do they rank the *worth* of the
sources in the same order, that is, the mean effect of a source over all targets, its own included,
weighted by the importance of the targets?  A mix moves by worth.  Worth may be known well even if
every single interaction is lost in noise, so the agreement on worth decides whether a matrix is
believed.

Entries that share a target or a source are dependent.  The intervals therefore come from the
delete-one-category jackknife for dyadic data (Snijders & Borgatti 1999): each category is left out
with its row and its column, and SE^2 = (n - 2) / (2 n) * sum (z_(k) - mean z)^2 on Fisher's z
scale.  The intervals describe other categories with the same replications.  They do not contain
noise that moves the whole matrix at once (95 % intervals cover 83 to 95 % on simulated matrices).

Legend of shape suffixes: R replications, T targets, S sources.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from system.influence.estimate.matrix import EffectMatrix, Estimate
from system.influence.estimate.measurements import Measurements, own_mask
from system.influence.estimate.noise import ErrorModel
from system.influence.estimate.shrinkage import shrink

_MAX_SPLITS = 20
_MAX_GROUPS = 40


def json_number(value: float | np.floating) -> float | None:
    """A JSON number; None if the value is not finite."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """A correlation with its interval; the ends are NaN if they cannot be computed."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """JSON values, None for NaN."""
        return {name: json_number(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well two matrices of the same categories agree off the diagonal."""

    rank: Correlation
    """Spearman, over all pairs of categories."""
    linear: Correlation
    """Pearson."""
    target_rank_median: float
    """Median over targets of the rank correlation over their other sources."""
    sign: float
    """Share of pairs whose effects have the same sign."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, None for NaN."""
        return {
            "rank": self.rank.to_json(),
            "linear": self.linear.to_json(),
            "target_rank_median": json_number(self.target_rank_median),
            "sign": json_number(self.sign),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitHalf:
    """Agreement between two halves of the replications, averaged over the ways to split them."""

    agreement: Agreement
    num_splits: int
    half_sizes: tuple[int, int]
    worth_agreement: float
    """Spearman correlation of the sources' worth, mean over the splits; NaN if all sources have
    the same worth."""
    reliability: float
    """Spearman-Brown: expected rank correlation between two estimates of all replications."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, None for NaN."""
        return {
            **self.agreement.to_json(),
            "worth": json_number(self.worth_agreement),
            "num_splits": self.num_splits,
            "half_sizes": list(self.half_sizes),
            "reliability": json_number(self.reliability),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How well the other replications predict the one that is left out, off the diagonal.

    Mean squared errors in (nats per unit)^2.  All contain the noise of the replication that is left
    out, so only the differences between them are meaningful.
    """

    zero: float
    """Error of predicting no interaction at all."""
    raw: float
    shrunk: float

    @property
    def better(self) -> str:
        """Which effects predict better: `shrunk` or `raw`."""
        return "shrunk" if self.shrunk <= self.raw else "raw"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "better": self.better}


def split_half(
    measured: Measurements,
    *,
    split_heldout: bool = False,
    weight_T: np.ndarray | None = None,
    confidence: float = 0.95,
) -> SplitHalf | None:
    """Agreement of two halves of the replications.

    None with a single replication or with fewer than three categories.  With an odd number of
    replications one half has one more.

    Args:
        measured: paired losses of all runs.
        split_heldout: True: the two halves are also scored on different held-out examples (every
            other one), so that they share nothing; each half uses each part once.  False: both
            use all examples, which tells how well training replicates, not how well the category
            is known.
        weight_T: [T] importance of the targets for worth; None: all targets equal.
        confidence: level of the intervals.
    """
    count = measured.num_replications
    if count < 2 or len(measured.sources) < 3:
        return None
    half = count // 2
    # With an even number each split would appear twice: keep it where replication 0 is chosen.
    splits = [
        chosen for chosen in itertools.combinations(range(count), half) if count % 2 or 0 in chosen
    ]
    if len(splits) > _MAX_SPLITS:
        picked = np.random.default_rng(0).choice(len(splits), _MAX_SPLITS, replace=False)
        splits = [splits[index] for index in sorted(picked)]
    if split_heldout:
        even_RTS, odd_RTS = (
            _alternating_mean(measured, start) / measured.dose_S for start in (0, 1)
        )
        scored = [(even_RTS, odd_RTS), (odd_RTS, even_RTS)]
    else:
        effect_RTS = measured.mean_RTS / measured.dose_S
        scored = [(effect_RTS, effect_RTS)]
    pairs = []
    for chosen in splits:
        rest = [index for index in range(count) if index not in chosen]
        pairs += [
            (one_RTS[list(chosen)].mean(axis=0), other_RTS[rest].mean(axis=0))
            for one_RTS, other_RTS in scored
        ]
    agreement = _agreement(pairs, measured.own_T, confidence)
    rank = agreement.rank.value
    worth_ranks = [
        _spearman(
            np.average(one_TS, axis=0, weights=weight_T),
            np.average(other_TS, axis=0, weights=weight_T),
        )
        for one_TS, other_TS in pairs
    ]
    return SplitHalf(
        agreement=agreement,
        num_splits=len(splits),
        half_sizes=(half, count - half),
        worth_agreement=float(np.mean(worth_ranks)),
        reliability=2.0 * rank / (1.0 + rank) if rank > -1.0 else -1.0,
    )


def compare(first: EffectMatrix, second: EffectMatrix, *, confidence: float = 0.95) -> Agreement:
    """Agreement of two estimates of the same effects, such as two estimators."""
    if (first.targets, first.sources) != (second.targets, second.sources):
        raise ValueError("two matrices can be compared only over the same targets and sources")
    own_T = np.array([_index(first.sources, target) for target in first.targets])
    return _agreement([(first.effect_TS, second.effect_TS)], own_T, confidence)


def left_out_prediction(measured: Measurements, errors: ErrorModel) -> Prediction | None:
    """Leave-one-out prediction errors of raw and shrunken effects; None with one replication.

    The priors are fitted without the replication that is left out.  The noise variances come from
    all replications, scaled to one fewer: with two replications the rest has no variance estimate.
    """
    count = measured.num_replications
    if count < 2 or errors.training is None:
        return None
    effect_RTS = measured.mean_RTS / measured.dose_S
    own_TS = own_mask(measured.own_T, len(measured.sources))
    other_TS = ~own_TS
    training_TS = errors.variance_TS - errors.heldout_TS
    fewer = count / (count - 1.0)
    variance_TS = (training_TS * fewer + errors.heldout_TS) / measured.dose_S**2
    shared_TS = np.sqrt(errors.common_T * fewer)[:, None] / measured.dose_S
    unresponsive_T = measured.unresponsive_T
    losses = np.zeros(3)
    for left in range(count):
        rest_TS = np.delete(effect_RTS, left, axis=0).mean(axis=0)
        shrunken = shrink(
            rest_TS, np.maximum(variance_TS, 1e-300), shared_TS, own_TS, unresponsive_T
        )
        observed_TS = effect_RTS[left]
        predictions = (np.zeros_like(rest_TS), rest_TS, shrunken.effect_TS)
        for place, predicted_TS in enumerate(predictions):
            losses[place] += np.mean((predicted_TS - observed_TS)[other_TS] ** 2) / count
    return Prediction(zero=float(losses[0]), raw=float(losses[1]), shrunk=float(losses[2]))


def replications_to_halve(estimate: Estimate, num_replications: int) -> int | None:
    """Total number of replications that would halve the typical off-diagonal standard error.

    Replications reduce training noise but not the error of held-out sampling.  None: no number of
    replications halves the error, only more held-out rows can; or there is one replication.
    """
    errors = estimate.errors
    if errors.training is None:
        return None
    other_TS = ~estimate.matrix.own_TS
    training = float(np.median(errors.training.variance_TS[other_TS]))
    heldout = float(np.median(errors.heldout_TS[other_TS]))
    room = (training / num_replications + heldout) / 4.0 - heldout
    return int(np.ceil(training / room - 1e-9)) if room > 0 else None


def _alternating_mean(measured: Measurements, start: int) -> np.ndarray:
    """[R, T, S] mean differences over every second held-out example, beginning with `start`."""
    return np.stack([row[:, :, start::2].mean(axis=2) for row in measured.differences], axis=1)


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1


def _agreement(
    pairs: list[tuple[np.ndarray, np.ndarray]], own_T: np.ndarray, confidence: float
) -> Agreement:
    rows = np.flatnonzero(own_T >= 0)
    square = [(a_TS[rows][:, own_T[rows]], b_TS[rows][:, own_T[rows]]) for a_TS, b_TS in pairs]
    own_TS = own_mask(own_T, pairs[0][0].shape[1])
    ranks = [
        _spearman(a_TS[row][~own_TS[row]], b_TS[row][~own_TS[row]])
        for a_TS, b_TS in pairs
        for row in range(own_T.size)
    ]
    signs = [np.mean(np.sign(a_TS)[~own_TS] == np.sign(b_TS)[~own_TS]) for a_TS, b_TS in pairs]
    finite = [rank for rank in ranks if np.isfinite(rank)]
    return Agreement(
        rank=_jackknifed(square, _spearman, confidence),
        linear=_jackknifed(square, _pearson, confidence),
        target_rank_median=float(np.median(finite)) if finite else float("nan"),
        sign=float(np.mean(signs)),
    )


def _jackknifed(square, correlate, confidence: float) -> Correlation:
    """Mean off-diagonal correlation over pairs of matrices, with its jackknife interval.

    The correlations themselves are averaged, not their Fisher z: z of a correlation of one is
    infinite, so a single split of few categories would decide the mean.  The interval of the mean
    is computed on the z scale.
    """
    count = square[0][0].shape[0]

    def mean_correlation(kept: np.ndarray) -> float:
        off = ~np.eye(kept.size, dtype=bool)
        block = np.ix_(kept, kept)
        return float(np.mean([correlate(a[block][off], b[block][off]) for a, b in square]))

    everyone = np.arange(count)
    centre = mean_correlation(everyone)
    # With many categories, groups of them are left out together: fewer correlations to compute.
    groups = min(count, _MAX_GROUPS)
    if groups < 5 or not np.isfinite(centre):
        return Correlation(value=centre, low=np.nan, high=np.nan)
    left_K = [mean_correlation(everyone[everyone % groups != group]) for group in range(groups)]
    z, z_K = _fisher(np.array(centre)), _fisher(np.array(left_K))
    error = np.sqrt((groups - 2) / (2 * groups) * ((z_K - z_K.mean()) ** 2).sum())
    reach = stats.t.ppf(0.5 + confidence / 2.0, groups - 2) * error
    low, high = np.tanh([z - reach, z + reach])
    return Correlation(value=centre, low=float(low), high=float(high))


def _fisher(correlation: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(correlation, -0.999999, 0.999999))


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    return _pearson(stats.rankdata(first), stats.rankdata(second))
