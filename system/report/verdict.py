"""The verdict: the first section of the report page, in plain sentences made from the numbers.

It answers six questions: what was gained, whether the effect matrix is reproducible, whether the
prediction was right, what the mix changes, whether the order matters, and what the run cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from statistics import NormalDist
from typing import Any, Literal

from system.influence.design.estimators import FIRST_ORDER
from system.influence.estimate.summary import direction_worth_agreement, worth_agreement
from system.report.evaluation_section import NATURAL, comparisons, overall, tally
from system.report.formatting import (
    MINUS,
    NOTHING,
    count,
    decimals,
    duration,
    fixed,
    interval,
    percent,
    plural,
    quote,
    sentence,
    signed,
    span,
)
from system.report.run_section import total_seconds
from system.report.view import Evaluation, RunView
from system.solve.mix import CategoryMix, Mix

PREFERRED_ARMS = ("solved-curriculum", "solved")
"""The headline shows the gain of the first of these arms that was trained."""
AGREES_WELL, AGREES_PARTLY = 0.6, 0.3
"""Smallest rank correlations of split halves that are called good and partial agreement.

These thresholds are a judgement; the page always shows the correlation itself."""
_ARM_NAMES = {
    "solved-curriculum": "the solved mix with its curriculum",
    "solved": "the solved mix",
}

_ORDER_SCOPES = {True: "mean over the natural and the solved mix", False: "on the solved mix"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A key number at the top of the page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A question and its short answer."""

    question: str
    answer: tuple[str, ...]
    """Paragraphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The conclusions of a run: headline, key numbers, and answers to the usual questions."""

    headline: str
    outcome: Literal["better", "worse", "tie", "open"]
    tiles: tuple[Tile, ...]
    points: tuple[Point, ...]


def give_verdict(view: RunView) -> Verdict:
    """The verdict on a run; where a stage has not run, the answer names the missing stage."""
    headline, outcome = _headline(view)
    points = [
        Point(question="What was gained?", answer=_gain(view)),
        Point(question="Is the effect matrix reproducible?", answer=_agreement(view)),
        Point(question="Was the prediction right?", answer=(_prediction(view),)),
        Point(question="What does the mix change?", answer=_changes(view)),
        Point(question="Does the order matter?", answer=(_order(view),)),
        Point(question="What did it cost?", answer=(_cost(view),)),
    ]
    return Verdict(headline=headline, outcome=outcome, tiles=_tiles(view), points=tuple(points))


def headline_comparison(evaluation: Evaluation) -> dict[str, Any] | None:
    """The comparison of losses that the headline shows; None if there is none.

    It compares the first trained arm of `PREFERRED_ARMS` with the natural mix, over all categories
    weighted by importance.
    """
    rows = comparisons(evaluation, "loss", NATURAL)
    for arm in PREFERRED_ARMS:
        row = overall(rows, arm, "importance")
        if row is not None:
            return row
    return None


def _headline(view: RunView) -> tuple[str, Literal["better", "worse", "tie", "open"]]:
    if view.evaluation is None:
        return (
            "No model has been evaluated on held-out data yet, so it is not known whether the "
            "solved mix is better than the natural mix.",
            "open",
        )
    row = headline_comparison(view.evaluation)
    if row is None:
        return (
            "The evaluation did not train both a solved and a natural mix, so the "
            "gain of the solved mix is not known.",
            "open",
        )
    arm = _ARM_NAMES[row["arm"]]
    arm = arm[0].upper() + arm[1:]
    size, ends = fixed(abs(row["value"]), 4), span(row["low"], row["high"], 4)
    level = percent(view.evaluation.summary["confidence"], 0)
    if row["verdict"] == "better":
        text = (
            f"{arm} beats the natural mix on held-out data by {size} nats per token "
            f"({level} interval of the gain: {ends})."
        )
    elif row["verdict"] == "worse":
        text = (
            f"{arm} is worse than the natural mix on held-out data by {size} nats per token "
            f"({level} interval of the gain: {ends})."
        )
    else:
        text = (
            f"{arm} and the natural mix are tied on held-out data: the gain is "
            f"{signed(row['value'], 4)} nats per token, and its {level} interval ({ends}) contains "
            "zero."
        )
    return text, row["verdict"]


