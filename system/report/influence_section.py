"""The effect matrix on the page: heat maps, strongest pairs, how far to believe it."""

from __future__ import annotations

from typing import Any

import numpy as np

from system.auto.trial import Trial, describe_choice
from system.influence.append.append_summary import appended_text, stale_texts
from system.influence.design.doses import in_words
from system.influence.design.estimators import FIRST_ORDER
from system.influence.estimate.summary import short_unit
from system.report.blocks import (
    Block,
    Bullets,
    Cell,
    Column,
    Heading,
    Picture,
    Prose,
    Section,
    Table,
    text_column,
    waiting,
)
from system.report.comparison_section import comparison_blocks
from system.report.dose_section import dose_blocks
from system.report.formatting import (
    count,
    decimals,
    fixed,
    interval,
    percent,
    plural,
    sentence,
    signed,
)
from system.report.heatmap import (
    WIDEST_BESIDE,
    clustered_order,
    effect_figure,
    gamma_figure,
)
from system.report.pairs import Entry, entry_grid
from system.report.view import Influence, RunView

TITLE = "How categories help and harm each other"
_STRONGEST = 12
_LARGEST_TABLE = 60
"""Sources beyond which the whole matrix is left to report.json."""
_NAMED = 6
"""Targets that a sentence names."""
_VERB = {"add": "adding", "remove": "removing"}
_MEANING = {
    "add": "training with a dose of the source added, against training without it",
    "remove": "training with the source's dose, against training with it removed",
}


def influence_section(view: RunView) -> Section:
    """Heat maps and tables of every direction that was measured."""
    influence = view.influence
    if influence is None:
        return waiting("effects", TITLE, "Effects", "influence")
    matrices = list(influence.matrices.values())
    targets, sources = clustered_order(matrices)
    dose = reference_dose(influence)
    blocks: list[Block] = [
        Prose(
            text=f"Each cell answers: by how much does a dose of {count(dose)} examples of the "
            "source (column) lower the held-out loss of the target (row)? Blue helps, orange "
            "harms. A dot marks an interval without zero: elsewhere the colour may be noise. "
            "Framed cells are a category's effect on itself; hatched cells are not identifiable: "
            "their error is too large for a ratio. Related categories stand side by side. Colours "
            "are scaled to the effects between different categories.",
            tone="lead",
        ),
        Bullets(items=_belief(influence)),
    ]
    for direction, matrix in influence.matrices.items():
        identify = influence.summary["directions"][direction].get("identify")  # none of old runs
        needed = None if identify is None else identify["replications"]
        grid = entry_grid(matrix, targets, sources, dose, needed)
        blocks += [
            Heading(text=f"Measured by {_VERB[direction]}"),
            Picture(
                are_beside=len(sources) <= WIDEST_BESIDE,
                figures=[
                    effect_figure(grid, direction, short_unit(influence.summary["unit"])),
                    gamma_figure(grid, direction),
                ],
                captions=[
                    f"Effect ({influence.summary['unit']}): {_MEANING[direction]}.",
                    "Gamma: how many of the target's own examples one example of the source is "
                    "worth. Grey: unknown.",
                ],
            ),
            _strongest_table(grid, direction, dose, influence.summary["confidence"]),
        ]
        if len(sources) <= _LARGEST_TABLE:
            blocks.append(_whole_table(grid, direction))
    blocks += dose_blocks(influence.summary, sources)
    blocks += comparison_blocks(view.comparisons, short_unit(influence.summary["unit"]))
    return Section(name="effects", title=TITLE, short="Effects", blocks=blocks)


def reference_dose(influence: Influence) -> float:
    """Examples by which all effects are shown: the median dose of the sources."""
    doses = np.concatenate([matrix.dose_S for matrix in influence.matrices.values()])
    return float(np.median(doses))


def _belief(influence: Influence) -> list[str]:
    summary = influence.summary
    cost = summary["cost"]
    gradients = cost.get("gradient_tokens", 0)
    items = [
        f"{plural(summary['replications'], 'independent replication')}, estimator "
        f"{summary['estimator']}: {cost['runs']} trainings, {cost['trained_tokens']:,} tokens "
        f"trained{f', {gradients:,} differentiated' if gradients else ''}."
    ]
    if gradients:
        items.append(
            f"{sentence(FIRST_ORDER)} Sizes are overstated, own effects three to six times where "
            "it was measured."
        )
    if "trial" in summary:
        trials = [Trial(**trial) for trial in summary["trial"]]
        text = describe_choice(trials, short_unit(summary["unit"]))
        items.append(f"After a first round of each, {text}; its rounds follow.")
    if "doses" in summary:
        items.append(
            f"Measured at {in_words(summary['doses']['asked'])}: maps and tables show the largest; "
            "how returns change with the dose is below them."
        )
    for direction, part in summary["directions"].items():
        noise = part["noise"]
        items.append(
            f"{_VERB[direction].capitalize()}: {part['significant_pairs']:,} of {part['pairs']:,} "
            f"pairs differ from zero at {percent(summary['confidence'], 0)} confidence, gamma is "
            f"identifiable for {part['identifiable_off_diagonal']:,}. The typical standard error "
            f"of a dose's effect is {fixed(noise['dose_se_median'], 4)} "
            f"{short_unit(summary['unit'])}; the true effects are estimated to vary by "
            f"{fixed(noise['signal_sd'], 4)}."
        )
        items += _agreement(direction, part, summary["confidence"])
        items += _identify(direction, part)
    items += _append(summary)
    if summary["errors"] == "held-out only":
        items.append(
            "There was one replication only, so the errors do not contain the noise of training: "
            "nothing here counts as identifiable."
        )
    if summary["adapted"]:
        items.append(
            f"{plural(len(summary['adapted']), 'category', 'categories')} had fewer rows than "
            "asked and got a smaller dose."
        )
    return items


