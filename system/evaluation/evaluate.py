"""Compares the trained arms on held-out data: losses, correct answers, and predicted gains.

The stage `evaluate` calls `summarise` and writes the result as `summary.json`.

A gain is in nats per response token: the loss of the reference minus the loss of the arm, so that
positive is better.  The loss is the mean over examples of their mean token loss.  For accuracy the
gain is the difference of the shares of correct answers.  All comparisons use the same examples and
the same training seeds (error model: `system.evaluation.contrast`).  If the interval contains zero,
the verdict is a tie.  Verdicts are not corrected for their number: at 95 % confidence, about one of
twenty true ties is reported as better or worse.

`summary.json`:
    arms          [{name, mix, order, seeds, examples, response_tokens, steps, counts}]
    losses        [{arm, category, value, se, low, high}]; category null: all, by importance
    comparisons   [{metric, arm, reference, category, weighting, <contrast>}]
                  metric `loss` | `accuracy`; category null: over all, weighting `importance` |
                  `uniform`
    factors       [{factor, formula, weighting, <contrast>}]         factor `mix` | `order` |
                  `reversed order` | `interaction`
    accuracy      [{arm, category, rows, seeds, value, low, high}]
    importance    weights of the categories; importance_note names targets of `solve.importance`
                  that are missing from them, empty: none
    left_out, answers_left_out   category -> rows that some model could not score, or not answer
    predictions   [{arm, reference, targets: [<outcome>], overall: <outcome>, slope,
                  rank_correlation}], see `system.evaluation.prediction`
    prediction    that of the solved mix against the natural mix; null: not both were trained
    prediction_unit  unit of all of these; null: nothing was predicted
with <contrast> = value, se, se_seeds, se_heldout, low, high, verdict, seeds, rows and <outcome> =
target, predicted, predicted_se, realised, se, low, high, verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from system.errors import DataError
from system.evaluation.contrast import Performance, contrast
from system.evaluation.prediction import (
    NATURAL,
    RANDOM,
    SOLVED,
    UNIFORM,
    ArmForecast,
    predicted_and_realised,
)
from system.evaluation.tables import performance_of
from system.intervals import wilson_interval
from system.solve.mix import ANSWERS

BASE, DELIVERED = "base", "delivered"
_UNTRAINED_OR_ONCE = (BASE, DELIVERED)

FACTORS: dict[str, tuple[tuple[str, dict[str, float]], ...]] = {
    "mix": (
        (
            "((solved - natural) + (solved-curriculum - natural-curriculum)) / 2",
            {"solved": 0.5, "natural": -0.5, "solved-curriculum": 0.5, "natural-curriculum": -0.5},
        ),
        ("solved - natural", {"solved": 1.0, "natural": -1.0}),
    ),
    "order": (
        (
            "((natural-curriculum - natural) + (solved-curriculum - solved)) / 2",
            {"natural-curriculum": 0.5, "natural": -0.5, "solved-curriculum": 0.5, "solved": -0.5},
        ),
        ("solved-curriculum - solved", {"solved-curriculum": 1.0, "solved": -1.0}),
    ),
    "reversed order": (
        (
            "((natural-reversed - natural) + (solved-reversed - solved)) / 2",
            {"natural-reversed": 0.5, "natural": -0.5, "solved-reversed": 0.5, "solved": -0.5},
        ),
        ("solved-reversed - solved", {"solved-reversed": 1.0, "solved": -1.0}),
    ),
    "interaction": (
        (
            "(solved-curriculum - solved) - (natural-curriculum - natural)",
            {"solved-curriculum": 1.0, "solved": -1.0, "natural-curriculum": -1.0, "natural": 1.0},
        ),
    ),
}
"""Factor -> formulas, the most precise first; the first whose arms were all trained is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmInfo:
    """Facts about the training data of an arm."""

    name: str
    mix: str
    """natural | uniform | random | solved."""
    order: str
    """shuffled | curriculum | reversed."""
    seeds: int
    examples: int
    response_tokens: int
    """Mean over seeds."""
    steps: int
    counts: dict[str, float]
    """Examples of each category over all passes, mean over seeds."""


