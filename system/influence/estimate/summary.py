"""The summary of an influence stage for people, the report and later stages.

`summarise` makes `summary.json`, `result_lines` the lines of text in the log.  The matrix itself is
in `system.influence.estimate.matrix`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from system.config import InfluenceConfig
from system.influence.append.append_summary import append_lines
from system.influence.design.design import Design
from system.influence.design.estimators import FIRST_ORDER
from system.influence.estimate.agreement import (
    json_number,
    left_out_prediction,
    replications_to_halve,
    split_half,
)
from system.influence.estimate.identify import identify_json, replications_to_identify
from system.influence.estimate.matrix import EffectMatrix, Estimate
from system.influence.estimate.measurements import Losses, Measurements
from system.solve.mix import ANSWERS, NATS

REPLICATES = pa.schema(
    [
        pa.field("replication", pa.int32(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("direction", pa.string(), nullable=False),
        pa.field("dose", pa.float64(), nullable=False),  # examples, mean over replications
        pa.field("effect", pa.float64(), nullable=False),  # nats/response token per example
    ]
)
"""Schema of `influence/replicates.parquet`: the effects of each replication."""


METRIC_UNITS = {"loss": NATS, "accuracy": ANSWERS}
"""The unit of effects, by `influence.metric`."""


def short_unit(unit: str) -> str:
    """The unit as it follows a number in a sentence."""
    return "nats" if unit == NATS else "of right answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The actual cost of the intervention runs."""

    runs: int
    trained_tokens: int
    """Forward and backward, prompts included."""
    scored_tokens: int
    """Forward only, prompts included."""
    gradient_tokens: int = 0
    """Forward and backward without an optimiser step (`gradient`), prompts included."""
    train_seconds: float
    """Sum over tuners, gradients included."""
    score_seconds: float
    """Sum over scorers, measured by the driver."""

    @property
    def token_equivalents(self) -> float:
        """Trained tokens plus a third of the scored ones: backward costs two forward passes."""
        return self.trained_tokens + self.gradient_tokens + self.scored_tokens / 3.0


def replicates_table(estimates: Mapping[str, Estimate]) -> pa.Table:
    """The effects of each replication, for all directions; schema `REPLICATES`."""
    parts = []
    for direction, estimate in estimates.items():
        matrix = estimate.matrix
        effect_RTS = matrix.replicate_effects_RTS
        assert effect_RTS is not None, "a fresh estimate has its replicates"
        shape = effect_RTS.shape
        index = np.indices(shape).reshape(3, -1)
        parts.append(
            pa.table(
                {
                    "replication": index[0].astype(np.int32),
                    "target": [matrix.targets[row] for row in index[1]],
                    "source": [matrix.sources[column] for column in index[2]],
                    "direction": [direction] * index.shape[1],
                    "dose": matrix.dose_S[index[2]],
                    "effect": effect_RTS.ravel(),
                },
                schema=REPLICATES,
            )
        )
    return pa.concat_tables(parts)


