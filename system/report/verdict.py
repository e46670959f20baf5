"""The top of the page: whether to trust the mix, in plain sentences made from the numbers."""

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
"""Whose gain the headline tells: the first that was trained."""
AGREES_WELL, AGREES_PARTLY = 0.6, 0.3
"""Rank correlations of split halves; where the line is drawn is a judgement, the number is not."""
_CALLED = {
    "solved-curriculum": "the solved mix with its curriculum",
    "solved": "the solved mix",
}

_ORDER_OVER = {True: "mean over the natural and the solved mix", False: "on the solved mix"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number to see first."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A sentence or two on one question."""

    question: str
    answer: tuple[str, ...]
    """Lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the run shows, before all details."""

    headline: str
    outcome: Literal["better", "worse", "tie", "open"]
    tiles: tuple[Tile, ...]
    points: tuple[Point, ...]


def give_verdict(view: RunView) -> Verdict:
    """Reads the verdict off the numbers; says what is missing where stages have not run."""
    headline, outcome = _headline(view)
    points = [
        Point(question="What was gained?", answer=_gain(view)),
        Point(question="Does the matrix agree with itself?", answer=_agreement(view)),
        Point(question="Was the promise kept?", answer=(_promise(view),)),
        Point(question="What does the mix change?", answer=_changes(view)),
        Point(question="Does the order matter?", answer=(_order(view),)),
        Point(question="What did it cost?", answer=(_cost(view),)),
    ]
    return Verdict(headline=headline, outcome=outcome, tiles=_tiles(view), points=tuple(points))


def headline_comparison(evaluation: Evaluation) -> dict[str, Any] | None:
    """The preferred arm against the natural mix on losses, over all categories by importance."""
    rows = comparisons(evaluation, "loss", NATURAL)
    for arm in PREFERRED_ARMS:
        found = overall(rows, arm, "importance")
        if found is not None:
            return found
    return None


def _headline(view: RunView) -> tuple[str, Literal["better", "worse", "tie", "open"]]:
    if view.evaluation is None:
        return (
            "Nothing has been judged on held-out data yet, so nothing here shows that the mix is "
            "better than the natural one.",
            "open",
        )
    row = headline_comparison(view.evaluation)
    if row is None:
        return (
            "The evaluation trained no solved mix beside a natural one, so it cannot say what the "
            "mix is worth.",
            "open",
        )
    arm = _CALLED[row["arm"]]
    arm = arm[0].upper() + arm[1:]
    size, ends = fixed(abs(row["value"]), 4), span(row["low"], row["high"], 4)
    level = percent(view.evaluation.summary["confidence"], 0)
    if row["verdict"] == "better":
        text = (
            f"{arm} beats the natural mix on held-out data by {size} nats per token "
            f"({level} interval {ends})."
        )
    elif row["verdict"] == "worse":
        text = (
            f"{arm} is worse than the natural mix on held-out data by {size} nats per token "
            f"({level} interval of the gain {ends})."
        )
    else:
        text = (
            f"{arm} and the natural mix are tied on held-out data: "
            f"{signed(row['value'], 4)} nats per token, and the {level} interval {ends} holds zero."
        )
    return text, row["verdict"]


def _gain(view: RunView) -> tuple[str, ...]:
    if view.evaluation is None:
        return (_not_yet("evaluate"),)
    rows = comparisons(view.evaluation, "loss", NATURAL)
    if not rows:
        return ("No arm was compared with the natural mix.",)
    first = "Nats per response token against a natural mix of equal budget; more is better."
    natural = next(
        (
            row["value"]
            for row in view.evaluation.summary["losses"]
            if row["arm"] == NATURAL and row["category"] is None
        ),
        None,
    )
    if natural is not None:
        first += f" That mix's held-out loss is {fixed(natural, 4)}."
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
            "One training per arm: how trainings differ by chance is not in these intervals."
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
                "Unknown: there is one replication (or fewer than three categories), so the matrix "
                "cannot be compared with itself."
            )
            break
        rank = halves["rank"]
        parts.append(
            f"{_belief(rank)} Measured by {_verb(direction)}, halves of "
            f"{summary['replications']} replications order the interactions of pairs with a rank "
            f"correlation of {fixed(rank['value'], 2)} ({percent(summary['confidence'], 0)} "
            f"{interval(rank['low'], rank['high'], 2, with_sign=False)}), the worth of the "
            "categories, scored on different held-out rows, with "
            f"{_worth(direction_worth_agreement(part))}; "
            f"{part['significant_pairs']:,} of "
            f"{part['pairs']:,} pairs differ from zero."
        )
    if summary["estimator"] == "gradient":
        parts.append(sentence(FIRST_ORDER))
    if worth_agreement(summary["directions"]) is None:
        parts.append(
            "Whether the worth of the categories would come out the same again could not be "
            "checked: nothing here is evidence that it would."
        )
    if not summary["is_believed"]:
        parts.append(
            "Agreement on worth is below influence.min_agreement "
            f"({summary['min_agreement']:g}): the mix stays at the base."
        )
    return tuple(parts)


