"""From derivatives at checkpoints to the losses that the interventions would have had.

`gradient` measures, for every held-out row h and source j, by how much a row of j lowers h's loss
(`system.influence.measure.gradient`).  Summed over a replication's checkpoints and times the dose
that is the predicted loss of the run `add j` or `remove j`; written as such, everything after it
(paired differences, errors over replications and examples, gamma, shrinkage) is that of real runs.

Legend of shape suffixes: H held-out rows, D directions (in the order of `dose_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from system.influence.design.design import Design, InterventionRun
from system.influence.design.interventions import DOSE, EXTRA, seed_of
from system.influence.measure.gradient import Derivatives, GradientTask
from system.schema import SCORES, check_table
from system.training.plan import TrainPlan

GRADIENTS = pa.schema(
    [
        *SCORES,
        # nats per response token that a row of each dose takes off; doses as `dose_rows` has them
        pa.field("decrease", pa.list_(pa.float64()), nullable=False),
    ]
)
"""`influence/scores/*.parquet` of `gradient`: one checkpoint's part of the sum."""

NOT_FINITE = "loss or gradient is not finite"


def gradient_task(
    plan: TrainPlan, design: Design, run: InterventionRun, dimension: int
) -> GradientTask:
    """What a run of kind `gradient` differentiates; `dimension` is `influence.projection_dim`."""
    seed = design.replications[run.replication].seed
    return GradientTask(
        doses=tuple(dose_rows(plan, design)),
        part=run.source,
        num_parts=design.gradient_checkpoints,
        dimension=dimension,
        seed=seed_of(seed, "projection", run.source),
    )


def dose_rows(plan: TrainPlan, design: Design) -> list[np.ndarray]:
    """[D] plan rows of each dose: the sources of the first direction, then of the second."""
    stage = np.array(plan.table.column("stage").to_pylist())
    category = np.array(plan.table.column("category").to_pylist())
    return [
        np.flatnonzero((stage == (EXTRA if direction == "add" else DOSE)) & (category == source))
        for direction in design.directions
        for source in design.sources
    ]


def gradients_table(heldout: pa.Table, found: Derivatives) -> tuple[pa.Table, dict[str, str]]:
    """GRADIENTS of the rows that can be used; reason by id of those that cannot."""
    usable_H = np.isfinite(found.nll_H) & np.isfinite(found.decrease_HD).all(axis=1)
    masks = heldout.column("response_mask").to_pylist()
    table = pa.table(
        {
            "id": heldout.column("id"),
            "category": heldout.column("category"),
            "nll": found.nll_H,
            "num_tokens": np.array([sum(mask[1:]) for mask in masks], dtype=np.int32),
            "decrease": list(found.decrease_HD),
        },
        schema=GRADIENTS,
    )
    ids = heldout.column("id").to_pylist()
    rejected = {ids[row]: NOT_FINITE for row in np.flatnonzero(~usable_H)}
    return table.filter(pa.array(usable_H)), rejected


def predicted_scores(design: Design, gradients: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """SCORES of every run of the design, as first order predicts them.

    A row that some checkpoint could not use is in none of its replication's tables.  The reference
    has the loss of the last checkpoint.

    Args:
        design: of the estimator `gradient`.
        gradients: run name -> GRADIENTS table.
    """
    scores: dict[str, pa.Table] = {}
    for replication in range(len(design.replications)):
        names = [
            InterventionRun(replication=replication, kind="gradient", source=part).name
            for part in range(design.gradient_checkpoints)
        ]
        parts = [check_table(gradients[name], GRADIENTS, name) for name in names]
        last, decrease_HD = _summed(parts)
        nll_H = last.column("nll").to_numpy()
        tokens_H = last.column("num_tokens").to_numpy()
        place = 0
        for run in design.runs:
            if run.replication != replication:
                continue
            predicted_H = nll_H
            if run.kind != "reference":
                sign = -1.0 if run.kind == "add" else 1.0
                dose = design.dose_rows(run.kind)[replication, run.source]
                predicted_H = nll_H + sign * dose * tokens_H * decrease_HD[:, place]
                place += 1
            scores[run.name] = (
                last.select(["id", "category", "num_tokens"])
                .append_column(SCORES.field("nll"), pa.array(predicted_H))
                .select(SCORES.names)
            )
    return scores


def _summed(parts: list[pa.Table]) -> tuple[pa.Table, np.ndarray]:
    """The last checkpoint's rows that all have, and the [H, D] sum of all their decreases."""
    rows = [
        {
            key: row
            for row, key in enumerate(
                zip(part["category"].to_pylist(), part["id"].to_pylist(), strict=True)
            )
        }
        for part in parts
    ]
    keys = [key for key in rows[-1] if all(key in found for found in rows)]
    total_HD = np.zeros(())
    for part, found in zip(parts, rows, strict=True):
        decrease_HD = np.array(part["decrease"].to_pylist(), dtype=float)
        total_HD = total_HD + decrease_HD[[found[key] for key in keys]]
    return parts[-1].take(pa.array([rows[-1][key] for key in keys], type=pa.int64())), total_HD
