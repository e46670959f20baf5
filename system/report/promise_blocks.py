"""What the matrix promised for the arms beside what training on them brought."""

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


def promise_blocks(summary: dict[str, Any]) -> list[Block]:
    """Every arm, then the solved mix target by target; nothing where nothing was predicted."""
    if not summary["predictions"]:
        return []
    blocks: list[Block] = [Heading(text="Promise and outcome"), _arm_promises(summary)]
    prediction = summary["prediction"]
    return blocks if prediction is None else [*blocks, *_target_promises(summary, prediction)]


def _arm_promises(summary: dict[str, Any]) -> Table:
    found = summary["predictions"]
    digits = max(4, decimals([item["overall"]["predicted"] for item in found]))
    return Table(
        caption="Promise and outcome of every arm",
        columns=(text_column("arm"), text_column("against"), *_promise_columns()),
        rows=[
            (item["arm"], item["reference"], *_promise_cells(item["overall"], digits))
            for item in found
        ],
        note=f"All targets by importance, {summary['prediction_unit']}. Predicted is what the "
        "matrix says of the counts that an arm was trained on; it knows nothing of their order, "
        "and away from the base, as with equal shares, it extrapolates.",
    )


def _target_promises(summary: dict[str, Any], prediction: dict[str, Any]) -> list[Block]:
    total, rows = prediction["overall"], prediction["targets"]
    digits = max(4, decimals([total["predicted"]]))
    unit = summary["prediction_unit"]
    text = (
        f"The matrix promised {signed(total['predicted'], digits)} ({unit}) for the solved mix; "
        f"training on it brought {signed(total['realised'], digits)} "
        f"{interval(total['low'], total['high'], digits)}."
    )
    if prediction["slope"] is not None:
        text += (
            f" Per target, {fixed(prediction['slope'], 2)} came for each one promised"
            " (1 is a kept promise, 0 a worthless one)"
        )
        rank = prediction["rank_correlation"]
        text += "." if rank is None else f"; rank correlation {fixed(rank, 2)}."
    return [
        Prose(text=text),
        Picture(
            figures=[prediction_figure(rows, unit)],
            captions=["Every target; on the dotted line the promise would be kept exactly."],
        ),
        Table(
            caption="Promise and outcome by target",
            columns=(text_column("target"), *_promise_columns()),
            rows=[
                (row["target"], *_promise_cells(row, digits))
                for row in sorted(rows, key=lambda row: -row["predicted"])
            ],
            folded=True,
        ),
    ]


def _promise_columns() -> tuple[Column, ...]:
    return (
        Column(label="predicted"),
        Column(label="standard error"),
        Column(label="realised"),
        Column(label="interval"),
        text_column("verdict"),
    )


def _promise_cells(row: dict[str, Any], digits: int) -> tuple[str | Cell, ...]:
    return (
        signed(row["predicted"], digits),
        fixed(row["predicted_se"], digits),
        signed(row["realised"], digits),
        interval(row["low"], row["high"], digits),
        Cell(text=row["verdict"], tone=VERDICT_TONES[row["verdict"]]),
    )
