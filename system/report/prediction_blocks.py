"""Blocks of the evaluation section that compare predicted and realised gains.

The prediction comes from the effect matrix, the realised gain from trainings on the arms.
"""

from __future__ import annotations

from typing import Any

from system.report.blocks import (
    Block,
    Cell,
    Column,
    Heading,
    Picture,
    Prose,
    Table,
    Tone,
    text_column,
)
from system.report.evaluation_figures import prediction_figure
from system.report.formatting import decimals, fixed, interval, signed

VERDICT_TONES: dict[str, Tone] = {"better": "good", "worse": "bad", "tie": "quiet"}


def prediction_blocks(summary: dict[str, Any]) -> list[Block]:
    """All arms, then the solved mix target by target; empty if there are no predictions."""
    if not summary["predictions"]:
        return []
    blocks: list[Block] = [Heading(text="Predicted and realised gain"), _arm_table(summary)]
    prediction = summary["prediction"]
    return blocks if prediction is None else [*blocks, *_target_blocks(summary, prediction)]


def _arm_table(summary: dict[str, Any]) -> Table:
    predictions = summary["predictions"]
    digits = max(4, decimals([item["overall"]["predicted"] for item in predictions]))
    return Table(
        caption="Predicted and realised gain of every arm",
        columns=(text_column("arm"), text_column("against"), *_columns()),
        rows=[
            (item["arm"], item["reference"], *_cells(item["overall"], digits))
            for item in predictions
        ],
        note=f"Mean over all targets by importance, {summary['prediction_unit']}. The prediction "
        "uses only the counts that an arm was trained on, not their order. Far from the base mix, "
        "as with equal shares, it is an extrapolation.",
    )


def _target_blocks(summary: dict[str, Any], prediction: dict[str, Any]) -> list[Block]:
    total, rows = prediction["overall"], prediction["targets"]
    digits = max(4, decimals([total["predicted"]]))
    unit = summary["prediction_unit"]
    text = (
        f"The effect matrix predicted {signed(total['predicted'], digits)} ({unit}) for the solved "
        f"mix; training on it realised {signed(total['realised'], digits)} "
        f"{interval(total['low'], total['high'], digits)}."
    )
    if prediction["slope"] is not None:
        text += (
            f" Over the targets, {fixed(prediction['slope'], 2)} was realised per unit of "
            "predicted gain (1: the prediction was right; 0: it was worthless)"
        )
        rank = prediction["rank_correlation"]
        text += "." if rank is None else f"; rank correlation {fixed(rank, 2)}."
    return [
        Prose(text=text),
        Picture(
            figures=[prediction_figure(rows, unit)],
            captions=["One dot per target; on the dotted line, realised equals predicted."],
        ),
        Table(
            caption="Predicted and realised gain by target",
            columns=(text_column("target"), *_columns()),
            rows=[
                (row["target"], *_cells(row, digits))
                for row in sorted(rows, key=lambda row: -row["predicted"])
            ],
            folded=True,
        ),
    ]


def _columns() -> tuple[Column, ...]:
    return (
        Column(label="predicted"),
        Column(label="standard error"),
        Column(label="realised"),
        Column(label="interval"),
        text_column("verdict"),
    )


def _cells(row: dict[str, Any], digits: int) -> tuple[str | Cell, ...]:
    return (
        signed(row["predicted"], digits),
        fixed(row["predicted_se"], digits),
        signed(row["realised"], digits),
        interval(row["low"], row["high"], digits),
        Cell(text=row["verdict"], tone=VERDICT_TONES[row["verdict"]]),
    )
