"""The section "How categories help and harm each other" of the report page.

It shows the effect matrix: heat maps, the strongest pairs, and how reliable the measurement is.
"""

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
    LONGEST,
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
_DETAILS = (
    "A dot means that the interval excludes zero; without a dot the colour may be noise. Framed "
    "cells: the effect of a category on itself. Hatched cells: gamma is not identifiable, because "
    "the errors are too large for a ratio."
)
_OVERVIEW = (
    "There are too many categories to name each: point at a cell to see its names and its value. "
    "Colours may be noise. The tables below name the pairs that matter, and report.json has all."
)
_NAMED = 6
"""Largest number of targets that a sentence lists by name."""
_VERB = {"add": "adding", "remove": "removing"}
_MEANING = {
    "add": "training with an added dose of the source, compared with training without it",
    "remove": "training with the dose of the source, compared with training without it",
}


def influence_section(view: RunView) -> Section:
    """Heat maps and tables of every direction that was measured."""
    influence = view.influence
    if influence is None:
        return waiting("effects", TITLE, "Effects", "influence")
    matrices = list(influence.matrices.values())
    targets, sources = clustered_order(matrices)
    dose = reference_dose(influence)
    is_small = max(len(targets), len(sources)) <= LONGEST
    blocks: list[Block] = [
        Prose(
            text=f"Each cell shows how much a dose of {count(dose)} examples of the source "
            "category (column) improves the target category (row) on held-out data. Blue: the "
            f"source helps. Orange: it harms. {_DETAILS if is_small else _OVERVIEW} Categories "
            "with similar effects are next to each other. The colour scale is set by the effects "
            "between different categories.",
            tone="lead",
        ),
        Bullets(items=_reliability(influence)),
    ]
    for direction, matrix in influence.matrices.items():
        identify = influence.summary["directions"][direction]["identify"]
        needed = None if identify is None else identify["replications"]
        grid = entry_grid(matrix, targets, sources, dose, needed)
        blocks += [
            Heading(text=f"Measured by {_VERB[direction]}"),
            Picture(
                are_beside=len(sources) <= WIDEST_BESIDE,
                # Of many categories the map of gamma would double the page and add little.
                figures=[
                    effect_figure(grid, direction, short_unit(influence.summary["unit"])),
                    *([gamma_figure(grid, direction)] if is_small else []),
                ],
                captions=[
                    f"Effect ({influence.summary['unit']}): {_MEANING[direction]}.",
                    "Gamma: one example of the source is worth so many of the target's own "
                    "examples. Grey: unknown.",
                ],
            ),
            _strongest_table(grid, direction, dose, influence.summary["confidence"]),
        ]
        blocks.append(_whole_table(grid, direction) if is_small else _target_table(grid, direction))
    blocks += dose_blocks(influence.summary, sources)
    blocks += comparison_blocks(view.comparisons, short_unit(influence.summary["unit"]))
    return Section(name="effects", title=TITLE, short="Effects", blocks=blocks)


def reference_dose(influence: Influence) -> float:
    """The dose, in examples, for which effects are shown: the median dose of all sources."""
    doses = np.concatenate([matrix.dose_S for matrix in influence.matrices.values()])
    return float(np.median(doses))


def _reliability(influence: Influence) -> list[str]:
    summary = influence.summary
    cost = summary["cost"]
    gradients = cost.get("gradient_tokens", 0)
    items = [
        f"{plural(summary['replications'], 'independent replication')}, estimator "
        f"{summary['estimator']}: {cost['runs']} trainings on {cost['trained_tokens']:,} tokens"
        f"{f', and gradients of {gradients:,} tokens' if gradients else ''}."
    ]
    if gradients:
        items.append(
            f"{sentence(FIRST_ORDER)} They overstate the size of effects; in our measurements the "
            "effects of categories on themselves were three to six times too large."
        )
    if "trial" in summary:
        trials = [Trial(**trial) for trial in summary["trial"]]
        text = describe_choice(trials, short_unit(summary["unit"]))
        items.append(
            f"Several designs were tried for one round: {text}. This report shows the chosen one."
        )
    if "doses" in summary:
        items.append(
            f"Measured at {in_words(summary['doses']['asked'])}: maps and tables show the largest. "
            "See below how returns change with the dose."
        )
    for direction, part in summary["directions"].items():
        noise = part["noise"]
        items.append(
            f"{_VERB[direction].capitalize()}: {part['significant_pairs']:,} of {part['pairs']:,} "
            f"pairs have an effect that differs from zero at {percent(summary['confidence'], 0)} "
            f"confidence; gamma is identifiable for {part['identifiable_off_diagonal']:,}. The "
            f"median standard error of the effect of a dose is {fixed(noise['dose_se_median'], 4)} "
            f"{short_unit(summary['unit'])}; the estimated standard deviation of the true effects "
            f"is {fixed(noise['signal_sd'], 4)}."
        )
        items += _agreement(direction, part, summary["confidence"])
        items += _identify(direction, part)
    items += _append(summary)
    if summary["errors"] == "held-out only":
        items.append(
            "With one replication, the errors do not include the noise of training, so no gamma "
            "counts as identifiable."
        )
    if summary["adapted"]:
        items.append(
            f"{plural(len(summary['adapted']), 'category', 'categories')} had fewer rows than "
            "the configured dose and got a smaller one."
        )
    return items


