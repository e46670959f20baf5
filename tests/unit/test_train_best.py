"""Held-out loss at the checkpoints, the best one kept, and killed at any moment the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from train_jobs import (
    CPU,
    base,  # noqa: F401  (a fixture)
    build_job,
    metrics,
    run_killed,
    weights,
    without_times,
)
from training_builders import (
    build_model,
    build_settings,
    build_small_plan,
    build_tokens,
    largest_difference,
)

from system.errors import DataError
from system.models.base import load_model
from system.training.heldout import held_out_loss
from system.training.job import Ranks, run_job
from system.training.plan import write_plan
from system.training.records import TrainJob
from system.training.train import Training

FORGETTING = {"learning_rate": 3e-2, "lr_schedule": "linear"}


def heldout_plan():
    """Rows that look like those of steps 1 and 2: later steps forget them again."""
    return build_small_plan(build_tokens(48).slice(8, 16))


def build_best_job(root: Path, base: Path, **changes) -> TrainJob:
    heldout_uri = str(root / "heldout.arrow")
    write_plan(heldout_uri, heldout_plan())
    values = {
        "heldout_uri": heldout_uri,
        "export": "best",
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "settings": build_settings(**FORGETTING),
    }
    return build_job(root, base, **(values | changes))


def row_by_row(model, plan) -> float:
    """The definition: mean over response tokens of -log p, one row at a time."""
    total, labels = 0.0, 0
    model.eval()
    for row in range(plan.table.num_rows):
        part = slice(plan.offsets[row], plan.offsets[row + 1])
        ids = torch.from_numpy(plan.input_ids[part].astype(np.int64))
        wanted = torch.from_numpy(plan.response_mask[part].copy())[1:]
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        nll = -log_p.gather(1, ids[1:, None])[:, 0]
        total += float(nll[wanted].sum())
        labels += int(wanted.sum())
    return total / labels


def test_held_out_loss_is_that_of_the_definition_and_moves_nothing():
    heldout = build_small_plan(build_tokens(20, seed=7))
    model, other = build_model(), build_model()
    plan = build_small_plan()
    with (
        Training(model, plan, build_settings()) as watched,
        Training(other, plan, build_settings()) as unwatched,
    ):
        for step in range(3):
            found = held_out_loss(watched, heldout)
            assert found == held_out_loss(watched, heldout)
            watched.step(step)
            unwatched.step(step)
            assert watched.model.training
    assert largest_difference(dict(model.named_parameters()), dict(other.named_parameters())) == 0.0
    with Training(model, plan, build_settings()) as training:
        assert held_out_loss(training, heldout) == pytest.approx(row_by_row(other, heldout))


def test_best_weights_are_exported_and_named(tmp_path, base):
    job = build_best_job(tmp_path, base)
    summary = run_job(job, Ranks(), CPU)
    losses = [record["heldout_loss"] for record in metrics(job)]
    best = int(np.argmin(losses)) + 1
    assert 1 < best < 6, "the rows must be forgotten again, or this test says nothing"
    assert summary.exported_step == best and summary.heldout_loss == min(losses)
    exported = load_model(Path(job.output_uri) / "model")
    assert row_by_row(exported, heldout_plan()) == pytest.approx(min(losses))
    card = (Path(job.output_uri) / "model" / "README.md").read_text()
    assert f"after step {best} of 6, the best checkpoint" in card
    last = dataclasses.replace(job, export="last", output_uri=str(tmp_path / "last"))
    assert run_job(last, Ranks(), CPU).exported_step == 6
    assert largest_difference(weights(job), weights(last)) > 1e-3
    plain = dataclasses.replace(last, heldout_uri=None, output_uri=str(tmp_path / "plain"))
    run_job(plain, Ranks(), CPU)
    assert largest_difference(weights(plain), weights(last)) == 0.0


@pytest.mark.parametrize("damage", ["none", "best removed", "best garbage"])
@pytest.mark.parametrize("at_step", [1, 3, 5])
def test_killed_training_exports_the_same_best_weights(tmp_path, base, at_step, damage):
    whole, broken = (build_best_job(tmp_path / name, base) for name in ("whole", "broken"))
    expected = run_job(whole, Ranks(), CPU)
    run_killed(broken, at_step=at_step)
    root = Path(broken.output_uri) / "checkpoints"
    found = sorted(root.glob("step-*"))
    assert 1 <= len(found) <= 2
    if damage == "best removed":
        (found[0] / "COMMIT.json").unlink()
    elif damage == "best garbage":
        data = next(found[0].glob("*.distcp"))
        data.write_bytes(b"\xff" * data.stat().st_size)
    result = run_job(broken, Ranks(), CPU)
    assert result.exported_step == expected.exported_step
    assert result.heldout_loss == expected.heldout_loss
    assert largest_difference(weights(whole), weights(broken)) == 0.0
    assert without_times(metrics(broken)) == without_times(metrics(whole))


def test_checkpoints_of_a_job_with_other_held_out_rows_are_refused(tmp_path, base):
    job = build_best_job(tmp_path, base)
    run_killed(job, at_step=2)
    write_plan(job.heldout_uri, build_small_plan(build_tokens(20, seed=8)))
    with pytest.raises(DataError, match="held-out rows: "):
        run_job(job, Ranks(), CPU)
