"""How close an estimate of influence comes to a reference, and to planted truth."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from system.influence.estimate.agreement import compare, replications_to_halve
from system.influence.estimate.matrix import EffectMatrix, Estimate, estimate_effects

if TYPE_CHECKING:
    from bench_influence import Measured


def target_ranks(first_TS: np.ndarray, second_TS: np.ndarray, own_T: np.ndarray) -> np.ndarray:
    """[T] rank correlation over each target's other sources."""
    return np.array(
        [
            stats.spearmanr(np.delete(one, own), np.delete(other, own))[0]
            for one, other, own in zip(first_TS, second_TS, own_T, strict=True)
        ]
    )


def median_interval(rank_KT: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median over targets of [K, T] correlations (mean over K), 95 % bootstrap over targets."""
    picked = np.random.default_rng(seed).integers(rank_KT.shape[1], size=(4000, rank_KT.shape[1]))
    medians_KB = np.median(rank_KT[:, picked], axis=2)
    low, high = np.percentile(medians_KB.mean(axis=0), [2.5, 97.5])
    return float(np.median(rank_KT, axis=1).mean()), float(low), float(high)


def split_ranks(effect_RTS: np.ndarray, own_T: np.ndarray, size: int) -> np.ndarray:
    """[K, T] rank correlations of `size` replications with as many others, K ways to choose."""
    everyone = range(effect_RTS.shape[0])
    return np.array(
        [
            target_ranks(effect_RTS[list(one)].mean(0), effect_RTS[list(other)].mean(0), own_T)
            for one in itertools.combinations(everyone, size)
            for other in itertools.combinations(sorted(set(everyone) - set(one)), size)
            if one < other
        ]
    )


def judge(measured: Measured, reference: Measured, truth: dict[str, Any] | None) -> dict[str, Any]:
    """Recovery of one estimate."""
    estimate = estimate_effects(measured.measurements)
    matrix = estimate.matrix
    wanted = estimate_effects(reference.measurements).matrix
    agreement = compare(matrix, wanted)
    ranks_T = target_ranks(matrix.effect_TS, wanted.effect_TS, measured.measurements.own_T)
    median, low, high = median_interval(ranks_T[None])
    own_TS = matrix.own_TS
    return {
        "cost": measured.equivalents / reference.equivalents,
        "seconds": measured.seconds,
        "target_rank_median": median,
        "target_rank_low": low,
        "target_rank_high": high,
        "rank": agreement.rank.value,
        "linear": agreement.linear.value,
        "sign_agreement_with_reference": agreement.sign,
        "own_scale": float(np.median(matrix.effect_TS[own_TS] / wanted.effect_TS[own_TS])),
        **halving(estimate, measured),
        **({} if truth is None else against_truth(matrix, truth)),
    }


def halving(estimate: Estimate, measured: Measured) -> dict[str, Any]:
    """Typical error of a dose's effect, and what halving it takes; nothing with one replication.

    `halving_equivalents` are the token equivalents beyond those already spent, null where only more
    held-out rows would halve the error.
    """
    count = measured.measurements.num_replications
    if count < 2:
        return {}
    matrix = estimate.matrix
    needed = replications_to_halve(estimate, count)
    each = measured.equivalents / count
    return {
        "dose_se": float(np.median((matrix.effect_se_TS * matrix.dose_S)[~matrix.own_TS])),
        "halving_replications": needed,
        "halving_equivalents": None if needed is None else (needed - count) * each,
    }


def against_truth(matrix: EffectMatrix, truth: dict[str, Any]) -> dict[str, Any]:
    """Planted signs, and unrelated pairs whose interval covers zero."""
    place = {name: index for index, name in enumerate(matrix.sources)}
    signs, zeros = [], []
    for item in truth["relations"]:
        if item["target"] == item["source"]:
            continue
        entry = place[item["target"]], place[item["source"]]
        if item["sign"]:
            signs.append(np.sign(matrix.effect_TS[entry]) == item["sign"])
        elif item["sign"] == 0:
            zeros.append(matrix.effect_low_TS[entry] <= 0 <= matrix.effect_high_TS[entry])
    return {
        "planted_signs_right": f"{sum(signs)}/{len(signs)}",
        "unrelated_pairs_covering_zero": float(np.mean(zeros)),
    }
