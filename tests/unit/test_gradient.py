"""First-order effects against autograd, finite differences and real optimiser steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from training_builders import build_model, build_tokens

from system.config import LoraConfig
from system.errors import DataError, ModelError
from system.influence.measure.gradient import (
    Derivatives,
    GradientTask,
    checkpoint_path,
    checkpoint_steps,
    differentiate,
    mean_rate,
    warm_up,
)
from system.influence.measure.projection import Projection
from system.training.optim import learning_rate
from system.training.plan import TrainPlan, build_plan
from system.training.settings import TrainSettings
from system.training.train import Training

CATEGORIES = ("code", "math", "poem")
EXACT = 1 << 30


def tuning(**values: object) -> TrainSettings:
    return TrainSettings(
        **{
            "learning_rate": 1e-3,
            "lr_schedule": "linear",
            "warmup_share": 0.0,
            "max_grad_norm": 1e9,
            "seed": 7,
            **values,
        }  # pyright: ignore
    )


def plan_of(tokens: pa.Table, batch_size: int = 16) -> TrainPlan:
    stages = ["base"] * tokens.num_rows
    return build_plan(tokens, stages, batch_size=batch_size, max_length=64, packing=False)


MAIN = plan_of(build_tokens(48, seed=1))
WARM_ROWS = build_tokens(40, seed=2)
WARM = plan_of(WARM_ROWS, batch_size=8)
HELDOUT = build_tokens(9, seed=3)


def rows_of(plan: TrainPlan, category: str) -> np.ndarray:
    return np.flatnonzero(np.array(plan.table.column("category").to_pylist()) == category)


def task(**values: object) -> GradientTask:
    doses = tuple(rows_of(MAIN, name) for name in CATEGORIES)
    defaults = {"doses": doses, "part": 0, "num_parts": 1, "dimension": EXACT, "seed": 5}
    return GradientTask(**{**defaults, **values})  # pyright: ignore


def derivatives(
    folder: Path, settings: TrainSettings, heldout: pa.Table = HELDOUT, **values: object
) -> Derivatives:
    wanted = task(**values)
    warm_up(build_model(), WARM, settings, wanted.num_parts, folder)
    checkpoint = checkpoint_path(folder, wanted.part)
    return differentiate(build_model(), MAIN, wanted, heldout, settings, checkpoint)


def warmed(folder: Path, part: int = 0) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model at a checkpoint, in double precision, and the checkpoint."""
    state = load_file(checkpoint_path(folder, part))
    model = build_model()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(state[f"weight.{name}"])
    return model.double(), state


def row_loss(model: torch.nn.Module, tokens: pa.Table, row: int, *, mean: bool) -> torch.Tensor:
    """Plain transformers: no code of ours but the tokens."""
    ids = torch.tensor([tokens.column("input_ids")[row].as_py()])
    mask = torch.tensor(tokens.column("response_mask")[row].as_py())[1:]
    log_probs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
    picked = -log_probs.gather(1, ids[0, 1:, None])[:, 0][mask]
    return picked.mean() if mean else picked.sum()


def steps_of(
    model: torch.nn.Module, state: dict[str, torch.Tensor], settings: TrainSettings
) -> list[dict[str, torch.Tensor]]:
    """Per category: the weights' move for a mean row of its dose, written out by hand."""
    correction = 1.0 - settings.beta2 ** float(state["steps_made"])
    rate = np.mean([learning_rate(s, MAIN.num_steps, settings) for s in range(MAIN.num_steps)])
    found = []
    for category in CATEGORIES:
        rows = rows_of(MAIN, category)
        model.zero_grad()
        (sum(row_loss(model, MAIN.table, int(r), mean=False) for r in rows) / len(rows)).backward()
        factor = float(state["clip"]) * rate / MAIN.denominators.mean()
        move = {}
        for name, value in model.named_parameters():
            assert value.grad is not None
            root = (state[f"exp_avg_sq.{name}"].double() / correction).sqrt()
            move[name] = -factor * value.grad / (root + settings.epsilon)
        found.append(move)
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("warm")


@pytest.fixture(scope="module")
def found(folder: Path) -> Derivatives:
    """Exact derivatives, its checkpoint in `folder`."""
    return derivatives(folder, tuning())


def test_derivatives_are_those_of_autograd_in_double_precision(folder, found):
    model, state = warmed(folder)
    moves = steps_of(model, state, tuning())
    scale = np.abs(found.decrease_HD).max()
    for row in range(HELDOUT.num_rows):
        model.zero_grad()
        loss = row_loss(model, HELDOUT, row, mean=True)
        loss.backward()
        expected = [
            -sum(float((value.grad * move[name]).sum()) for name, value in model.named_parameters())
            for move in moves
        ]
        np.testing.assert_allclose(found.decrease_HD[row], expected, rtol=1e-3, atol=1e-4 * scale)
    tokens = sum(len(row) for row in HELDOUT.column("input_ids").to_pylist())
    assert found.num_tokens == tokens + MAIN.num_tokens


def test_derivatives_are_those_of_moving_the_weights(folder, found):
    """The weights are moved along a source's direction both ways, and the losses differenced."""
    model, state = warmed(folder)
    scale = np.abs(found.decrease_HD).max()
    reach = 0.2  # of a row: enough against the single precision of rotary positions
    for source, move in enumerate(steps_of(model, state, tuning())):
        losses = {side: moved_losses(folder, move, side * reach) for side in (1.0, -1.0)}
        expected = (losses[-1.0] - losses[1.0]) / (2 * reach)
        np.testing.assert_allclose(
            found.decrease_HD[:, source], expected, rtol=2e-2, atol=2e-3 * scale
        )


def moved_losses(folder: Path, move: dict[str, torch.Tensor], by: float) -> np.ndarray:
    model, _ = warmed(folder)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(move[name], alpha=by)
        return losses_of(model)


