"""Predicts the losses of intervention runs from gradients (estimator `gradient`).

For every held-out row h and source j, `system.influence.measure.gradient` computes by how much one
row of j lowers the loss of h.  The sum over the checkpoints of a replication, times the dose, is
the predicted change of loss in the run `add j` or `remove j`.  The predictions have the form of
real scores, so all later steps (paired differences, errors, gamma, shrinkage) are the same.

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
        # nats per response token by which a row of each dose lowers the loss; order of `dose_rows`
        pa.field("decrease", pa.list_(pa.float64()), nullable=False),
    ]
)
"""Schema of `influence/scores/*.parquet` for `gradient`: the share of one checkpoint in the sum."""

NOT_FINITE = "loss or gradient is not finite"


def gradient_task(
    plan: TrainPlan, design: Design, run: InterventionRun, dimension: int
) -> GradientTask:
    """The task of a run of kind `gradient`; `dimension` is `influence.projection_dim`."""
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
    """GRADIENTS table of the usable rows, and id -> reason of the unusable ones."""
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
    """Predicts the SCORES of every run of the design to first order.

    A row that is unusable at any checkpoint is left out of all tables of the replication.  The
    reference run has the loss of the last checkpoint.

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
    """Rows that all checkpoints have (of the last one), and the [H, D] sum of their decreases."""
    rows = [
        {
            key: row
            for row, key in enumerate(
                zip(part["category"].to_pylist(), part["id"].to_pylist(), strict=True)
            )
        }
        for part in parts
    ]
    keys = [key for key in rows[-1] if all(key in row_of for row_of in rows)]
    total_HD = np.zeros(())
    for part, row_of in zip(parts, rows, strict=True):
        decrease_HD = np.array(part["decrease"].to_pylist(), dtype=float)
        total_HD = total_HD + decrease_HD[[row_of[key] for key in keys]]
    return parts[-1].take(pa.array([rows[-1][key] for key in keys], type=pa.int64())), total_HD
