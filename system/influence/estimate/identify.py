"""What it would take to know gamma of a pair: replications, or something else.

A pair is identifiable when its target's own effect lies clearly above the floor and gamma's
interval is narrow (`system.influence.estimate.matrix`).  With more replications the noise of
training falls, held-out sampling does not (`system.influence.estimate.noise`), and the errors
themselves are known better. Here every interval is computed again as it would be with more
replications, were the effects found to be what they are now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from system.influence.estimate.matrix import EffectMatrix, Estimate, gamma_intervals
from system.influence.estimate.measurements import Measurements

MOST = 64
"""Replications beyond which nobody goes: then something else has to change."""
_STEPS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


def replications_to_identify(
    measured: Measurements,
    estimate: Estimate,
    *,
    confidence: float,
    gamma_floor: float,
    gamma_max_width: float,
) -> np.ndarray:
    """[T, S] replications, in all, with which gamma of a pair would be identifiable.

    The number there is where it is already, 0 where none up to `MOST` would do: the target has no
    own effect above the floor, or its held-out rows are too few.  All 0 with one replication, which
    says nothing of the noise of training.

    Args:
        measured: the paired losses of all runs.
        estimate: effects per example, of these.
        confidence: as for `estimate_effects`, and so the others.
        gamma_floor: nats per response token per example.
        gamma_max_width: of gamma's interval.
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
    for more in sorted({min(int(np.ceil(count * step)), MOST) for step in _STEPS}):
        if more <= count:
            continue
        variance_TS = training_TS / more + errors.heldout_TS
        # Satterthwaite, as `system.influence.estimate.noise` has it.
        inverse_TS = errors.heldout_TS**2 / heldout_df_T[:, None] + (training_TS / more) ** 2 / (
            errors.training.df_TS * (more - 1) / (count - 1)
        )
        df_TS = variance_TS**2 / np.maximum(inverse_TS, 1e-300)
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
    """For `summary.json`: replications by pair, and what of the pairs they cannot reach.

    Keys: `replications` ([T][S], null where none up to `most` would do), `most`, `open` (pairs of
    different categories that are not identifiable), `half` and `all`
    (replications that identify half of, and all, the pairs off the diagonal that some number
    reaches and that are not known yet; null where there are none such), `never` (how many none
    reaches), `unclear` (targets whose own effect is not clearly positive, so that no gamma of
    theirs is known).  None with one replication, which says nothing of any of it.
    """
    if replications < 2:
        return None
    # A target that no source owns has no gamma at all, whatever is measured.
    is_owned_T1 = matrix.own_TS.any(axis=1, keepdims=True)
    open_TS = ~matrix.own_TS & ~matrix.identifiable_TS & is_owned_T1
    reachable = np.sort(needed_TS[open_TS & (needed_TS > replications)])
    return {
        "replications": [[int(n) if n else None for n in row] for row in needed_TS.tolist()],
        "most": MOST,
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