def _gain(view: RunView) -> tuple[str, ...]:
    if view.evaluation is None:
        return (_not_yet("evaluate"),)
    rows = comparisons(view.evaluation, "loss", NATURAL)
    if not rows:
        return ("No arm was compared with the natural mix.",)
    first = (
        "Gains are in nats per response token, compared with a natural mix of the same budget; "
        "positive is better."
    )
    natural = next(
        (
            row["value"]
            for row in view.evaluation.summary["losses"]
            if row["arm"] == NATURAL and row["category"] is None
        ),
        None,
    )
    if natural is not None:
        first += f" The held-out loss of the natural mix is {fixed(natural, 4)}."
    lines = [first]
    if note := view.evaluation.summary["importance_note"]:
        lines.append(sentence(note))
    for arm in dict.fromkeys(row["arm"] for row in reversed(rows)):
        row = overall(rows, arm, "importance")
        assert row is not None, "every compared arm is compared over all categories"
        verdicts = tally(rows, arm)
        lines.append(
            f"{arm}: {signed(row['value'], 4)} {interval(row['low'], row['high'], 4)}, "
            f"{row['verdict']}. By category: {verdicts['better']} better, {verdicts['tie']} tied, "
            f"{verdicts['worse']} worse."
        )
    if any(row["se_seeds"] is None for row in rows):
        lines.append(
            "Each arm was trained once (one seed), so these intervals do not include the random "
            "variation between trainings."
        )
    return tuple(lines)


def _agreement(view: RunView) -> tuple[str, ...]:
    if view.influence is None:
        return (_not_yet("influence"),)
    summary = view.influence.summary
    parts = []
    for direction, part in summary["directions"].items():
        halves = part["agreement"]
        if halves is None:
            parts.append(
                "Unknown: this check needs at least two replications and three categories."
            )
            break
        rank = halves["rank"]
        parts.append(
            f"{_belief(rank)} Effects measured by {_verb(direction)}: the "
            f"{summary['replications']} replications were split into halves and compared. The rank "
            f"correlation of the effects of pairs is {fixed(rank['value'], 2)} "
            f"({percent(summary['confidence'], 0)} interval "
            f"{interval(rank['low'], rank['high'], 2, with_sign=False)}). The rank correlation of "
            "the worth of categories (the mean effect on all targets), each half scored on "
            f"different held-out rows, is {_worth(direction_worth_agreement(part))}. "
            f"{part['significant_pairs']:,} of {part['pairs']:,} pairs have an effect that differs "
            "significantly from zero."
        )
    if summary["estimator"] == "gradient":
        parts.append(sentence(FIRST_ORDER))
    if worth_agreement(summary["directions"]) is None:
        parts.append(
            "It could not be checked whether a new measurement would give the same worth of the "
            "categories."
        )
    if not summary["is_believed"]:
        parts.append(
            "The agreement on worth is below influence.min_agreement "
            f"({summary['min_agreement']:g}), so the solver keeps the base mix."
        )
    return tuple(parts)


def _worth(value: float | None) -> str:
    return "unknown" if value is None else fixed(value, 2)


def _belief(rank: dict[str, float | None]) -> str:
    value, low = rank["value"], rank["low"]
    if value is None:
        return "Unknown."
    if low is not None and low <= 0:
        return "Not shown for single pairs: the agreement may be chance."
    if value >= AGREES_WELL:
        return "Mostly yes."
    if value >= AGREES_PARTLY:
        return "Partly: single entries are uncertain."
    return "Hardly for single pairs."


def _prediction(view: RunView) -> str:
    if view.mix is None:
        return _not_yet("solve")
    mix = view.mix
    digits = decimals([mix.expected_gain], least=4)
    predicted = signed(mix.expected_gain, digits)
    if mix.expected_gain_se is not None:
        predicted += f" ± {fixed(mix.expected_gain_se, digits)}"
    if view.evaluation is None or view.evaluation.summary["prediction"] is None:
        return (
            f"The solver predicts a gain of {predicted} ({mix.effect_unit}). The realised gain is "
            "not measured yet."
        )
    prediction = view.evaluation.summary["prediction"]
    total = prediction["overall"]
    text = (
        f"The solver predicted a gain of {signed(total['predicted'], 4)} ({mix.effect_unit}). "
        "Training on the solved mix (shuffled, compared with the natural mix) realised "
        f"{signed(total['realised'], 4)} {interval(total['low'], total['high'], 4)}."
    )
    if total["low"] <= total["predicted"] <= total["high"]:
        text += " The prediction lies inside the interval of the realised gain."
    elif abs(total["predicted"] - total["realised"]) <= _error_margin(total, view):
        text += " The difference is within the errors of both numbers."
    elif total["realised"] < total["predicted"]:
        text += " The prediction was too high."
    else:
        text += " The prediction was too low."
    if prediction["slope"] is not None:
        text += (
            f" Over the targets, {fixed(prediction['slope'], 2)} was realised per unit of "
            "predicted gain."
        )
    return text


