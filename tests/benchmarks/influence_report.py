"""`influence.md` and `influence.json` from what `bench_influence.py` measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BAR, BAR_COST = 0.8, 0.1
BASELINES = ("retrain",)
WIDTH = 40
SETTINGS_TEXT = """\
| setting | what it is |
|---|---|
| retrain | one run per dose from the base model |
| branch | the same from one checkpoint of a short warm-up |
| random-design | half of all doses in every run |
| gradient | two checkpoints of a warm-up as long as a base run, exact inner products |
| gradient-1, gradient-4 | one, four checkpoints |
| gradient-8192 | as `gradient`, projected to 8192 numbers (LESS' default) |
| gradient-third-dose | as `gradient`, with a third of the dose rows |
| gradient-short | as `gradient`, with a warm-up of a quarter to a third of a base run |
"""


def write_report(path: Path, conditions: dict[str, str], worlds: list[dict[str, Any]]) -> None:
    """Writes the page, and beside it the numbers."""
    numbers = {**conditions, "worlds": worlds}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    lines = [
        "# Influence estimators: recovery against cost",
        "",
        "Written by `bench_influence.py`; numbers in `influence.json`. Direction `remove`.",
        "Reference of each world: replications of `retrain` on schedules of their own. Token",
        "equivalents: forward + backward = 1, forward = 1/3, warm-ups and scoring included.",
        "",
        "  ".join(f"{name}: {value}." for name, value in conditions.items()),
        "",
        SETTINGS_TEXT,
        "*cost*: share of the reference's token equivalents (in brackets: of one replication of",
        "`retrain`). *rank*: rank correlation with the reference over a target's other sources,",
        "median over targets, 95 % bootstrap interval over targets. *linear*: correlation over all",
        "pairs off the diagonal. *signs*: pairs with the reference's sign. *planted*: signs that",
        "the construction fixes. *zeros*: unrelated pairs whose interval covers zero. *scale*:",
        "own effects as a multiple of the reference's, median. *ceiling*: what an estimator",
        "without any error would have as *rank*, since the reference has errors: the square root",
        "of its reliability. *error*: typical (median) standard error of a dose's effect on",
        "another category, nats, on the scale of the estimator's own effects. *halving*: million",
        "token equivalents more that would halve it, and the replications that makes in all; a",
        "dash where only more held-out rows would. *seconds* depend on what else the machine did;",
        "token equivalents are exact.",
    ]
    for world in worlds:
        lines += _world(world)
    path.write_text("\n".join(lines) + "\n")


def _world(found: dict[str, Any]) -> list[str]:
    reference = found["reference_replications"]
    header = ("setting", "replications", "cost", "seconds", "rank", "linear", "signs", "planted",
              "zeros", "scale", "error", "halving")  # fmt: skip
    return [
        "",
        f"## {found['world'].capitalize()}",
        "",
        f"{found['text'].capitalize()}; a Llama of {found['parameters'] / 1e6:.2f} M parameters.",
        f"Reference: {reference} replications, {found['reference_equivalents']:,.0f} token",
        f"equivalents, {found['reference_seconds']:.0f} s. Measured at commit {found['commit']}.",
        "",
        "How well the reference is known, `retrain` with itself:",
        "",
        "| replications against as many others | rank |",
        "|---|---|",
        *(f"| {size} | {_interval(values)} |" for size, values in found["ceiling"].items()),
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *(_row(row, reference) for row in found["rows"]),
        "",
        "Rank correlation against cost, the bar marked:",
        "",
        "```",
        *_curve(found["rows"]),
        "```",
        "",
        _verdict(found),
    ]


def _interval(values: Any) -> str:
    value, low, high = values
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _rank(row: dict[str, Any]) -> str:
    return _interval([row[f"target_rank_{name}"] for name in ("median", "low", "high")])


def _row(row: dict[str, Any], reference: int) -> str:
    cells = [
        row["setting"],
        row["replications"],
        f"{row['cost']:.3f} ({row['cost'] * reference:.2f})",
        f"{row['seconds']:.0f}",
        _rank(row),
        f"{row['linear']:.2f}",
        f"{row['sign_agreement_with_reference']:.2f}",
        row.get("planted_signs_right", "-"),
        f"{row['unrelated_pairs_covering_zero']:.2f}" if "planted_signs_right" in row else "-",
        f"{row['own_scale']:.2f}",
        f"{row['dose_se']:.4f}" if "dose_se" in row else "",
        _halving(row),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _halving(row: dict[str, Any]) -> str:
    if "dose_se" not in row:
        return ""
    if row["halving_equivalents"] is None:
        return "-"
    return f"{row['halving_equivalents'] / 1e6:.1f} ({row['halving_replications']})"


def _curve(rows: list[dict[str, Any]]) -> list[str]:
    """One line a row, cheapest first; the bar's place is marked."""
    lines = []
    for row in sorted(rows, key=lambda row: row["cost"]):
        filled = round(max(0.0, row["target_rank_median"]) * WIDTH)
        line = list("#" * filled + " " * (WIDTH - filled))
        line[round(BAR * WIDTH)] = "|"
        name = f"{row['setting']} x{row['replications']}"
        lines.append(
            f"{row['cost']:7.3f}  {name:<20} {''.join(line)} {row['target_rank_median']:.2f}"
        )
    return lines


def reliability(agreement: float, replications: int, reference: int) -> float:
    """Correlation of two references of `reference` replications each, if there were two.

    Source: Spearman 1910 and Brown 1910, from the agreement of two estimates of `replications`.
    """
    times = reference / replications
    return times * agreement / (1.0 + (times - 1.0) * agreement)


def _ceiling(found: dict[str, Any]) -> str:
    """What an estimator without errors would have as rank correlation with the noisy reference.

    A correlation with a noisy measurement is the one with the truth times the square root of the
    measurement's reliability (Spearman's attenuation).
    """
    if not found["ceiling"]:
        return ""
    size, values = max(found["ceiling"].items(), key=lambda item: int(item[0]))
    text = f" `retrain` with itself reaches {_interval(values)} with {size} replications a side"
    if values[0] <= 0:
        return f"{text}: the reference is not known well enough to judge by."
    known = reliability(values[0], int(size), found["reference_replications"])
    ceiling = math.sqrt(known)
    text += (
        f", so the whole reference has a reliability of about {known:.2f}, and the ceiling for an "
        f"estimator without errors is about {ceiling:.2f}."
    )
    if ceiling < BAR:
        text += " The bar lies above that: here it asks for more than the truth is known."
    return text


def _verdict(found: dict[str, Any]) -> str:
    cheap = [
        row for row in found["rows"] if row["cost"] <= BAR_COST and row["setting"] not in BASELINES
    ]
    asked = (
        f"Asked: a cheap estimator with a median rank correlation of at least {BAR} at "
        f"{BAR_COST:.0%} or less of the reference's token equivalents."
    )
    ceiling = _ceiling(found)
    if not cheap:
        return f"{asked} **Not judged**: no estimate was measured at that cost.{ceiling}"
    best = max(cheap, key=lambda row: row["target_rank_median"])
    name = f"`{best['setting']}` with {best['replications']} replication(s)"
    text = f"{_rank(best)} at {best['cost']:.1%} of the cost"
    if best["target_rank_median"] >= BAR:
        return f"{asked} **Reached** by {name}: {text}.{ceiling}"
    return f"{asked} **Not reached**: the best is {name}, {text}.{ceiling}"