def losses_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        rows = range(HELDOUT.num_rows)
        return np.array([float(row_loss(model, HELDOUT, row, mean=True)) for row in rows])


def test_a_small_real_dose_moves_the_losses_as_predicted(folder, found):
    """Trained with and without a dose, from the checkpoint and with its moments, at a rate so
    small that first order is all there is: same sign, same scale, row for row."""
    small = tuning(learning_rate=1e-5, beta2=1 - 1e-6, lr_schedule="warmup-stable-decay")
    dose = rows_of(MAIN, "math")
    losses = []
    for has_dose in (True, False):
        model = build_model()
        active = np.ones(MAIN.table.num_rows, dtype=bool)
        active[dose] = has_dose
        with Training(model, MAIN, small, active=active) as training:
            put_moments(training, load_file(checkpoint_path(folder, 0)))
            for step in range(MAIN.num_steps):
                training.step(step)
            for _ in range(200):  # what momentum still holds
                training.parallel.zero_gradient()
                training.parallel.optimizer.step()
        losses.append(losses_of(model.double()))
    real = losses[1] - losses[0]
    slower = small.learning_rate / mean_rate(MAIN, tuning())
    predicted = found.decrease_HD[:, 1] * len(dose) * slower
    assert np.corrcoef(real, predicted)[0, 1] > 0.99
    assert 0.9 < float(real @ predicted / (predicted @ predicted)) < 1.1


def put_moments(training: Training, state: dict[str, torch.Tensor]) -> None:
    """Weights and second moments of a checkpoint, as an optimiser that has made many steps."""
    correction = 1.0 - tuning().beta2 ** float(state["steps_made"])
    own = training.state()
    with torch.no_grad():
        for name in own:
            if name.startswith("weight."):
                own[name].copy_(state[name])
            elif name.startswith("exp_avg_sq."):
                own[name].copy_(state[name] / correction)
    training.set_steps_made(10**8)


def test_projected_products_are_right_on_average_and_better_the_larger():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5000, generator=generator)
    other += 0.5 * one
    exact = float(one @ other)
    spread = {}
    for dimension in (64, 1024):
        guesses = []
        for seed in range(100):
            project = Projection(5000, dimension, seed, torch.device("cpu"))
            guesses.append(float(project(one) @ project(other)))
        error = np.std(guesses) / 10
        assert abs(np.mean(guesses) - exact) < 4 * error
        bound = np.sqrt((float(one @ one) * float(other @ other) + exact**2) / dimension)
        assert 0.7 * bound < np.std(guesses) < 1.3 * bound
        spread[dimension] = np.std(guesses)
    assert spread[64] > 3 * spread[1024]


def test_a_projection_is_the_same_vector_where_it_fits_and_the_same_map_for_a_seed():
    vector = torch.arange(100.0)
    assert Projection(100, 100, 0, vector.device)(vector) is vector
    once, twice, other = (Projection(100, 10, seed, vector.device)(vector) for seed in (1, 1, 2))
    assert torch.equal(once, twice) and not torch.equal(once, other)


def test_projected_derivatives_lie_around_the_exact_ones(folder, found):
    checkpoint = checkpoint_path(folder, 0)
    guesses = [
        differentiate(
            build_model(), MAIN, task(dimension=4096, seed=seed), HELDOUT, tuning(), checkpoint
        ).decrease_HD
        for seed in range(12)
    ]
    mean, spread = np.mean(guesses, axis=0), np.std(guesses, axis=0, ddof=1)
    z = (mean - found.decrease_HD) / (spread / np.sqrt(12))
    assert np.sqrt(np.mean(z**2)) < 1.6
    assert np.corrcoef(mean.ravel(), found.decrease_HD.ravel())[0, 1] > 0.8


def test_checkpoints_lie_in_the_second_half_and_the_last_at_the_end():
    assert checkpoint_steps(100, 1) == [100]
    assert checkpoint_steps(100, 2) == [75, 100]
    assert checkpoint_steps(7, 3) == [5, 6, 7]
    with pytest.raises(DataError, match="second half of the warm-up has 2 steps"):
        checkpoint_steps(5, 3)


def test_a_later_checkpoint_has_learnt_more(tmp_path):
    settings = tuning(learning_rate=5e-3)
    assert warm_up(build_model(), WARM, settings, 2, tmp_path).trained_tokens == WARM.num_tokens
    early, late = (
        differentiate(
            build_model(),
            MAIN,
            task(part=part, num_parts=2, doses=task().doses[:1]),
            WARM_ROWS,
            settings,
            checkpoint_path(tmp_path, part),
        ).nll_H.sum()
        for part in range(2)
    )
    assert late < early


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_full_and_adapter_gradients_are_the_same_bits_again(tmp_path, lora):
    settings = tuning(lora=lora)
    first, again = (derivatives(tmp_path, settings) for _ in range(2))
    np.testing.assert_array_equal(first.decrease_HD, again.decrease_HD)
    assert (first.decrease_HD != 0).all()


def test_other_heldout_rows_and_doses_change_no_row(folder, found):
    only = task(doses=task().doses[1:2])
    part = differentiate(
        build_model(), MAIN, only, HELDOUT.slice(2, 3), tuning(), checkpoint_path(folder, 0)
    )
    np.testing.assert_allclose(
        part.decrease_HD[:, 0], found.decrease_HD[2:5, 1], rtol=1e-5, atol=1e-9
    )


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    warm_up(build_model(tied=False), WARM, tuning(), 1, tmp_path)
    with pytest.raises(ModelError, match="weights and moments of this model"):
        differentiate(build_model(), MAIN, task(), HELDOUT, tuning(), checkpoint_path(tmp_path, 0))
