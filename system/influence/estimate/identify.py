"""How many replications would make the gamma of each pair identifiable.

Gamma of a pair is identifiable if the target's own effect lies clearly above the floor and the
interval of gamma is narrow (`system.influence.estimate.matrix`).  More replications reduce training
noise and make the errors themselves more certain; they do not reduce the error of held-out sampling
(`system.influence.estimate.noise`).  This module computes every interval again for larger numbers
of replications, under the assumption that the estimated effects stay what they are now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from system.influence.estimate.matrix import EffectMatrix, Estimate, gamma_intervals
from system.influence.estimate.measurements import Measurements

MAX_REPLICATIONS = 64
"""Largest number of replications that is suggested; beyond it something else has to change."""
_STEPS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


def replications_to_identify(
    measured: Measurements,
    estimate: Estimate,
    *,
    confidence: float,
    gamma_floor: float,
    gamma_max_width: float,
) -> np.ndarray:
    """[T, S] total number of replications that would make gamma of each pair identifiable.

    Pairs that are identifiable already get the present number.  0 means that no number up to
    `MAX_REPLICATIONS` is enough: the target's own effect is not above the floor, or it has too few
    held-out rows.  With one replication all are 0, because training noise is not known.

    Args:
        measured: the paired losses of all runs.
        estimate: the effects per example that were estimated from them.
        confidence: as for `estimate_effects`.
        gamma_floor: nats per response token per example.
        gamma_max_width: widest interval of an identifiable gamma.
    """
    matrix, errors = estimate.matrix, estimate.errors
    needed_TS = np.zeros(matrix.effect_TS.shape, dtype=np.int64)
    if errors.training is None:
        return needed_TS
    count = measured.num_replications
    needed_TS[matrix.identifiable_TS] = count
    training_TS = errors.training.variance_TS
    heldout_df_T = np.array([row_RSH.shape[2] - 1 for row_RSH in measured.differences])
    floor_T = np.full(measured.own_T.size, gamma_floor)
    now_TS = training_TS / count + errors.heldout_TS
    for more in sorted({min(int(np.ceil(count * step)), MAX_REPLICATIONS) for step in _STEPS}):
        if more <= count:
            continue
        variance_TS = training_TS / more + errors.heldout_TS
        # Satterthwaite, as `system.influence.estimate.noise` has it.
        inverse_TS = errors.heldout_TS**2 / heldout_df_T[:, None] + (training_TS / more) ** 2 / (
            errors.training.df_TS * (more - 1) / (count - 1)
        )
        df_TS = variance_TS**2 / np.maximum(inverse_TS, 1e-300)
        # Covariances shrink with the standard errors of both entries: correlations stay.
        share_TS = np.sqrt(np.where(now_TS > 0, variance_TS / np.maximum(now_TS, 1e-300), 1.0))
        own_T = np.maximum(measured.own_T, 0)
        share_own_T = share_TS[np.arange(own_T.size), own_T]
        covariance_TS = errors.own_covariance_TS * share_TS * share_own_T[:, None]
        _, low_TS, high_TS = gamma_intervals(
            matrix.effect_TS,
            variance_TS / matrix.dose_S**2,
            replace(errors, own_covariance_TS=covariance_TS),
            matrix.dose_S,
            measured.own_T,
            stats.t.ppf(0.5 + confidence / 2.0, np.maximum(df_TS, 1.0)),
            floor_T,
        )
        width_TS = high_TS - low_TS
        is_known_TS = np.isfinite(width_TS) & (width_TS <= gamma_max_width)
        needed_TS[(needed_TS == 0) & is_known_TS] = more
    return needed_TS


def identify_json(
    matrix: EffectMatrix, needed_TS: np.ndarray, replications: int
) -> dict[str, Any] | None:
    """The entry `identify` of `summary.json`; None with one replication, which cannot tell.

    Keys:
        replications: [T][S]; null if no number up to `most` is enough.
        most: `MAX_REPLICATIONS`.
        open: number of pairs of different categories that are not identifiable yet.
        half, all: replications that identify half, or all, of those open pairs that some number
            can identify; null if there are no such pairs.
        never: number of open pairs that no number can identify.
        unclear: targets whose own effect is not clearly positive, so none of their gammas is known.
    """
    if replications < 2:
        return None
    # An external target has no own effect, so it never has a gamma.
    is_owned_T1 = matrix.own_TS.any(axis=1, keepdims=True)
    open_TS = ~matrix.own_TS & ~matrix.identifiable_TS & is_owned_T1
    reachable = np.sort(needed_TS[open_TS & (needed_TS > replications)])
    return {
        "replications": [[int(n) if n else None for n in row] for row in needed_TS.tolist()],
        "most": MAX_REPLICATIONS,
        "open": int(open_TS.sum()),
        "half": int(reachable[(reachable.size - 1) // 2]) if reachable.size else None,
        "all": int(reachable[-1]) if reachable.size else None,
        "never": int((open_TS & (needed_TS == 0)).sum()),
        "unclear": _unclear(matrix),
    }


def _unclear(matrix: EffectMatrix) -> Sequence[str]:
    return [
        name
        for row, name in enumerate(matrix.targets)
        if matrix.own_TS[row].any() and not np.isfinite(matrix.gamma_TS[row]).any()
    ]
