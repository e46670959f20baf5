"""The training loop of one rank: a frozen plan in, trained weights out.  No Ray here.

The loss of step s is

    sum over the response tokens of its active rows of -log p(token) / denominators[s]

where the denominator counts the response tokens of the step's *whole* batch.  It never depends on
`active`, on the rank or on the micro-batches, and gradients are *summed* over micro-batches and
ranks.  So masking rows leaves the gradient of every other row untouched, and the training is the
same at any world size and any accumulation, up to the order of floating-point sums.
(Averaging means over ranks or micro-batches weights tokens unequally.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from system.errors import ModelError, StageError
from system.lora import add_adapters, merge_adapters
from system.microbatch import MicroBatch, build_microbatch
from system.objective import Objective, training_layout
from system.optim import build_optimizer, learning_rate, set_learning_rate
from system.pack import group_by_tokens
from system.plan import TrainPlan
from system.train_settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["StepStats", "TrainResult", "TrainSettings", "Training", "train_on_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one optimiser step did, summed over all ranks."""

    step: int
    """0-based."""
    stage: str
    loss: float
    """Mean nats per response token of the active rows; 0 where none is active."""
    num_labels: int
    """Response tokens of the active rows."""
    num_tokens: int
    """Tokens of the active rows, prompts included, padding never."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    category_nll: dict[str, tuple[float, int]]
    """Per category: summed nats and response tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training did.  S = steps made, from `start_step` on."""

    losses: np.ndarray
    """[S] float64, mean nats per response token of the active rows."""
    num_labels: int
    """Response tokens trained on."""
    num_tokens: int
    """Tokens trained on, prompts included."""
    seconds: float


def train_on_plan(
    model: PreTrainedModel,
    plan: TrainPlan,
    settings: TrainSettings,
    *,
    active: np.ndarray | None = None,
    group: dist.ProcessGroup | None = None,
    start_step: int = 0,
    on_step: Callable[[StepStats], None] | None = None,
) -> TrainResult:
    """Trains the model in place, with adapters merged where `settings.lora` is given.

    Args:
        model: float32 weights, on the device to train on; equal on all ranks.
        plan: the schedule.
        settings: optimiser, schedule, precision.
        active: [plan rows] bool; false rows are left out, the steps stay.
        group: process group over which gradients are summed; none trains in this process alone.
        start_step: first step to make; the optimiser starts fresh there.
        on_step: told about each step.

    Raises:
        StageError: a loss or gradient is not finite; names the step and its rows.
        ModelError: adapters fit no layer, or the model's weights are damaged.
    """
    losses, labels, tokens = [], 0, 0
    start = time.perf_counter()
    with Training(model, plan, settings, active=active, group=group) as training:
        for step in range(start_step, plan.num_steps):
            stats = training.step(step)
            losses.append(stats.loss)
            labels += stats.num_labels
            tokens += stats.num_tokens
            if on_step is not None:
                on_step(stats)
    return TrainResult(
        losses=np.array(losses, dtype=np.float64),
        num_labels=labels,
        num_tokens=tokens,
        seconds=time.perf_counter() - start,
    )


class Training:
    """A training under way: `step` by step, with a state that can be saved between steps.

    Use as a context: leaving it merges adapters and gives the model back in evaluation mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: TrainPlan,
        settings: TrainSettings,
        *,
        active: np.ndarray | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.active = np.ones(plan.table.num_rows, dtype=bool) if active is None else active
        assert self.active.shape == (plan.table.num_rows,), "one flag per plan row"
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.model = model
        if model.dtype != torch.float32:
            raise ModelError(
                f"training needs float32 weights (the forward pass may be lower), found "
                f"{model.dtype}: load the model with dtype float32"
            )
        self.device = model.get_input_embeddings().weight.device
        half = settings.dtype == "bfloat16" and self.device.type == "cuda"
        self.compute_dtype = torch.bfloat16 if half else torch.float32
        self.objective = Objective(model, self.compute_dtype)
        encoded = plan.table.column("category").combine_chunks().dictionary_encode()
        self.categories: list[str] = encoded.dictionary.to_pylist()
        self._category_of_row = encoded.indices.to_numpy()
        self._stack = ExitStack()

    def __enter__(self) -> Training:
        """Puts the model into training form."""
        settings = self.settings
        with ExitStack() as stack:
            stack.callback(self.model.eval)
            stack.enter_context(_deterministic())
            stack.enter_context(training_layout(self.objective))
            if settings.activation_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
                stack.callback(self.model.gradient_checkpointing_disable)
            if settings.lora is not None:
                adapted = add_adapters(self.model, settings.lora, settings.seed)
                stack.callback(merge_adapters, adapted)
            self.model.train()
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.gradient = _flat_gradient(self.parameters)
            self.optimizer = build_optimizer(self.model.named_parameters(), settings)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Merges adapters and frees gradients and optimiser state."""
        for parameter in self.parameters:
            parameter.grad = None
        del self.gradient, self.optimizer
        self._stack.close()

    def microbatches(self, step: int) -> Iterator[MicroBatch]:
        """Forward passes of this rank in a step."""
        rows = self.plan.rows(step, self.rank, self.world_size)
        rows = rows[self.active[rows]]
        is_flat = self.objective.layout.is_flat
        groups = group_by_tokens(
            self.plan.lengths(rows), self.settings.micro_batch_tokens, is_padded=not is_flat
        )
        for group in groups:
            yield build_microbatch(
                self.plan,
                rows[group],
                is_flat=is_flat,
                device=self.device,
                compute_dtype=self.compute_dtype,
            )

    def step(self, step: int) -> StepStats:
        """Makes one optimiser step.

        Raises:
            StageError: the loss or the gradient is not finite.
        """
        start = time.perf_counter()
        torch.manual_seed(_step_seed(self.settings.seed, step, self.rank))  # dropout
        totals = self._accumulate(step)
        rate = learning_rate(step, self.plan.num_steps, self.settings)
        norm = self._clip()
        nll_C, labels_C, num_tokens = self._totals(totals)
        if not (np.isfinite(norm) and np.isfinite(nll_C).all()):
            raise StageError(self._not_finite(step, norm))
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        num_labels = int(labels_C.sum())
        return StepStats(
            step=step,
            stage=self.plan.stage(step),
            loss=float(nll_C.sum()) / num_labels if num_labels else 0.0,
            num_labels=num_labels,
            num_tokens=num_tokens,
            learning_rate=rate,
            grad_norm=norm,
            seconds=time.perf_counter() - start,
            category_nll={
                name: (float(nll), int(count))
                for name, nll, count in zip(self.categories, nll_C, labels_C, strict=True)
                if count
            },
        )

    def _accumulate(self, step: int) -> torch.Tensor:
        """Gradient of this rank's share, then of all ranks; [2 C + 1] float64 totals."""
        self.gradient.zero_()
        scale = 1.0 / float(self.plan.denominators[step])
        num_categories = len(self.categories)
        totals = np.zeros(2 * num_categories + 1)
        for batch in self.microbatches(step):
            total, nll_M = self.objective(batch)
            (total * scale).backward()
            category_M = self._category_of_row[batch.label_rows]
            totals[:num_categories] += np.bincount(
                category_M, nll_M.double().cpu().numpy(), num_categories
            )
            totals[num_categories:-1] += np.bincount(category_M, minlength=num_categories)
            totals[-1] += int(self.plan.lengths(batch.rows).sum())
        summed = torch.from_numpy(totals)
        if self.group is not None:
            dist.all_reduce(self.gradient, group=self.group)
            summed = summed.to(self.device)
            dist.all_reduce(summed, group=self.group)
        return summed

    def _clip(self) -> float:
        norm = float(torch.linalg.vector_norm(self.gradient))
        if norm > self.settings.max_grad_norm:
            self.gradient.mul_(self.settings.max_grad_norm / (norm + 1e-6))
        return norm

    def _totals(self, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
        values = totals.cpu().numpy()
        num_categories = len(self.categories)
        return values[:num_categories], values[num_categories:-1], int(values[-1])

    def _not_finite(self, step: int, norm: float) -> str:
        """Looks for the rows behind it, now that speed no longer matters."""
        bad: list[str] = []
        rows = self.plan.rows(step, self.rank, self.world_size)
        rows = rows[self.active[rows]]
        with torch.no_grad():
            for row in rows:
                batch = build_microbatch(
                    self.plan,
                    np.array([row]),
                    is_flat=self.objective.layout.is_flat,
                    device=self.device,
                    compute_dtype=self.compute_dtype,
                )
                if not bool(torch.isfinite(self.objective(batch)[1]).all()):
                    bad += self.plan.ids(np.array([row]))
        shown = self.plan.ids(rows)[:8]
        found = (
            f"rows whose loss is not finite: {bad[:8]}"
            if bad
            else f"each row's loss alone is finite; rows of this rank: {shown}"
        )
        return (
            f"training step {step} of {self.plan.num_steps} (stage {self.plan.stage(step)!r}) gave "
            f"a loss or gradient that is not finite (gradient norm {norm}); {found}. Lower "
            "train.learning_rate, raise train.warmup_share, or remove those rows; the weights "
            "before this step are in the newest checkpoint."
        )


def _flat_gradient(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One buffer for all gradients, of which the parameters' gradients are views.

    It is zeroed, summed over ranks, measured and clipped in one operation each.
    """
    device, dtype = parameters[0].device, torch.float32
    flat = torch.zeros(sum(p.numel() for p in parameters), device=device, dtype=dtype)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what is random within a step, so that a resumed step repeats itself."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give equal bits for equal work, wherever torch has them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
