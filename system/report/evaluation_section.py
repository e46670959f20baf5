"""The section "Evaluation on held-out data" of the report page.

It compares the trained arms: gains over the natural mix and over other mixes, mix and order judged
separately, predicted and realised gains, losses, and accuracy.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from system.report.blocks import (
    Block,
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
from system.report.evaluation_figures import difference_figure, level_figure
from system.report.formatting import (
    MINUS,
    NOTHING,
    count,
    decimals,
    ends,
    ends_note,
    fixed,
    interval,
    percent,
    plural,
    sentence,
    signed,
)
from system.report.prediction_blocks import VERDICT_TONES, prediction_blocks
from system.report.view import Evaluation, RunView

TITLE = "Evaluation on held-out data"
NATURAL = "natural"
OTHER_MIXES = ("uniform", "random")
_SCOPES = {"importance": "all, by importance", "uniform": "all, equally weighted"}


def evaluation_section(view: RunView) -> Section:
    """Differences between arms, factors, predictions, losses, and accuracy."""
    evaluation = view.evaluation
    if evaluation is None:
        return waiting("evaluation", TITLE, "Evaluation", "evaluate")
    summary = evaluation.summary
    blocks: list[Block] = [Prose(text=_lead(summary), tone="lead")]
    if summary["importance_note"]:
        blocks.append(Prose(text=sentence(summary["importance_note"]), tone="warn"))
    blocks.append(_arm_table(summary))
    against = comparisons(evaluation, "loss", NATURAL)
    if against:
        blocks += [
            Heading(text="Gain over the natural mix"),
            *_differences(against),
        ]
    blocks += _other_mixes(evaluation)
    blocks += [
        *_factors(summary),
        *prediction_blocks(summary),
        Heading(text="Held-out losses"),
        *_levels(evaluation),
        *_accuracy(evaluation),
    ]
    return Section(name="evaluation", title=TITLE, short="Evaluation", blocks=blocks)


def comparisons(evaluation: Evaluation, metric: str, reference: str) -> list[dict[str, Any]]:
    """Comparisons of one metric with one reference arm, in the order of `summary.json`."""
    return [
        row
        for row in evaluation.summary["comparisons"]
        if row["metric"] == metric and row["reference"] == reference
    ]


def overall(rows: list[dict[str, Any]], arm: str, weighting: str) -> dict[str, Any] | None:
    """The comparison of an arm over all categories; None if there is none."""
    for row in rows:
        if row["arm"] == arm and row["category"] is None and row["weighting"] == weighting:
            return row
    return None


def _lead(summary: dict[str, Any]) -> str:
    rows = sum(summary["test_rows"].values())
    text = (
        "A gain is the loss of the reference minus the loss of the arm, in nats per response "
        "token: positive favours the arm. All models are scored on the same "
        f"{rows:,} test examples, which were used neither for training nor for the effect matrix. "
        f"Intervals have {percent(summary['confidence'], 0)} confidence and include the variation "
        "of examples and of trainings. If an interval contains zero, the verdict is a tie. The "
        "verdicts are not corrected for their number: of twenty true ties at 95 % confidence, "
        "about one is reported as better or worse."
    )
    if summary["left_out"]:
        text += (
            f" {plural(sum(summary['left_out'].values()), 'example was', 'examples were')} left "
            "out because at least one model could not score them."
        )
    return text


def _arm_table(summary: dict[str, Any]) -> Table:
    return Table(
        caption="The arms that were trained",
        columns=(
            text_column("arm"),
            text_column("mix"),
            text_column("order"),
            Column(label="trainings"),
            Column(label="examples"),
            Column(label="response tokens"),
            Column(label="steps"),
        ),
        rows=[
            (
                arm["name"], arm["mix"], arm["order"], str(arm["seeds"]), count(arm["examples"]),
                f"{arm['response_tokens']:,}", f"{arm['steps']:,}",
            )
            for arm in summary["arms"]
        ],
    )  # fmt: skip


def _scope_order(rows: list[dict[str, Any]]) -> list[str | None]:
    """None (all categories) first, then categories by the gain of the last arm, descending."""
    arm = rows[-1]["arm"]
    own = [row for row in rows if row["arm"] == arm and row["category"] is not None]
    own.sort(key=lambda row: (-row["value"], row["category"]))
    return [None, *[row["category"] for row in own]]


def _differences(rows: list[dict[str, Any]]) -> list[Block]:
    shown = [row for row in rows if row["weighting"] != "uniform"]
    scopes = _scope_order(shown)
    return [
        Picture(
            figures=[difference_figure(shown, ends(scopes))],
            captions=[
                "Right of zero: better than a natural mix of the same budget."
                f"{ends_note(len(scopes))}"
            ],
        ),
        Table(
            caption="Gains over the natural mix",
            columns=_contrast_columns("arm"),
            rows=[
                (row["arm"], _scope(row), *_contrast_cells(row, _digits(rows)))
                for row in rows
                if row["category"] is None
            ],
        ),
        Table(
            caption="Gains over the natural mix by category",
            columns=_contrast_columns("arm"),
            rows=[
                (row["arm"], _scope(row), *_contrast_cells(row, _digits(rows)))
                for row in rows
                if row["category"] is not None
            ],
            folded=True,
            note=_tally(rows),
        ),
    ]


def _other_mixes(evaluation: Evaluation) -> list[Block]:
    """The solved mix against the uniform and the random mix, which use no measured effects."""
    rows = [row for other in OTHER_MIXES for row in comparisons(evaluation, "loss", other)]
    if not rows:
        return []
    title = "Gains of the solved mix over the other mixes"

    def table(caption: str, shown: list[dict[str, Any]], **looks: Any) -> Table:
        return Table(
            caption=caption,
            columns=_contrast_columns("against"),
            rows=[
                (row["reference"], _scope(row), *_contrast_cells(row, _digits(rows)))
                for row in shown
            ],
            **looks,
        )

    return [
        table(
            title,
            [row for row in rows if row["category"] is None],
            note="Paired differences: the same examples and seeds, the same budget, all shuffled.",
        ),
        table(
            f"{title} by category",
            [row for row in rows if row["category"] is not None],
            folded=True,
        ),
    ]


def _tally(rows: list[dict[str, Any]]) -> str:
    parts = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        verdicts = tally(rows, arm)
        parts.append(
            f"{arm}: better on {verdicts['better']}, tie on {verdicts['tie']}, worse on "
            f"{verdicts['worse']}"
        )
    return "; ".join(parts) + "."


def tally(rows: list[dict[str, Any]], arm: str) -> Counter[str]:
    """Number of categories in which an arm is better, tied, or worse."""
    return Counter(
        row["verdict"] for row in rows if row["arm"] == arm and row["category"] is not None
    )


def _digits(rows: list[dict[str, Any]]) -> int:
    return max(3, min(4, decimals([row["se"] for row in rows], least=3)))


def _scope(row: dict[str, Any]) -> str:
    return _SCOPES.get(row["weighting"], "") if row["category"] is None else row["category"]


def _contrast_columns(first: str) -> tuple[Column, ...]:
    return (
        text_column(first),
        text_column("over"),
        Column(label="gain"),
        Column(label="interval"),
        text_column("verdict"),
        Column(label="error from trainings", title="smaller with more seeds"),
        Column(label="from examples", title="smaller with more held-out examples"),
        Column(label="trainings"),
        Column(label="examples"),
    )


def _contrast_cells(row: dict[str, Any], digits: int) -> tuple[str | Cell, ...]:
    return (
        signed(row["value"], digits),
        interval(row["low"], row["high"], digits),
        Cell(text=row["verdict"], tone=VERDICT_TONES[row["verdict"]]),
        "one training" if row["se_seeds"] is None else fixed(row["se_seeds"], digits),
        fixed(row["se_heldout"], digits),
        str(row["seeds"]),
        count(row["rows"]),
    )


def _factors(summary: dict[str, Any]) -> list[Block]:
    rows = summary["factors"]
    if not rows:
        return []
    return [
        Heading(text="Mix and order, judged separately"),
        _two_by_two(summary),
        Table(
            caption="Gain from the mix and gain from the order",
            columns=(*_contrast_columns("factor")[:5], text_column("formula")),
            rows=[
                (
                    row["factor"], _SCOPES[row["weighting"]],
                    *_contrast_cells(row, _digits(rows))[:3],
                    row["formula"].replace(" - ", f" {MINUS} "),
                )
                for row in rows
            ],
            note="With all four arms these are the main effects of a two-by-two design and their "
            "interaction.",
        ),
    ]  # fmt: skip


def _two_by_two(summary: dict[str, Any]) -> Table:
    loss = {row["arm"]: row["value"] for row in summary["losses"] if row["category"] is None}
    return Table(
        caption="Held-out loss by mix and order",
        columns=(text_column("mix"), Column(label="shuffled"), Column(label="curriculum")),
        rows=[
            (
                mix,
                *[
                    fixed(loss[arm], 4) if arm in loss else "not trained"
                    for arm in (mix, f"{mix}-curriculum")
                ],
            )
            for mix in (NATURAL, "solved")
        ],
        note="All categories by importance, nats per response token.",
    )


def _levels(evaluation: Evaluation) -> list[Block]:
    summary = evaluation.summary
    rows, arms = summary["losses"], [arm["name"] for arm in summary["arms"]]
    order = list(dict.fromkeys(["base", *arms]))
    cells = {(row["arm"], row["category"]): row for row in rows}
    first = NATURAL if NATURAL in arms else "base"
    categories = sorted(
        {row["category"] for row in rows if row["category"] is not None},
        key=lambda name: (-cells[first, name]["value"], name),
    )
    scopes: list[str | None] = [None, *categories]
    return [
        Picture(
            figures=[level_figure(rows, ends(scopes), order)],
            captions=[
                "Held-out loss of every model; lower is better. The intervals of single models "
                "are wide because examples differ; the comparisons above use paired examples."
                f"{ends_note(len(scopes))}"
            ],
        ),
        Table(
            caption="Held-out loss by category",
            columns=(text_column("category"), *[Column(label=arm) for arm in order]),
            rows=[
                [
                    "all, by importance" if scope is None else scope,
                    *[
                        Cell(
                            text=fixed(cells[arm, scope]["value"], 4),
                            title=_loss_interval(cells[arm, scope]),
                        )
                        if (arm, scope) in cells
                        else NOTHING
                        for arm in order
                    ],
                ]
                for scope in scopes
            ],
            note="Mean over the trainings of an arm, nats per response token.",
        ),
    ]


def _loss_interval(row: dict[str, Any]) -> str:
    return f"{fixed(row['low'], 4)} to {fixed(row['high'], 4)}"


def _accuracy(evaluation: Evaluation) -> list[Block]:
    summary = evaluation.summary
    rows = summary["accuracy"]
    blocks: list[Block] = [Heading(text="Correct answers")]
    if not rows:
        return [
            *blocks,
            Prose(
                text="Not measured: no test example has an answer that can be checked, or "
                "`evaluate.accuracy_rows` is 0."
            ),
        ]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["arm"], row["category"]): row for row in rows}
    blocks.append(
        Table(
            caption="Share of correct answers (exact match)",
            columns=(
                text_column("category"),
                Column(label="examples"),
                *[Column(label=arm) for arm in arms],
            ),
            rows=[
                [
                    category,
                    str(cells[arms[0], category]["rows"]),
                    *[_share_cell(cells[arm, category]) for arm in arms],
                ]
                for category in dict.fromkeys(row["category"] for row in rows)
            ],
            note="Mean over trainings; Wilson intervals over the examples in brackets."
            + _unanswered_note(summary),
        )
    )
    against = [
        row for row in comparisons(evaluation, "accuracy", NATURAL) if row["category"] is None
    ]
    if against:
        blocks.append(
            Table(
                caption="Accuracy against the natural mix",
                columns=_contrast_columns("arm"),
                rows=[(row["arm"], _scope(row), *_contrast_cells(row, 3)) for row in against],
                note="Differences of the shares of correct answers.",
            )
        )
    return blocks


def _unanswered_note(summary: dict[str, Any]) -> str:
    lost = sum(summary["answers_left_out"].values())
    if not lost:
        return ""
    were = plural(lost, "question was", "questions were")
    return f" {were} left out because the engine failed to answer with at least one model."


def _share_cell(row: dict[str, Any]) -> str:
    return (
        f"{fixed(100 * row['value'], 1)} % [{fixed(100 * row['low'], 0)}, "
        f"{fixed(100 * row['high'], 0)}]"
    )
