"""Predicted and realised gains of the arms.

The predicted gain comes from the measured effects and the counts that an arm was trained on.  The
realised gain is the paired difference on the test split.  Both are positive if the arm is better.
The solved mix was chosen because of its prediction; other mixes were not, so they show whether
predictions hold elsewhere.  Effects do not depend on the order of examples, so all arms with the
same mix have the same prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from system.evaluation.contrast import Contrast, Performance, contrast
from system.solve import MixPredictor, Promise

NATURAL, UNIFORM, RANDOM, SOLVED = "natural", "uniform", "random", "solved"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmForecast:
    """The inputs that predictions for arms need."""

    predictor: MixPredictor
    counts: Mapping[str, Sequence[Mapping[str, float]]]
    """Arm -> for each training, category -> examples per pass.  If the trainings of an arm differ,
    as those of `random` do, the prediction is the mean over them."""
    unit: str
    """Unit of the effects: nats per response token, or share of correct answers."""


def predicted_and_realised(
    performance: Performance,
    forecast: ArmForecast,
    importance: Mapping[str, float],
    confidence: float,
    *,
    is_binary: bool = False,
) -> list[dict[str, Any]]:
    """Gains of every arm over the natural mix, and of the solved mix over uniform and random.

    Args:
        performance: in the same metric as the effects.
        forecast: counts of the trained arms, and the predictor.
        importance: weights of the overall gain.  Its names are the compared targets, except those
            without measured effects.
        confidence: level of the intervals.
        is_binary: see `contrast`.

    Returns:
        Objects {arm, reference, targets, overall, slope, rank_correlation}; `slope` is the realised
        gain per unit of predicted gain, over targets.
    """
    weights = {t: importance[t] for t in forecast.predictor.targets if t in importance}
    if not weights:
        return []
    comparisons = []
    for arm, reference in _pairs(forecast.counts):
        mixes = forecast.counts[arm], forecast.counts[reference]
        rows = []
        for target, target_weights in [*((name, {name: 1.0}) for name in weights), (None, weights)]:
            predicted = forecast.predictor.gain(*mixes, target_weights)
            realised = contrast(
                performance,
                {arm: 1.0, reference: -1.0},
                target_weights,
                confidence,
                is_binary=is_binary,
            )
            rows.append(_row(target, predicted, realised))
        *targets, overall = rows
        comparisons.append(
            {
                "arm": arm,
                "reference": reference,
                "targets": targets,
                "overall": overall,
                **_agreement(targets),
            }
        )
    return comparisons


def _pairs(arms: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if NATURAL in arms:
        yield from ((arm, NATURAL) for arm in arms if arm != NATURAL)
    if SOLVED in arms:
        yield from ((SOLVED, other) for other in (UNIFORM, RANDOM) if other in arms)


def _agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How well the realised gains of the targets follow the predicted ones."""
    predicted = np.array([row["predicted"] for row in rows])
    realised = np.array([row["realised"] for row in rows])
    varies = len(rows) > 2 and predicted.std() > 0 and realised.std() > 0
    size = float(predicted @ predicted)
    return {
        "slope": float(predicted @ realised) / size if size > 0 else None,
        "rank_correlation": float(np.asarray(stats.spearmanr(predicted, realised))[0])
        if varies
        else None,
    }


def _row(target: str | None, predicted: Promise, realised: Contrast) -> dict[str, Any]:
    return {
        "target": target, "predicted": predicted.value, "predicted_se": predicted.se,
        "realised": realised.value, "se": realised.se, "low": realised.low, "high": realised.high,
        "verdict": realised.verdict,
    }  # fmt: skip