def summarise(
    *,
    losses: pa.Table,
    outcomes: pa.Table,
    arms: Sequence[ArmInfo],
    importance: Mapping[str, float],
    forecast: ArmForecast | None,
    confidence: float,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        losses: LOSSES of all arms and seeds; arm `base` is the untrained model.
        outcomes: OUTCOMES, possibly empty.
        arms: the trained arms, in the order in which the report lists them.
        importance: weight of each target; it is normalised over the categories that were scored.
        forecast: predictions of the measured effects for the arms; None: no prediction.
        confidence: level of all intervals.

    Raises:
        DataError: no category has two examples that every model scored.
    """
    performance, left_out = performance_of(losses, "loss")
    categories = list(next(iter(performance.values())))
    if not categories:
        raise DataError(
            "evaluation: expected at least two test rows of some category that every model could "
            f"score, found none; left out: {left_out}. Raise evaluate.test_rows, or add data."
        )
    weightings = _weightings(categories, importance)
    trained = [arm.name for arm in arms if arm.name != BASE]
    summary: dict[str, Any] = {
        "confidence": confidence,
        "unit": "nats per response token; positive values favour the arm",
        "importance": weightings["importance"],
        "importance_note": importance_note(categories, importance),
        "test_rows": {c: performance[BASE][c].shape[1] for c in categories},
        "left_out": left_out,
        "arms": [asdict(arm) for arm in arms],
        "losses": list(_levels(performance, [BASE, *trained], weightings, confidence)),
        "comparisons": list(_comparisons("loss", performance, trained, weightings, confidence)),
        "factors": list(_factors(performance, weightings, confidence)),
        "accuracy": [],
        "answers_left_out": {},
        "predictions": [],
        "prediction_unit": None if forecast is None else forecast.unit,
    }
    predicts_answers = forecast is not None and forecast.unit == ANSWERS
    if forecast is not None and not predicts_answers:
        summary["predictions"] = predicted_and_realised(
            performance, forecast, weightings["importance"], confidence
        )
    if outcomes.num_rows:
        forecast_of_answers = forecast if predicts_answers else None
        _add_answers(summary, outcomes, trained, importance, forecast_of_answers)
    summary["prediction"] = next(
        (
            prediction
            for prediction in summary["predictions"]
            if (prediction["arm"], prediction["reference"]) == (SOLVED, NATURAL)
        ),
        None,
    )
    return summary


def _add_answers(
    summary: dict[str, Any],
    outcomes: pa.Table,
    trained: Sequence[str],
    importance: Mapping[str, float],
    forecast: ArmForecast | None,
) -> None:
    """Adds shares of correct answers, their comparisons, and predictions to the summary."""
    confidence = summary["confidence"]
    answers, summary["answers_left_out"] = performance_of(outcomes, "correct")
    checked = _weightings(list(next(iter(answers.values()))), importance)
    summary["accuracy"] = list(_shares(answers, [BASE, *trained], confidence))
    if not checked["uniform"]:
        return
    if forecast is not None:
        summary["predictions"] = predicted_and_realised(
            answers, forecast, checked["importance"], confidence, is_binary=True
        )
    summary["comparisons"] += _comparisons("accuracy", answers, trained, checked, confidence)


def headline(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The most important comparisons, one line each, for the log of the stage."""
    lines = [summary["importance_note"]] if summary["importance_note"] else []
    for row in summary["comparisons"]:
        is_overall = row["category"] is None and row["weighting"] == "importance"
        if not is_overall or row["metric"] != "loss":
            continue
        if row["reference"] in (NATURAL, UNIFORM, RANDOM) or row["arm"] in (NATURAL, DELIVERED):
            note = "" if row["se_seeds"] is not None else ", one training"
            lines.append(
                f"{row['arm']} against {row['reference']}: {row['value']:+.4f} nats per token "
                f"({row['low']:+.4f} to {row['high']:+.4f}{note}): {row['verdict']}"
            )
    return tuple(lines)


def importance_note(categories: Sequence[str], importance: Mapping[str, float]) -> str:
    """A sentence on targets of `solve.importance` that have no test rows; empty if all have some.

    A further target (`influence.targets`) has no test rows if its `test_share` is 0, or if too few
    of its rows remain after those in the training data are left out.
    """
    lost = {name: w for name, w in importance.items() if w > 0 and name not in categories}
    if not lost:
        return ""
    share = sum(lost.values()) / sum(importance.values())
    names = ", ".join(sorted(lost))
    rest = (
        "the other targets keep their relative weights"
        if any(importance.get(name, 0.0) > 0 for name in categories)
        else "`by importance` here weights all categories equally"
    )
    return f"targets without test rows ({names}) have {share:.0%} of solve.importance: {rest}"


def _weightings(
    categories: Sequence[str], importance: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    total = sum(importance.get(c, 0.0) for c in categories)
    uniform = {c: 1.0 / len(categories) for c in categories}
    if total <= 0:
        return {"importance": uniform, "uniform": uniform}
    return {
        "importance": {c: importance.get(c, 0.0) / total for c in categories},
        "uniform": uniform,
    }


def _scopes(
    weightings: Mapping[str, Mapping[str, float]],
) -> Iterator[tuple[str | None, str, Mapping[str, float]]]:
    """All categories with each weighting, then single ones: (category, weighting, weights)."""
    for weighting, weights in weightings.items():
        yield None, weighting, weights
    for category in weightings["uniform"]:
        yield category, "category", {category: 1.0}


def _levels(
    performance: Performance,
    arms: Sequence[str],
    weightings: Mapping[str, Mapping[str, float]],
    confidence: float,
) -> Iterator[dict[str, Any]]:
    for arm in arms:
        for category, weighting, weights in _scopes(weightings):
            if weighting == "uniform":
                continue
            level = contrast(performance, {arm: 1.0}, weights, confidence)
            yield {
                "arm": arm, "category": category, "value": -level.value, "se": level.se,
                "low": -level.high, "high": -level.low,
            }  # fmt: skip


def _comparisons(
    metric: str,
    performance: Performance,
    trained: Sequence[str],
    weightings: Mapping[str, Mapping[str, float]],
    confidence: float,
) -> Iterator[dict[str, Any]]:
    for reference in (NATURAL, UNIFORM, RANDOM, BASE, SOLVED):
        if reference not in performance:
            continue
        for arm in trained:
            if arm == reference or (reference != BASE and arm in _UNTRAINED_OR_ONCE):
                continue
            if reference == SOLVED and not arm.startswith(f"{SOLVED}-"):
                continue  # other orders of the solved mix are compared with it, other mixes are not
            if reference in (UNIFORM, RANDOM) and arm != SOLVED:
                continue  # uniform and random are controls for the solved mix only
            for category, weighting, weights in _scopes(weightings):
                difference = contrast(
                    performance, {arm: 1.0, reference: -1.0}, weights, confidence,
                    is_binary=metric == "accuracy",
                )  # fmt: skip
                yield {
                    "metric": metric, "arm": arm, "reference": reference, "category": category,
                    "weighting": weighting, **difference.to_json(),
                }  # fmt: skip


def _factors(
    performance: Performance, weightings: Mapping[str, Mapping[str, float]], confidence: float
) -> Iterator[dict[str, Any]]:
    for factor, formulas in FACTORS.items():
        usable = [item for item in formulas if set(item[1]) <= set(performance)]
        for formula, coefficients in usable[:1]:
            for weighting, weights in weightings.items():
                difference = contrast(performance, coefficients, weights, confidence)
                yield {
                    "factor": factor, "formula": formula, "weighting": weighting,
                    **difference.to_json(),
                }  # fmt: skip


def _shares(
    answers: Performance, arms: Sequence[str], confidence: float
) -> Iterator[dict[str, Any]]:
    for arm in arms:
        for category, values in answers[arm].items():
            seeds, rows = values.shape
            interval = wilson_interval(float(values.sum()) / seeds, rows, confidence)
            yield {
                "arm": arm, "category": category, "rows": rows, "seeds": seeds,
                **interval.to_json(),
            }  # fmt: skip