def summarise(
    design: Design,
    config: InfluenceConfig,
    measured: Mapping[str, Measurements],
    estimates: Mapping[str, Estimate],
    losses: Losses,
    cost: Cost,
    rejected: Mapping[str, str],
    weight_T: np.ndarray | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`: agreement, noise, cost and the verdicts on them.

    Args:
        design: the runs.
        config: limits and confidence levels.
        measured: direction -> paired losses.
        estimates: direction -> effects per example.
        losses: of all runs.
        cost: of all runs.
        rejected: id of a held-out row that some run could not score -> reason.
        weight_T: [T] importance of the targets in the mix; None: all targets equal.
    """
    directions = {
        direction: _summarise_direction(measured[direction], estimate, config, cost, weight_T)
        for direction, estimate in estimates.items()
    }
    worth = worth_agreement(directions)
    # With two categories agreement cannot be computed.  That alone is no reason for doubt;
    # `is_checked` tells the reader.
    believed = len(design.replications) > 1 and (worth is None or worth >= config.min_agreement)
    return {
        "estimator": design.estimator,
        "replications": len(design.replications),
        "errors": "held-out only" if len(design.replications) < 2 else "replication",
        "confidence": config.confidence,
        "metric": config.metric,
        "unit": METRIC_UNITS[config.metric],
        "is_believed": believed,
        "is_checked": worth is not None,
        "min_agreement": config.min_agreement,
        "directions": directions,
        "targets": [
            {**asdict(target), "reference_loss": _reference_loss(design, losses, row)}
            for row, target in enumerate(design.targets)
        ],
        "sources": {
            name: {
                direction: {
                    "dose": float(design.dose_rows(direction).mean(axis=0)[column]),
                    "dose_tokens": float(design.dose_tokens(direction).mean(axis=0)[column]),
                }
                for direction in design.directions
            }
            for column, name in enumerate(design.sources)
        },
        "reference_rows": float(
            np.mean(
                [
                    sum(rows.base for rows in item.rows.values()) + item.foreign_rows
                    for item in design.replications
                ]
            )
        ),
        "adapted": _adapted(design),
        "dropped": design.dropped,
        "examples_left_out": losses.num_incomplete,
        "rejected": dict(rejected),
        "cost": {**asdict(cost), "token_equivalents": cost.token_equivalents},
    }


def worth_agreement(directions: Mapping[str, Any]) -> float | None:
    """Split-half agreement on the worth of the categories; it decides whether a matrix is believed.

    The minimum over directions.  The halves are scored on different held-out rows: on the same rows
    the effect of a dose replicates even if it is not typical of the category.  None if nothing can
    be compared (one replication, two categories, or all categories have the same worth).

    Args:
        directions: `directions` of a summary.
    """
    agreements = [direction_worth_agreement(part) for part in directions.values()]
    return min((value for value in agreements if value is not None), default=None)


def direction_worth_agreement(part: Mapping[str, Any]) -> float | None:
    """The same for one direction.

    Args:
        part: the entry of the direction in `directions`.
    """
    halves = part["agreement_heldout_split"]
    return None if halves is None else halves["worth"]


def _summarise_direction(
    measured: Measurements,
    estimate: Estimate,
    config: InfluenceConfig,
    cost: Cost,
    weight_T: np.ndarray | None,
) -> dict[str, Any]:
    matrix, errors = estimate.matrix, estimate.errors
    other_TS = ~matrix.own_TS
    dose = float(np.mean(matrix.dose_S))
    needed = replications_to_halve(estimate, measured.num_replications)
    replication_tokens = (cost.trained_tokens + cost.gradient_tokens) / measured.num_replications
    training = errors.training
    prediction = left_out_prediction(measured, errors)
    agreement = split_half(measured, weight_T=weight_T, confidence=config.confidence)
    apart = split_half(
        measured, split_heldout=True, weight_T=weight_T, confidence=config.confidence
    )
    return {
        "agreement": None if agreement is None else agreement.to_json(),
        "agreement_heldout_split": None if apart is None else apart.to_json(),
        "identifiable": int(matrix.identifiable_TS.sum()),
        "identifiable_off_diagonal": int((matrix.identifiable_TS & other_TS).sum()),
        "pairs": int(other_TS.sum()),
        "significant_pairs": int(
            ((matrix.effect_low_TS > 0) | (matrix.effect_high_TS < 0))[other_TS].sum()
        ),
        "noise": {
            "effect_se_median": json_number(np.median(matrix.effect_se_TS[other_TS])),
            "dose_se_median": json_number(np.median(np.sqrt(errors.variance_TS[other_TS]))),
            "training_sd_median": None
            if training is None
            else json_number(np.median(np.sqrt(training.variance_TS[other_TS]))),
            "heldout_se_median": json_number(np.median(np.sqrt(errors.heldout_TS[other_TS]))),
            "shared_reference_correlation": None if training is None else training.shared,
            "own_correlation": None if training is None else training.own_shared,
            "relative": None if training is None else training.relative,
            "degrees_of_freedom_median": json_number(np.median(matrix.effect_df_TS[other_TS])),
            "signal_sd": json_number(math.sqrt(estimate.shrunken.others.entry_variance) * dose),
        },
        "priors": {
            "others": asdict(estimate.shrunken.others),
            "own": None if estimate.shrunken.own is None else asdict(estimate.shrunken.own),
        },
        "prediction": None if prediction is None else prediction.to_json(),
        "halving": {
            "replications": needed,
            "trained_tokens": None
            if needed is None
            else int((needed - measured.num_replications) * replication_tokens),
        },
        "strongest": _strongest(matrix),
        "identify": identify_json(
            matrix,
            replications_to_identify(
                measured,
                estimate,
                confidence=config.confidence,
                gamma_floor=config.gamma_floor,
                gamma_max_width=config.gamma_max_width,
            ),
            measured.num_replications,
        ),
    }


def _strongest(matrix: EffectMatrix) -> dict[str, Any]:
    """The pairs with the largest and smallest shrunken effect off the diagonal."""
    shrunk_TS = np.where(matrix.own_TS, np.nan, matrix.shrunk_TS)
    strongest: dict[str, Any] = {}
    for name, flat in (
        ("synergy", np.nanargmax(shrunk_TS)),
        ("antagonism", np.nanargmin(shrunk_TS)),
    ):
        row, column = np.unravel_index(int(flat), shrunk_TS.shape)
        dose = float(matrix.dose_S[column])
        strongest[name] = {
            "target": matrix.targets[row],
            "source": matrix.sources[column],
            "dose": dose,
            "change": json_number(matrix.effect_TS[row, column] * dose),
            "low": json_number(matrix.effect_low_TS[row, column] * dose),
            "high": json_number(matrix.effect_high_TS[row, column] * dose),
            "shrunk": json_number(matrix.shrunk_TS[row, column] * dose),
        }
    return strongest


def result_lines(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Three to eight lines of text about the results."""
    lines = []
    short = short_unit(summary["unit"])
    verb = {"add": "adding", "remove": "removing"}
    for direction, part in summary["directions"].items():
        noise, pairs = part["noise"], part["pairs"]
        text = (
            f"{verb[direction]} a dose: typical error {noise['dose_se_median']:.4f} {short} "
            f"against effects that vary by {noise['signal_sd']:.4f}"
        )
        halves = part["agreement"]
        if summary["replications"] < 2:
            lines.append(f"{text}; only one replication, so these are held-out errors alone")
        elif halves is None:
            lines.append(f"{text}; two categories are too few to compare halves")
        else:
            rank = halves["rank"]
            lines.append(
                f"{text}; halves of the replications agree on the order of the interactions by "
                f"{_interval(rank['value'], rank['low'], rank['high'], 2)}, on the worth of the "
                "categories, scored on different rows, by "
                f"{_signed(direction_worth_agreement(part))}"
            )
        lines.append(
            f"{part['significant_pairs']} of {pairs} pairs differ from zero; gamma is "
            f"identifiable for {part['identifiable_off_diagonal']}"
        )
    direction, part = next(iter(summary["directions"].items()))
    synergy, antagonism = part["strongest"]["synergy"], part["strongest"]["antagonism"]
    unit = f"{short} for a dose"
    lines.append(
        f"strongest help: {synergy['source']} -> {synergy['target']} "
        f"{_interval(synergy['change'], synergy['low'], synergy['high'], 4)} {unit}; "
        f"strongest harm: {antagonism['source']} -> {antagonism['target']} "
        f"{_interval(antagonism['change'], antagonism['low'], antagonism['high'], 4)}"
    )
    lines += append_lines(summary)
    if summary["adapted"]:
        names = ", ".join(sorted(summary["adapted"]))
        lines.append(f"smaller doses than requested, because there are too few rows: {names}")
    if summary["estimator"] == "gradient":
        lines.append(FIRST_ORDER)
    if summary["replications"] > 1 and not summary["is_believed"]:
        lines.append(
            "the halves agree less on the worth of the categories than influence.min_agreement "
            f"{summary['min_agreement']}: these effects should not move a mix"
        )
    cost = summary["cost"]
    done = f"{cost['runs']} trainings, {cost['trained_tokens']:,} tokens trained"
    if summary["estimator"] == "gradient":
        lines.append(
            f"{done} and {cost['gradient_tokens']:,} differentiated in "
            f"{cost['train_seconds']:.0f} s"
        )
    else:
        lines.append(
            f"{done} in {cost['train_seconds']:.0f} s, {cost['scored_tokens']:,} scored in "
            f"{cost['score_seconds']:.0f} s"
        )
    return tuple(lines)


def _signed(value: float | None) -> str:
    return "nothing (all have the same worth)" if value is None else f"{value:+.2f}"


def _interval(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    if value is None:
        return "nothing (all are alike)"
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _reference_loss(design: Design, losses: Losses, row: int) -> float:
    """Mean held-out loss of the reference runs; of all runs if the design has none."""
    columns = losses.examples[row]
    references = [run.name for run in design.runs if run.kind == "reference"]
    names = references or list(losses.loss)
    return float(np.mean([losses.loss[name][columns].mean() for name in names]))


def _adapted(design: Design) -> dict[str, Any]:
    """Categories with fewer rows than requested, and their actual rows in each replication."""
    adapted: dict[str, Any] = {}
    for replication in design.replications:
        for name, rows in replication.rows.items():
            actual = {"base": rows.base, "dose": rows.dose, "extra": rows.extra, "warm": rows.warm}
            kinds = ("dose",) if design.is_appended(name) else tuple(actual)
            # With a token limit, shorter doses are intended and not a lack of rows.
            if "dose_tokens" in design.asked:
                kinds = ("base", "warm")
            actual = {kind: actual[kind] for kind in kinds}
            requested = {kind: design.asked[kind] for kind in kinds}
            if actual != requested or rows.warm_reused:
                adapted.setdefault(name, []).append(
                    {"replication": replication.index, **asdict(rows), "asked": requested}
                )
    return adapted
