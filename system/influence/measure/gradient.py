"""First-order effects: how one row of a source changes a held-out loss, without training on it.

In `system.training.train` a row z of the schedule adds grad nll(z) / denominator to the gradient of
one step.  If Adam's second moments v are fixed, its momentum applies the whole of this gradient
over the following steps, so the row moves the weights by

    - rate * clip / denominator * grad nll(z) / (sqrt(v) + epsilon)

and, to first order, lowers the loss of held-out example h by the product of that with grad loss(h).
Averaged over K checkpoints of a warm-up training on the base mix that is

    decrease[h, j] = sum over k of  rate / K * clip_k / denominator
                     * < grad loss(h; k),  grad nll(j; k) / (sqrt(v_k) + epsilon) >

in nats per response token of h, per row of j: the unit of `retrain`'s effects.

    nll, loss     summed over, and averaged over, the response tokens of a row (nats);
                  nll(j): mean over the rows of j's dose
    rate          mean learning rate of the schedule that the dose enters
    clip_k        mean factor of gradient clipping before the checkpoint
    v_k           second moments of the warm-up at its checkpoint, bias corrected
    denominator   mean response tokens of a step of the schedule

The checkpoints lie in the second half of the warm-up, the last one at its end.  Early in training
all categories teach the same things (format, common words).  There all effects look similar and
large, and later rows would make the same changes anyway.  Near the end of the warm-up the gradients
show what the base mix does not teach, which is what a dose adds.  (Measured in
`tests/benchmarks/influence.md`.)

Source: LESS (Xia et al. 2024, arXiv 2402.04333, section 2 and definition 3.1), which is TracIn
(Pruthi et al. 2020, arXiv 2002.08484) with Adam's step for the training row and the plain gradient
for the validation row.  This module differs, because it needs effects and not a ranking of rows:

- no normalisation to cosines, so that the unit stays nats;
- the share of the row itself in the step, without the momentum in LESS' Adam step, which is the
  same for all rows;
- equal weights of late checkpoints instead of their learning rates, which reach zero at the end of
  an annealed warm-up;
- rows are averaged before the product: exact inner products then cost less than projections of all
  rows.

First order ignores how later steps change the effect (curvature, forgetting) and that returns
diminish within a dose.  So large effects are overstated; trust their order, not their size.

Legend of shape suffixes: D directions (a source's dose rows in one direction of change), H held-out
rows, P trainable parameters, K dimension of the inner products.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from system.errors import DataError, ModelError
from system.influence.measure.projection import Projection
from system.influence.measure.proxy import TuneStats
from system.training.optim import learning_rate
from system.training.pack import group_by_tokens
from system.training.plan import TrainPlan, build_plan
from system.training.settings import TrainSettings
from system.training.train import Training

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_ROWS_IN_MEMORY = 1 << 24
"""Largest count of gradient values that are kept in memory for one matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientTask:
    """The gradients to compute at one checkpoint of a replication."""

    doses: tuple[np.ndarray, ...]
    """[D] plan rows of each dose."""
    part: int
    num_parts: int
    """K: `part` is the index among this many checkpoints."""
    dimension: int
    """Largest dimension of the inner products; longer vectors are projected."""
    seed: int
    """Seed of the projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivatives:
    """Losses and derivatives of held-out rows at one checkpoint; not finite for unusable rows."""

    nll_H: np.ndarray
    """[H] float64, nats summed over response tokens."""
    decrease_HD: np.ndarray
    """[H, D] float64, nats per response token per row of the dose; the share of this checkpoint
    in the sum."""
    num_tokens: int
    """Tokens of forward and backward passes, prompts included."""
    seconds: float


def checkpoint_steps(num_steps: int, num_checkpoints: int) -> list[int]:
    """Number of steps before each checkpoint: the ends of equal parts of the second half.

    Raises:
        DataError: more checkpoints than steps in that half.
    """
    half = num_steps / 2.0
    if num_checkpoints > half:
        raise DataError(
            f"influence.gradient_checkpoints is {num_checkpoints}, but the second half of the "
            f"warm-up has {int(half)} steps: lower it, or raise influence.warm_rows_per_category"
        )
    return [math.ceil(half + (k + 1) * half / num_checkpoints) for k in range(num_checkpoints)]


def mean_rate(plan: TrainPlan, settings: TrainSettings) -> float:
    """Mean learning rate of a schedule; the mean, because dose rows may lie anywhere in it."""
    rates = [learning_rate(step, plan.num_steps, settings) for step in range(plan.num_steps)]
    return sum(rates) / plan.num_steps


def checkpoint_path(folder: Path, part: int) -> Path:
    """The file of a warm-up's checkpoint."""
    return folder / f"part-{part:03d}.safetensors"


