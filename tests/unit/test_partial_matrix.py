"""The matrix of the first replications, shown while the others still run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from append_corpus import Grown, design_at

from actors.influence.analysis import analyse
from actors.influence.intervention_runner import InterventionRunner
from actors.stage import StageContext
from system import storage
from system.errors import DataError
from system.influence.design.design import Design
from system.influence.estimate.matrix import EffectMatrix
from system.influence.measure.ledger import Ledger


class Answered(Grown):
    """Runs that answer questions; those of the first replication all answer wrong."""

    silent: tuple[int, ...] = (0,)

    def make_up(self, context: StageContext, design: Design) -> None:
        super().make_up(context, design)
        for run in design.all_runs:
            uri = storage.join(context.attempt, "scores", f"{run.name}.parquet")
            table = storage.read_table(uri)
            wrong = np.ones(table.num_rows)
            if run.replication not in self.silent:
                wrong = (table["nll"].to_numpy() > 2.5).astype(np.float64)
            place = table.column_names.index("nll")
            table = table.set_column(place, table.schema.field("nll"), pa.array(wrong))
            storage.write_table(uri, table)


class AllSilent(Answered):
    """No run ever answers otherwise."""

    silent = (0, 1)


@pytest.mark.parametrize("kind", [Answered, AllSilent])
def test_a_first_replication_that_answers_alike_ends_nothing(tmp_path: Path, kind: type[Answered]):
    run = kind(tmp_path, metric="accuracy", max_new_tokens=4)
    uri = run.earlier().uri
    design, context = design_at(uri), run.context(uri)
    first = {run.name for run in design.all_runs if run.replication == 0}
    ledger = Ledger(design.all_runs, trained=set(), scored=first, max_checkpoints=4)
    InterventionRunner(context, design)._show_partial_matrix(ledger)
    partial = storage.read_table(storage.join(uri, "partial.parquet"))
    assert not EffectMatrix.from_table(partial, direction="remove").effect_TS.any()
    if kind is AllSilent:
        with pytest.raises(DataError, match="alike"):
            analyse(context, design)
    else:
        matrix = analyse(context, design).largest.estimates["examples"]["remove"].matrix
        assert np.isfinite(matrix.effect_se_TS).all() and matrix.effect_TS.any()
