"""What the effects promised for each arm beside what training on it brought.

A mix is chosen by predictions; other mixes, which nothing was chosen for, show whether the
predictions hold away from it.  Predicted is what the measured effects say of the counts that an arm
was trained on, realised the paired difference on the test split; both positive for better.  Effects
know categories and no order, so the arms of one mix are promised the same.
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
    """What is needed to predict the arms of an evaluation."""

    predictor: MixPredictor
    counts: Mapping[str, Sequence[Mapping[str, float]]]
    """Arm -> category -> examples of one pass, for every training.  The promise for an arm whose
    trainings differ, like `random`, is the mean of theirs."""
    unit: str
    """Of the effects: nats per response token, or share of right answers."""


def predicted_and_realised(
    performance: Performance,
    forecast: ArmForecast,
    importance: Mapping[str, float],
    confidence: float,
    *,
    is_binary: bool = False,
) -> list[dict[str, Any]]:
    """Every arm against the natural mix; the solved mix against the uniform and the random one.

    Args:
        performance: of the metric that effects are in.
        forecast: counts of the arms that were trained, and what they promise.
        importance: weights of the overall gain; its names are the targets looked at, as far as
            effects were measured on them.
        confidence: level of the intervals.
        is_binary: see `contrast`.

    Returns:
        Objects {arm, reference, targets, overall, slope, rank_correlation}; `slope` is what was
        realised per unit of predicted, over targets.
    """
    weights = {t: importance[t] for t in forecast.predictor.targets if t in importance}
    if not weights:
        return []
    found = []
    for arm, reference in _pairs(forecast.counts):
        mixes = forecast.counts[arm], forecast.counts[reference]
        rows = []
        for target, of in [*((name, {name: 1.0}) for name in weights), (None, weights)]:
            promise = forecast.predictor.gain(*mixes, of)
            outcome = contrast(
                performance, {arm: 1.0, reference: -1.0}, of, confidence, is_binary=is_binary
            )
            rows.append(_beside(target, promise, outcome))
        *targets, overall = rows
        found.append(
            {
                "arm": arm,
                "reference": reference,
                "targets": targets,
                "overall": overall,
                **_kept(targets),
            }
        )
    return found


def _pairs(arms: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if NATURAL in arms:
        yield from ((arm, NATURAL) for arm in arms if arm != NATURAL)
    if SOLVED in arms:
        yield from ((SOLVED, other) for other in (UNIFORM, RANDOM) if other in arms)


def _kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How the outcomes of the targets follow their promises."""
    promised = np.array([row["predicted"] for row in rows])
    brought = np.array([row["realised"] for row in rows])
    varies = len(rows) > 2 and promised.std() > 0 and brought.std() > 0
    size = float(promised @ promised)
    return {
        "slope": float(promised @ brought) / size if size > 0 else None,
        "rank_correlation": float(np.asarray(stats.spearmanr(promised, brought))[0])
        if varies
        else None,
    }


def _beside(target: str | None, promise: Promise, outcome: Contrast) -> dict[str, Any]:
    return {
        "target": target, "predicted": promise.value, "predicted_se": promise.se,
        "realised": outcome.value, "se": outcome.se, "low": outcome.low, "high": outcome.high,
        "verdict": outcome.verdict,
    }  # fmt: skip