def _error_margin(total: dict[str, Any], view: RunView) -> float:
    """Largest difference of predicted and realised gain that the errors of both explain."""
    assert view.evaluation is not None
    realised = (total["high"] - total["low"]) / 2
    quantile = NormalDist().inv_cdf(0.5 + view.evaluation.summary["confidence"] / 2)
    return hypot(realised, quantile * (total["predicted_se"] or 0.0))


def _changes(view: RunView) -> tuple[str, ...]:
    if view.mix is None:
        return (_not_yet("solve"),)
    mix = view.mix
    if mix.moved == 0:
        return ("Nothing: the mix is the base mix.", *[sentence(note) for note in mix.notes])
    ranked = sorted(mix.categories, key=lambda c: (c.count - c.base, c.category))
    up = [c for c in reversed(ranked) if c.count - c.base >= 0.5]
    down = [c for c in ranked if c.base - c.count >= 0.5]
    lines = [f"The solved mix moves {percent(mix.moved)} of {count(mix.budget)} {mix.unit}."]
    for word, moved in (("More", up), ("Less", down)):
        if moved:
            rest = f"; and {plural(len(moved) - 3, 'other')}" if len(moved) > 3 else ""
            lines.append(f"{word}: {', '.join(_change(c) for c in moved[:3])}{rest}.")
    return tuple(lines)


def _change(category: CategoryMix) -> str:
    moved = category.count - category.base
    text = f"{quote(category.category)} {count(round(category.base))} → {count(category.count)}"
    if category.base > 0:
        share = f"{abs(moved) / category.base:.0%}".replace("%", " %")
        text += f" ({'+' if moved > 0 else MINUS}{share})"
    return text


def _order(view: RunView) -> str:
    if view.evaluation is None:
        return _not_yet("evaluate")
    for row in view.evaluation.summary["factors"]:
        if row["factor"] == "order" and row["weighting"] == "importance":
            answer = {"better": "It helps", "worse": "It harms", "tie": "A tie"}[row["verdict"]]
            return (
                f"{answer}: curriculum order instead of shuffling changes performance by "
                f"{signed(row['value'], 4)} nats {interval(row['low'], row['high'], 4)}, "
                f"{_ORDER_SCOPES['natural-curriculum' in row['formula']]}."
            )
    return "Not measured: no mix was trained both shuffled and in curriculum order."


def _cost(view: RunView) -> str:
    if not view.records:
        return "Nothing has run yet."
    ranked = sorted(view.records.values(), key=lambda record: -record.seconds)[:3]
    text = (
        f"{duration(total_seconds(view))} in total; the longest stages: "
        + ", ".join(f"{record.stage} ({duration(record.seconds)})" for record in ranked)
        + "."
    )
    if view.influence is not None:
        cost = view.influence.summary["cost"]
        text += (
            f" The effect matrix took {plural(cost['runs'], 'training')} on "
            f"{cost['trained_tokens']:,} tokens."
        )
    return text


def _tiles(view: RunView) -> tuple[Tile, ...]:
    gain = headline_comparison(view.evaluation) if view.evaluation is not None else None
    worth = (
        None if view.influence is None else worth_agreement(view.influence.summary["directions"])
    )
    prediction = None if view.evaluation is None else view.evaluation.summary["prediction"]
    return (
        Tile(
            label="gain over the natural mix",
            value=NOTHING if gain is None else signed(gain["value"], 4),
            note="not evaluated yet"
            if gain is None
            else f"{interval(gain['low'], gain['high'], 4)} nats per token: {gain['verdict']}",
        ),
        Tile(
            label="reproducibility of the matrix",
            value=NOTHING if worth is None else fixed(worth, 2),
            note="not measured"
            if worth is None
            else "rank correlation of the worth of categories between split halves, scored on "
            "different held-out rows",
        ),
        Tile(
            label="predicted → realised gain",
            value=_prediction_tile(view.mix, prediction),
            note="solved mix, nats per token",
        ),
        Tile(
            label="time of all stages",
            value=duration(total_seconds(view)) if view.records else NOTHING,
            note=plural(len(view.records), "stage finished", "stages finished"),
        ),
    )


def _prediction_tile(mix: Mix | None, prediction: dict[str, Any] | None) -> str:
    if prediction is not None:
        total = prediction["overall"]
        return f"{signed(total['predicted'], 3)} → {signed(total['realised'], 3)}"
    return NOTHING if mix is None else f"{signed(mix.expected_gain, 3)} → ?"


def _verb(direction: str) -> str:
    return {"add": "adding", "remove": "removing"}[direction]


def _not_yet(stage: str) -> str:
    return f"Not known yet: stage `{stage}` has not run."