def _worth(value: float | None) -> str:
    return "one that cannot be said" if value is None else fixed(value, 2)


def _belief(rank: dict[str, float | None]) -> str:
    value, low = rank["value"], rank["low"]
    if value is None:
        return "It cannot be said."
    if low is not None and low <= 0:
        return "Pair by pair not beyond doubt: agreement cannot be told from chance."
    if value >= AGREES_WELL:
        return "Largely."
    if value >= AGREES_PARTLY:
        return "In part; single entries are uncertain."
    return "Pair by pair hardly."


def _promise(view: RunView) -> str:
    if view.mix is None:
        return _not_yet("solve")
    mix = view.mix
    digits = decimals([mix.expected_gain], least=4)
    promised = signed(mix.expected_gain, digits)
    if mix.expected_gain_se is not None:
        promised += f" ± {fixed(mix.expected_gain_se, digits)}"
    if view.evaluation is None or view.evaluation.summary["prediction"] is None:
        return (
            f"The solver promises {promised} ({mix.effect_unit}). What it brings is not measured "
            "yet."
        )
    prediction = view.evaluation.summary["prediction"]
    total = prediction["overall"]
    text = (
        f"The solver promised {signed(total['predicted'], 4)} ({mix.effect_unit}); training on "
        "the solved mix (shuffled, against the natural mix) brought "
        f"{signed(total['realised'], 4)} {interval(total['low'], total['high'], 4)}."
    )
    if total["low"] <= total["predicted"] <= total["high"]:
        text += " The promise lies inside the interval of the outcome."
    elif abs(total["predicted"] - total["realised"]) <= _allowed(total, view):
        text += " They differ by no more than the errors of both allow."
    elif total["realised"] < total["predicted"]:
        text += " It promised too much."
    else:
        text += " It promised too little."
    if prediction["slope"] is not None:
        text += f" Per target, {fixed(prediction['slope'], 2)} came for each one promised."
    return text


def _allowed(total: dict[str, Any], view: RunView) -> float:
    """How far promise and outcome may lie apart by the errors of both."""
    assert view.evaluation is not None
    outcome = (total["high"] - total["low"]) / 2
    quantile = NormalDist().inv_cdf(0.5 + view.evaluation.summary["confidence"] / 2)
    return hypot(outcome, quantile * (total["predicted_se"] or 0.0))


def _changes(view: RunView) -> tuple[str, ...]:
    if view.mix is None:
        return (_not_yet("solve"),)
    mix = view.mix
    if mix.moved == 0:
        return ("Nothing: the mix is the base mix.", *[sentence(note) for note in mix.notes])
    ranked = sorted(mix.categories, key=lambda c: (c.count - c.base, c.category))
    up = [c for c in reversed(ranked) if c.count - c.base >= 0.5]
    down = [c for c in ranked if c.base - c.count >= 0.5]
    lines = [f"It moves {percent(mix.moved)} of {count(mix.budget)} {mix.unit}."]
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
            called = {"better": "It helps", "worse": "It harms", "tie": "A tie"}[row["verdict"]]
            return (
                f"{called}: curriculum order instead of shuffling is worth "
                f"{signed(row['value'], 4)} nats {interval(row['low'], row['high'], 4)}, "
                f"{_ORDER_OVER['natural-curriculum' in row['formula']]}."
            )
    return "Not measured: no arm was trained both shuffled and in curriculum order."


def _cost(view: RunView) -> str:
    if not view.records:
        return "Nothing has run yet."
    ranked = sorted(view.records.values(), key=lambda record: -record.seconds)[:3]
    text = (
        f"{duration(total_seconds(view))} in all; most of it in "
        + ", ".join(f"{record.stage} ({duration(record.seconds)})" for record in ranked)
        + "."
    )
    if view.influence is not None:
        cost = view.influence.summary["cost"]
        text += (
            f" The matrix took {plural(cost['runs'], 'training')} on "
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
            label="the matrix agrees with itself",
            value=NOTHING if worth is None else fixed(worth, 2),
            note="not known"
            if worth is None
            else "rank correlation of split halves on what categories are worth, on different "
            "held-out rows",
        ),
        Tile(
            label="promised, and realised",
            value=_promise_tile(view.mix, prediction),
            note="solved mix, nats per token",
        ),
        Tile(
            label="time of all stages",
            value=duration(total_seconds(view)) if view.records else NOTHING,
            note=plural(len(view.records), "stage finished", "stages finished"),
        ),
    )


def _promise_tile(mix: Mix | None, prediction: dict[str, Any] | None) -> str:
    if prediction is not None:
        total = prediction["overall"]
        return f"{signed(total['predicted'], 3)} → {signed(total['realised'], 3)}"
    return NOTHING if mix is None else f"{signed(mix.expected_gain, 3)} → ?"


def _verb(direction: str) -> str:
    return {"add": "adding", "remove": "removing"}[direction]


def _not_yet(stage: str) -> str:
    return f"Not known yet: the stage {stage} has not run."
