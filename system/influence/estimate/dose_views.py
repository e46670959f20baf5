"""Splits a design with several doses, and its losses, into one view per dose.

All later steps (paired differences, errors, gamma, shrinkage) handle one dose, so they get one view
after the other.  Doses share some runs: the reference, and the run of a category that has no more
rows for the larger dose.  These runs are in every view, so the doses stay paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from system.influence.design.design import CategoryRows, Design, Replication
from system.influence.design.doses import SINGLE_SOURCE_KINDS, distinct_doses
from system.influence.estimate.matrix import EffectMatrix, Estimate
from system.influence.estimate.measurements import Losses
from system.influence.estimate.summary import replicates_table


def design_at(design: Design, dose: int) -> Design:
    """The design as if this were its only dose.

    Args:
        design: with several doses.
        dose: requested rows, one of `design.doses`.
    """
    requested = {name: min(design.asked[name], dose) for name in ("dose", "extra")}
    return replace(
        design,
        doses=(),
        asked={**design.asked, **requested},
        replications=tuple(
            _replication_at(replication, design.doses.index(dose), dose)
            for replication in design.replications
        ),
    )


def _replication_at(replication: Replication, place: int, dose: int) -> Replication:
    def cut(rows: CategoryRows) -> CategoryRows:
        return replace(rows, dose=min(rows.dose, dose), extra=min(rows.extra, dose))

    tokens = {
        direction: {
            source: [*parts, replication.dose_tokens[direction][source]][place]
            for source, parts in by_source.items()
        }
        for direction, by_source in replication.smaller_tokens.items()
    }
    return replace(
        replication,
        rows={name: cut(rows) for name, rows in replication.rows.items()},
        dose_tokens=tokens,
        smaller_tokens={},
    )


def losses_at(design: Design, losses: Losses, dose: int) -> Losses:
    """The losses of the runs of `design_at`, by the names that the runs have there.

    Args:
        design: with several doses.
        losses: of all its runs.
        dose: requested rows, one of `design.doses`.
    """
    loss: dict[str, np.ndarray] = {}
    for run in design_at(design, dose).runs:
        measured = run
        if run.kind in SINGLE_SOURCE_KINDS:
            # A small category was not run at this dose if a smaller one already has all its rows.
            largest = design.largest_dose_rows(run.replication, run.kind, run.source)
            measured = replace(run, dose=min(dose, distinct_doses(design.doses, largest)[-1]))
        loss[run.name] = losses.loss[measured.name]
    return replace(losses, loss=loss)


def levels_table(matrices: Sequence[EffectMatrix]) -> pa.Table:
    """One table (schema `MATRIX_FILE`) of the matrices of all doses, for one direction and unit.

    A source that has no more rows than at the previous dose appears once for both doses.

    Args:
        matrices: over the same targets and sources, by ascending dose.
    """
    parts = [matrices[0].to_table()]
    for smaller, larger in pairwise(matrices):
        is_new_S = smaller.dose_S != larger.dose_S
        keep = np.tile(is_new_S, len(larger.targets))
        parts.append(larger.to_table().filter(pa.array(keep)))
    return pa.concat_tables(parts)


def levels_replicates(levels: Sequence[Mapping[str, Estimate]]) -> pa.Table:
    """One table (schema `summary.REPLICATES`) with every dose of every source once.

    Args:
        levels: by ascending dose, direction -> estimate.
    """
    parts = [replicates_table(levels[0])]
    for smaller, larger in pairwise(levels):
        table = replicates_table(larger)
        fresh = {
            (direction, source)
            for direction, estimate in larger.items()
            for source, is_new in zip(
                estimate.matrix.sources,
                estimate.matrix.dose_S != smaller[direction].matrix.dose_S,
                strict=True,
            )
            if is_new
        }
        keys = zip(table["direction"].to_pylist(), table["source"].to_pylist(), strict=True)
        parts.append(table.filter(pa.array([key in fresh for key in keys], pa.bool_())))
    return pa.concat_tables(parts)


def read_levels(table: pa.Table, *, direction: str, where: str = "matrix") -> list[EffectMatrix]:
    """The matrices per example of one direction, by ascending dose; at least one.

    A source with too few rows for a larger dose repeats its largest.

    Raises:
        DataError: as `EffectMatrix.from_table`.
    """
    largest = EffectMatrix.from_table(table, direction=direction, where=where)
    doses: dict[str, set[float]] = {}
    for row in table.select(["source", "dose", "direction", "unit"]).to_pylist():
        if row["direction"] == direction and row["unit"] == largest.unit:
            doses.setdefault(row["source"], set()).add(row["dose"])
    count = max(len(of_source) for of_source in doses.values())
    smaller = [
        EffectMatrix.from_table(table, direction=direction, where=where, level=level)
        for level in range(count - 1)
    ]
    return [*smaller, largest]