def warm_up(
    model: PreTrainedModel,
    plan: TrainPlan,
    settings: TrainSettings,
    num_checkpoints: int,
    folder: Path,
) -> TuneStats:
    """Trains the warm-up and writes its checkpoints: trainable weights and second moments.

    Args:
        model: with the base weights; changed in place.
        plan: the warm-up's schedule.
        settings: of the warm-up.
        num_checkpoints: how many.
        folder: where the files go, see `checkpoint_path`.

    Raises:
        DataError: more checkpoints than steps.
        StageError: a loss or gradient is not finite.
    """
    from safetensors.torch import save_file

    stops = checkpoint_steps(plan.num_steps, num_checkpoints)
    losses: list[float] = []
    factors: list[float] = []
    tokens = labels = 0
    start = time.perf_counter()
    with Training(model, plan, settings) as training:
        for step in range(stops[-1]):
            stats = training.step(step)
            losses.append(stats.loss)
            factors.append(min(1.0, settings.max_grad_norm / max(stats.grad_norm, 1e-30)))
            tokens += stats.num_tokens
            labels += stats.num_labels
            if step + 1 in stops:
                # The formula needs weights and second moments, but not the first moments.
                state = {
                    name: value.contiguous()
                    for name, value in training.state().items()
                    if not name.startswith("exp_avg.")
                }
                state["steps_made"] = torch.tensor(step + 1)
                state["clip"] = torch.tensor(float(np.mean(factors)), dtype=torch.float64)
                save_file(state, checkpoint_path(folder, stops.index(step + 1)))
                factors.clear()
    tenth = max(1, len(losses) // 10)
    return TuneStats(
        trained_tokens=tokens,
        trained_labels=labels,
        seconds=time.perf_counter() - start,
        first_loss=float(np.mean(losses[:tenth])),
        last_loss=float(np.mean(losses[-tenth:])),
    )


def differentiate(
    model: PreTrainedModel,
    plan: TrainPlan,
    task: GradientTask,
    heldout: pa.Table,
    settings: TrainSettings,
    checkpoint: Path,
) -> Derivatives:
    """Computes the derivatives of all held-out losses in all dose directions at one checkpoint.

    Args:
        model: with the base weights; changed in place.
        plan: the schedule of the replication, which contains the dose rows.
        task: which rows and which checkpoint.
        heldout: TOKENS of the held-out rows.
        settings: of the schedule.
        checkpoint: file that `warm_up` wrote for this part.

    Raises:
        ModelError: the checkpoint is not of this model, or the gradient of a dose is not finite.
    """
    start = time.perf_counter()
    with Training(model, plan, settings) as training:
        scale_P = _load_steps(training, settings, checkpoint)
        model.eval()  # dropout would add noise to the derivatives
        scale_P *= mean_rate(plan, settings) / task.num_parts / float(plan.denominators.mean())
        project = Projection(scale_P.numel(), task.dimension, task.seed, scale_P.device)
        directions_DK = torch.stack(
            [project(_dose_gradient(training, rows).mul_(scale_P)) for rows in task.doses]
        )
        bad = (~torch.isfinite(directions_DK).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            names = plan.ids(task.doses[bad[0]][:4])
            raise ModelError(
                f"influence: the gradients of {len(bad)} of {len(task.doses)} doses are not "
                f"finite, first of the one that starts with rows {names}; remove such rows, or "
                "lower influence.learning_rate"
            )
        nll_H, decrease_HD = _heldout(training, heldout, project, directions_DK)
    dose_tokens = sum(int(plan.lengths(rows).sum()) for rows in task.doses)
    heldout_tokens = sum(len(row) for row in heldout.column("input_ids").to_pylist())
    return Derivatives(
        nll_H=nll_H,
        decrease_HD=decrease_HD,
        num_tokens=dose_tokens + heldout_tokens,
        seconds=time.perf_counter() - start,
    )


def _load_steps(training: Training, settings: TrainSettings, checkpoint: Path) -> Tensor:
    """Loads the weights of a checkpoint; returns [P] clip / (sqrt(v) + epsilon)."""
    from safetensors.torch import load_file

    loaded = load_file(checkpoint, device=str(training.device))
    own = training.state()
    expected_names = {name for name in own if not name.startswith("exp_avg.")}
    loaded_names = set(loaded) - {"steps_made", "clip"}
    if expected_names != loaded_names:
        raise ModelError(
            f"{checkpoint}: expected weights and moments of this model, found others (first "
            f"{sorted(expected_names ^ loaded_names)[0]}). Run the stage again with --redo "
            "influence."
        )
    correction = 1.0 - settings.beta2 ** float(loaded["steps_made"])
    scales = []
    with torch.no_grad():
        for name in _trained_names(training):
            own[f"weight.{name}"].copy_(loaded[f"weight.{name}"])
            root = (loaded[f"exp_avg_sq.{name}"] / correction).sqrt_()
            scales.append(root.add_(settings.epsilon).reciprocal_().flatten())
    return torch.cat(scales) * float(loaded["clip"])


def _trained_names(training: Training) -> list[str]:
    return [name for name, value in training.model.named_parameters() if value.requires_grad]


def _gradient(training: Training) -> Tensor:
    """[P] a copy of the accumulated gradient."""
    trained = [value for value in training.model.parameters() if value.requires_grad]
    return torch.cat([value.grad.flatten() for value in trained])  # pyright: ignore


def _dose_gradient(training: Training, rows: np.ndarray) -> Tensor:
    """[P] mean over plan rows of the gradient of the row's summed token losses."""
    training.parallel.zero_gradient()
    groups = group_by_tokens(
        training.plan.lengths(rows),
        training.settings.micro_batch_tokens,
        is_padded=not training.objective.layout.is_flat,
    )
    for group in groups:
        total, _ = training.objective(training.microbatch(training.plan, rows[group]))
        (total / len(rows)).backward()
    return _gradient(training)


def _heldout(
    training: Training, heldout: pa.Table, project: Projection, directions_DK: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """[H] summed token losses, and [H, D] inner products of the gradient of each row's mean loss.

    Held-out errors need one value per row, so each row has a backward pass of its own.
    """
    longest = max(len(row) for row in heldout.column("input_ids").to_pylist())
    plan = build_plan(
        heldout, ["heldout"] * heldout.num_rows, batch_size=1, max_length=longest, packing=False
    )
    count = plan.table.num_rows
    nll_H = np.full(count, np.nan)
    decrease_HD = np.full((count, directions_DK.shape[0]), np.nan)
    group_size = max(1, min(32, _ROWS_IN_MEMORY // project.dimension))
    for first in range(0, count, group_size):
        rows = range(first, min(first + group_size, count))
        gradients = []
        for row in rows:
            training.parallel.zero_gradient()
            total, nll_M = training.objective(training.microbatch(plan, np.array([row])))
            (total / nll_M.numel()).backward()
            nll_H[row] = float(nll_M.double().sum())
            gradients.append(project(_gradient(training)))
        product_HD = torch.stack(gradients) @ directions_DK.T
        decrease_HD[rows.start : rows.stop] = product_HD.double().cpu().numpy()
    return nll_H, decrease_HD