def _append(summary: dict[str, Any]) -> list[str]:
    """What was added to an earlier measurement; nothing where all is of one."""
    append = summary.get("append")
    if append is None:
        return []
    items = []
    if append["categories"]:
        text = appended_text(append)
        items.append(f"{text[0].upper()}{text[1:]}. The tables mark them with a dagger (†).")
    items += [f"Left out as stale: {text}." for text in stale_texts(append)]
    return items


def _agreement(direction: str, part: dict[str, Any], confidence: float) -> list[str]:
    halves = part["agreement"]
    if halves is None:
        return []
    rank = halves["rank"]
    text = (
        f"Halves of the replications ({_VERB[direction]}) put the pairs in the same order with a "
        f"rank correlation of {fixed(rank['value'], 2)} "
        f"({percent(confidence, 0)} {interval(rank['low'], rank['high'], 2, with_sign=False)}) "
        "and agree on the "
        f"sign of {percent(halves['sign'], 0)} of them."
    )
    halving = part["halving"]
    if halving["replications"] is None:
        text += (
            " More replications cannot halve the standard errors: they come from the held-out rows "
            "(raise `influence.heldout_rows`)."
        )
    else:
        text += (
            f" About {halving['replications']} replications in all would halve the standard "
            f"errors: {halving['trained_tokens']:,} trained tokens more."
        )
    return [text]


def _identify(direction: str, part: dict[str, Any]) -> list[str]:
    """What it would take to know the gammas that are not known."""
    identify = part.get("identify")
    if identify is None or not identify["open"]:
        return []
    unknown = identify["open"]
    text = (
        f"What the {plural(unknown, 'pair')} without an identifiable gamma would take "
        f"({_VERB[direction]}), were the effects what they are found to be now: "
    )
    parts = []
    if identify["half"] is not None:
        parts.append(
            f"{identify['half']} replications in all for half of the "
            f"{count(unknown - identify['never'])} that replications can reach, {identify['all']} "
            "for all of them"
        )
    if identify["never"]:
        parts.append(
            f"for {count(identify['never'])} not even {identify['most']}: more held-out rows or "
            "larger doses"
        )
    text += "; ".join(parts) + "."
    if unclear := identify["unclear"]:
        names = ", ".join(unclear[:_NAMED]) + (" and others" if len(unclear) > _NAMED else "")
        text += (
            f" A dose of their own data does not clearly help {names}, so nothing can be compared "
            "with it."
        )
    return [text]


def _strongest_table(
    grid: list[list[Entry]], direction: str, dose: float, confidence: float
) -> Table:
    pairs = [entry for row in grid for entry in row if not entry.is_own]
    pairs.sort(key=lambda entry: (-abs(entry.shrunk), entry.target, entry.source))
    chosen = sorted(pairs[:_STRONGEST], key=lambda entry: -entry.shrunk)
    digits = decimals([entry.se for entry in chosen], least=3)
    return Table(
        caption=f"Strongest pairs, measured by {_VERB[direction]}",
        columns=(
            text_column("source"),
            text_column("target"),
            Column(label="effect", title="for the dose"),
            Column(label=f"{percent(confidence, 0)} interval"),
            Column(label="shrunken", title="empirical-Bayes estimate that the solver uses"),
            Column(label="gamma"),
            Column(label="gamma interval"),
            text_column("identifiable"),
        ),
        rows=[
            (
                entry.source, entry.target,
                Cell(
                    text=f"{signed(entry.effect, digits)}{entry.mark}",
                    tone="good" if entry.effect > 0 else "bad",
                ),
                interval(entry.low, entry.high, digits), signed(entry.shrunk, digits),
                entry.gamma_text, entry.gamma_interval, entry.known,
            )
            for entry in chosen
        ],
        note=f"Chosen by the size of the shrunken effect of {count(dose)} examples; raw extremes "
        "are partly luck, the shrunken number allows for that.",
    )  # fmt: skip


def _whole_table(grid: list[list[Entry]], direction: str) -> Table:
    digits = decimals([entry.se for row in grid for entry in row], least=3)
    rows = [
        [
            row[0].target,
            *[
                Cell(
                    text=f"{signed(entry.effect, digits)} ± {fixed(entry.se, digits)}{entry.mark}",
                    tone="" if entry.is_identifiable else "quiet",
                    title=f"gamma {entry.gamma_text} {entry.gamma_interval}, "
                    f"identifiable: {entry.known}",
                )
                for entry in row
            ],
        ]
        for row in grid
    ]
    return Table(
        caption=f"All effects with standard errors, measured by {_VERB[direction]}",
        columns=[text_column("target ╲ source"), *[Column(label=e.source) for e in grid[0]]],
        rows=rows,
        folded=True,
        note="Grey: gamma of the pair is not identifiable.",
    )
