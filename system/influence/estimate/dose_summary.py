"""The results of several doses for the report (`doses` in summary.json) and as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from system.influence.design.doses import in_words
from system.influence.estimate.measurements import Measurements
from system.influence.estimate.returns import Change, Interval, estimate_change, own_effects, worth

_VERB = {"add": "adding", "remove": "removing"}
DIMINISH, GROW, STEADY = "diminish", "grow", "not significant"
"""Verdicts on returns; there is none with one replication or one dose."""


def summarise_doses(
    asked: Sequence[int], levels: Sequence[Mapping[str, Measurements]], confidence: float
) -> dict[str, Any]:
    """The entry `doses` of summary.json; effects are in the summary's unit per example.

    Args:
        asked: requested rows of each dose, ascending.
        levels: for each dose, direction -> paired losses.
        confidence: level of the intervals.
    """
    directions = {
        direction: _direction([level[direction] for level in levels], direction, confidence)
        for direction in levels[-1]
    }
    return {"asked": list(asked), "confidence": confidence, "directions": directions}


def _direction(levels: list[Measurements], direction: str, confidence: float) -> dict[str, Any]:
    first, last = levels[0], levels[-1]
    change = estimate_change(first, last, confidence=confidence)
    is_known = last.num_replications > 1
    points = [
        (item, own_effects(item, confidence=confidence), worth(item, confidence=confidence))
        for item in levels
    ]
    sources = {}
    for column, name in enumerate(last.sources):
        measured = []
        for place, (item, own_S, worth_S) in enumerate(points):
            dose = float(item.dose_S[column])
            # The category had no more rows for this dose, so it repeats the smaller one.
            if place and dose == levels[place - 1].dose_S[column]:
                continue
            measured.append(
                {
                    "dose": dose,
                    "dose_tokens": float(item.dose_tokens_S[column]),
                    "own": _entry(own_S, column),
                    "worth": _entry(worth_S, column),
                }
            )
        sources[name] = {
            "points": measured,
            **_changes(change, name, last, direction, is_known=is_known),
        }
    return {
        "sources": sources,
        "own": _count(sources, "own_change"),
        "worth": _count(sources, "worth_change"),
        "pairs": _pairs(change, direction, is_known=is_known),
        "own_ratio_median": _own_ratio(sources),
    }


def _changes(
    change: Change | None, name: str, measured: Measurements, direction: str, *, is_known: bool
) -> dict[str, Any]:
    """How a source's own effect and worth change from its smallest to its largest dose."""
    if change is None or name not in change.sources:
        return {"own_change": None, "worth_change": None}
    column = change.sources.index(name)
    own = None
    if name in measured.targets:
        row = measured.targets.index(name)
        own = _verdict(change.effect_TS, (row, column), direction, is_known=is_known)
    return {
        "own_change": own,
        "worth_change": _verdict(change.worth_S, column, direction, is_known=is_known),
    }


def _verdict(
    interval: Interval, place: int | tuple[int, int], direction: str, *, is_known: bool
) -> dict[str, Any]:
    values = _values(interval, place)
    # Removing: the first rows to go are missed least, so diminishing returns have the other sign.
    sign = int(interval.sign[place]) * (1 if direction == "add" else -1)
    values["returns"] = {-1: DIMINISH, 0: STEADY, 1: GROW}[sign] if is_known else None
    return values


def _entry(interval: Interval, column: int) -> dict[str, Any] | None:
    return _values(interval, column) if np.isfinite(interval.value[column]) else None


def _values(interval: Interval, place: int | tuple[int, int]) -> dict[str, Any]:
    return {
        "value": float(interval.value[place]),
        "se": float(interval.se[place]),
        "low": float(interval.low[place]),
        "high": float(interval.high[place]),
    }


def _count(sources: Mapping[str, Any], key: str) -> dict[str, int]:
    verdicts = [item[key]["returns"] for item in sources.values() if item[key] is not None]
    return {
        "sources": len(verdicts),
        "diminish": verdicts.count(DIMINISH),
        "grow": verdicts.count(GROW),
    }


def _pairs(change: Change | None, direction: str, *, is_known: bool) -> dict[str, int]:
    """How many pairs of target and source have effects that change significantly with the dose."""
    if change is None or not is_known:
        return {"pairs": 0, "diminish": 0, "grow": 0}
    sign_TS = change.effect_TS.sign * (1 if direction == "add" else -1)
    return {
        "pairs": int(sign_TS.size),
        "diminish": int((sign_TS < 0).sum()),
        "grow": int((sign_TS > 0).sum()),
    }


def _own_ratio(sources: Mapping[str, Any]) -> float | None:
    """Own effect per example at the largest dose, relative to the smallest; median over sources."""
    ends = [
        (item["points"][0]["own"], item["points"][-1]["own"])
        for item in sources.values()
        if len(item["points"]) > 1 and item["points"][0]["own"] is not None
    ]
    ratios = [last["value"] / first["value"] for first, last in ends if first["low"] > 0]
    return float(np.median(ratios)) if ratios else None


def dose_lines(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of text per direction; none with one dose.

    Args:
        summary: content of `summary.json`.
    """
    doses = summary.get("doses")
    if doses is None:
        return ()
    lines = []
    for direction, part in doses["directions"].items():
        text = f"{_VERB[direction]} {in_words(doses['asked'])}: "
        ratio = part["own_ratio_median"]
        if ratio is not None:
            text += (
                f"per row, the largest dose moves its own category {ratio:.2f} times as much as "
                "the smallest (median); "
            )
        own, total = part["own"], part["worth"]
        if summary["replications"] < 2:
            lines.append(f"{text}only one replication, so no change is significant")
            continue
        lines.append(
            f"{text}returns diminish for {own['diminish']} of {own['sources']} categories on "
            f"themselves and {total['diminish']} of {total['sources']} in worth, grow for "
            f"{own['grow']} and {total['grow']} ({doses['confidence']:.0%} confidence)"
        )
    return tuple(lines)
