"""What becomes of derivatives: predicted losses, and the effects that come out of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from system import storage
from system.influence.design.design import (
    CategoryRows,
    Design,
    InterventionRun,
    Replication,
    Target,
)
from system.influence.estimate.measurements import collect_losses, paired_differences
from system.influence.measure.first_order import (
    GRADIENTS,
    NOT_FINITE,
    gradient_task,
    gradients_table,
    predicted_scores,
)
from system.influence.measure.gradient import Derivatives
from system.schema import TOKENS, check_table
from system.training.plan import TrainPlan, build_plan

SOURCES = ("alpha", "beta")
DIRECTIONS = ("add", "remove")
HELDOUT = 3


def design(doses: tuple[int, ...] = (8, 8), checkpoints: int = 2) -> Design:
    def rows(dose: int) -> CategoryRows:
        return CategoryRows(available=99, base=16, dose=dose, extra=4, warm=6, warm_reused=0)

    return Design(
        estimator="gradient",
        seed=1,
        directions=DIRECTIONS,
        sources=SOURCES,
        targets=tuple(
            Target(name=name, num_rows=HELDOUT, num_tokens=6, is_external=False) for name in SOURCES
        ),
        replications=tuple(
            Replication(
                index=index,
                seed=index,
                plan_sha256="",
                warm_sha256="",
                num_steps=4,
                rows={name: rows(dose) for name in SOURCES},
                dose_tokens={d: dict.fromkeys(SOURCES, 2 * dose) for d in DIRECTIONS},
            )
            for index, dose in enumerate(doses)
        ),
        asked={"base": 16, "dose": 8, "extra": 4, "warm": 6, "heldout": HELDOUT},
        dropped={},
        gradient_checkpoints=checkpoints,
    )


def heldout() -> pa.Table:
    count = HELDOUT * len(SOURCES)
    return pa.table(
        {
            "id": [f"h{k}" for k in range(count)],
            "category": [name for name in SOURCES for _ in range(HELDOUT)],
            "input_ids": [[1, 2, 3]] * count,
            "response_mask": [[False, True, True]] * count,
        }
    ).cast(TOKENS)


def derivatives(decrease_HD: np.ndarray) -> Derivatives:
    return Derivatives(
        nll_H=np.full(len(decrease_HD), 5.0), decrease_HD=decrease_HD, num_tokens=1, seconds=0.0
    )


def measured(made: Design, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, pa.Table]]:
    """Random derivatives of every run, and their tables."""
    rng = np.random.default_rng(seed)
    size = (HELDOUT * len(SOURCES), len(DIRECTIONS) * len(SOURCES))
    arrays = {run.name: rng.normal(size=size) for run in made.all_runs if run.kind != "warm"}
    tables = {n: gradients_table(heldout(), derivatives(a))[0] for n, a in arrays.items()}
    return arrays, tables


def test_a_design_takes_a_warm_up_and_its_checkpoints_and_predicts_all_runs():
    made = design()
    assert [run.name for run in made.all_runs][:4] == [
        "r00-warm", "r00-gradient-000", "r00-gradient-001", "r01-warm",
    ]  # fmt: skip
    runs = [run.name for run in made.runs if run.replication == 1]
    assert runs == [
        "r01-reference", "r01-add-000", "r01-add-001", "r01-remove-000", "r01-remove-001",
    ]  # fmt: skip
    again = Design.from_json(made.to_json(), "design.json")
    assert again.all_runs == made.all_runs


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_effects_are_the_summed_derivatives_per_row(direction):
    """Whatever the direction and the dose: the dose that goes in comes out again."""
    made = design(doses=(8, 12))
    arrays, tables = measured(made)
    losses = collect_losses(made, predicted_scores(made, tables))
    found = paired_differences(made, losses, direction)
    effect_RTS = found.mean_RTS / found.dose_S
    first = 0 if direction == "add" else len(SOURCES)
    for replication in range(2):
        total = sum(arrays[f"r{replication:02d}-gradient-{k:03d}"] for k in range(2))
        for target in range(len(SOURCES)):
            rows = total[target * HELDOUT : (target + 1) * HELDOUT, first : first + len(SOURCES)]
            np.testing.assert_allclose(effect_RTS[replication, target], rows.mean(axis=0))


def test_the_sign_is_that_of_help():
    """A source whose rows take nats off a target's loss has a positive effect in both directions,
    and the run without it a higher predicted loss."""
    made = design(doses=(8,), checkpoints=1)
    decrease_HD = np.full((HELDOUT * 2, 4), 0.25)
    tables = {"r00-gradient-000": gradients_table(heldout(), derivatives(decrease_HD))[0]}
    scores = predicted_scores(made, tables)
    mean = {name: np.mean(table["nll"].to_numpy()) for name, table in scores.items()}
    tokens = 2
    assert mean["r00-reference"] == 5.0
    assert mean["r00-add-000"] == pytest.approx(5.0 - tokens * 4 * 0.25)
    assert mean["r00-remove-001"] == pytest.approx(5.0 + tokens * 8 * 0.25)
    for direction in DIRECTIONS:
        found = paired_differences(made, collect_losses(made, scores), direction)
        assert (found.mean_RTS > 0).all()


def test_a_row_that_one_checkpoint_cannot_use_is_left_out_of_all_runs():
    made = design()
    arrays, tables = measured(made)
    name = "r01-gradient-000"
    arrays[name][1, 2] = np.nan
    tables[name], rejected = gradients_table(heldout(), derivatives(arrays[name]))
    assert rejected == {"h1": NOT_FINITE} and tables[name].num_rows == HELDOUT * 2 - 1
    losses = collect_losses(made, predicted_scores(made, tables))
    assert losses.num_incomplete == 1
    assert [columns.size for columns in losses.examples] == [HELDOUT - 1, HELDOUT]


def test_a_table_comes_back_from_its_file_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    written, rejected = gradients_table(heldout(), derivatives(rng.normal(size=(6, 4))))
    assert not rejected and written["id"].to_pylist() == heldout()["id"].to_pylist()
    storage.write_table(str(tmp_path / "unit.parquet"), written)
    read = storage.read_table(str(tmp_path / "unit.parquet"))
    assert check_table(read, GRADIENTS, "unit").equals(written)


def main_plan() -> TrainPlan:
    stages = ["dose", "base", "extra"] * 8
    count = len(stages)
    rows = pa.table(
        {
            "id": [str(k) for k in range(count)],
            "category": [SOURCES[k % 2] for k in range(count)],
            "input_ids": [[1, 2]] * count,
            "response_mask": [[False, True]] * count,
        }
    ).cast(TOKENS)
    return build_plan(rows, stages, batch_size=6, max_length=8, packing=False)


def test_a_task_differentiates_the_rows_that_the_runs_would_switch():
    plan, made = main_plan(), design()
    run = InterventionRun(replication=1, kind="gradient", source=1)
    task = gradient_task(plan, made, run, 64)
    assert (task.part, task.num_parts, task.dimension) == (1, 2, 64)
    stage, category = (plan.table[name].to_pylist() for name in ("stage", "category"))
    wanted = [("extra", "alpha"), ("extra", "beta"), ("dose", "alpha"), ("dose", "beta")]
    for rows, expected in zip(task.doses, wanted, strict=True):
        assert len(rows) == 4 and {(stage[r], category[r]) for r in rows} == {expected}
    other = gradient_task(plan, made, InterventionRun(replication=1, kind="gradient", source=0), 64)
    assert other.seed != task.seed  # projection errors of checkpoints average out