def _append(summary: dict[str, Any]) -> list[str]:
    """Sentences on categories that were appended to an earlier measurement; empty if none."""
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
        f"Reproducibility ({_VERB[direction]}): between two halves of the replications, the rank "
        f"correlation of the effects of pairs is {fixed(rank['value'], 2)} "
        f"({percent(confidence, 0)} interval "
        f"{interval(rank['low'], rank['high'], 2, with_sign=False)}), and "
        f"{percent(halves['sign'], 0)} of the effects have the same sign."
    )
    halving = part["halving"]
    if halving["replications"] is None:
        text += (
            " More replications cannot halve the standard errors, because these come from the "
            "held-out rows: raise `influence.heldout_rows`."
        )
    else:
        text += (
            f" About {halving['replications']} replications in total would halve the standard "
            f"errors; this costs {halving['trained_tokens']:,} more trained tokens."
        )
    return [text]


def _identify(direction: str, part: dict[str, Any]) -> list[str]:
    """How many replications would make the remaining gammas identifiable."""
    identify = part["identify"]
    if identify is None or not identify["open"]:
        return []
    unknown = identify["open"]
    text = (
        f"Gamma is not identifiable for {plural(unknown, 'pair')} ({_VERB[direction]}). Estimate "
        "of what is needed, if the effects are as measured now: "
    )
    parts = []
    if identify["half"] is not None:
        parts.append(
            f"{identify['half']} replications in total for half of the "
            f"{count(unknown - identify['never'])} pairs that more replications can resolve, "
            f"{identify['all']} for all of these"
        )
    if identify["never"]:
        parts.append(
            f"for {count(identify['never'])} pairs even {identify['most']} replications are not "
            "enough; use more held-out rows or larger doses"
        )
    text += "; ".join(parts) + "."
    if unclear := identify["unclear"]:
        names = ", ".join(unclear[:_NAMED]) + (" and others" if len(unclear) > _NAMED else "")
        text += (
            f" A dose of their own data does not clearly help {names}, so gamma, which is relative "
            "to it, is undefined for these targets."
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
            Column(label="effect", title="of the dose (see the note)"),
            Column(label=f"{percent(confidence, 0)} interval"),
            Column(label="shrunk effect", title="empirical-Bayes estimate, which the solver uses"),
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
                entry.gamma_text, entry.gamma_interval, entry.identifiable_text,
            )
            for entry in chosen
        ],
        note=f"Effects of {count(dose)} examples, selected by the size of the shrunk effect. "
        "Extreme raw effects are partly noise; shrinkage corrects for this.",
    )  # fmt: skip


def _target_table(grid: list[list[Entry]], direction: str) -> Table:
    """For many categories: what helps and what harms each target most."""
    digits = decimals([entry.se for row in grid for entry in row], least=3)

    def cells(entry: Entry) -> tuple[str, Cell]:
        tone = "good" if entry.low > 0 else "bad" if entry.high < 0 else "quiet"
        text = f"{signed(entry.effect, digits)} ± {fixed(entry.se, digits)}{entry.mark}"
        return entry.source, Cell(text=text, tone=tone)

    rows = []
    for row in grid:
        others = sorted((e for e in row if not e.is_own), key=lambda entry: entry.shrunk)
        rows.append((row[0].target, *cells(others[-1]), *cells(others[0])))
    return Table(
        caption=f"What helps and what harms each target most, measured by {_VERB[direction]}",
        columns=(
            text_column("target"),
            text_column("helps most"),
            Column(label="effect"),
            text_column("harms most"),
            Column(label="effect"),
        ),
        rows=rows,
        folded=True,
        note="By the shrunk effect of another category. Grey: the interval contains zero.",
    )


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
                    f"identifiable: {entry.identifiable_text}",
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
        note="Grey: gamma of this pair is not identifiable.",
    )
