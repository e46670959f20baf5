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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils import deterministic

from system.errors import ModelError, StageError
from system.training.kernels import compiled_layers, use_kernels
from system.training.layout import training_layout
from system.training.lora import add_adapters, merge_adapters
from system.training.microbatch import MicroBatch, build_microbatch
from system.training.objective import Objective
from system.training.optim import learning_rate, set_learning_rate
from system.training.pack import group_by_tokens
from system.training.parallel import make_parallel
from system.training.plan import TrainPlan
from system.training.settings import TrainSettings

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
    layout: str
    """How rows lie in a pass, and why not in a faster way."""


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
        self.device = next(model.parameters()).device
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
            stack.enter_context(training_layout(self.objective, self.group))
            self.kernels = use_kernels(self.objective, settings.kernels)
            if settings.activation_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
                stack.callback(self.model.gradient_checkpointing_disable)
            if settings.lora is not None:
                adapted = add_adapters(self.model, settings.lora, settings.seed)
                stack.callback(merge_adapters, adapted)
            self.model.train()
            if settings.compile:
                stack.enter_context(compiled_layers(self.model))
            self.parallel = make_parallel(self.objective, settings, self.group)
            stack.callback(self.parallel.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Frees gradients and optimiser state, then merges adapters."""
        self._stack.close()

    def state(self) -> dict[str, torch.Tensor]:
        """Trainable weights and optimiser moments by name: the tensors themselves, not copies."""
        optimizer = self.parallel.optimizer
        state = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state[f"weight.{name}"] = parameter.detach()
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        return state

    def set_steps_made(self, steps: int) -> None:
        """Tells the optimiser how many steps its moments stand for."""
        for state in self.parallel.optimizer.state.values():
            state["step"].fill_(steps)

    def passes(
        self, plan: TrainPlan, step: int, active: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Rows of each forward pass of this rank for a step of a plan, and whether they count.

        Where all ranks must make equally many passes, a rank with fewer repeats rows for nothing;
        what the others do follows from the plan, so nobody needs to ask.

        Args:
            plan: the training's own, or another.
            step: of the plan.
            active: [plan rows] bool, rows to take; all by default.
        """
        is_padded = not self.objective.layout.is_flat
        # A row that is longer than a pass gets one of its own.
        most = self.settings.micro_batch_tokens if self.settings.packing else 1
        ranks = range(self.world_size) if self.parallel.needs_equal_passes else [self.rank]
        passes: dict[int, list[np.ndarray]] = {}
        for rank in ranks:
            rows = plan.rows(step, rank, self.world_size)
            if active is not None:
                rows = rows[active[rows]]
            groups = group_by_tokens(plan.lengths(rows), most, is_padded=is_padded)
            passes[rank] = [rows[group] for group in groups]
        for rows in passes[self.rank]:
            yield rows, True
        longest = max(passes.values(), key=len)
        for rows in longest[len(passes[self.rank]) :]:
            yield rows, False

    def microbatch(self, plan: TrainPlan, rows: np.ndarray) -> MicroBatch:
        """Rows of a plan as one forward pass takes them."""
        return build_microbatch(
            plan,
            rows,
            layout=self.objective.layout,
            device=self.device,
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
        norm = self.parallel.clip_gradient(self.settings.max_grad_norm)
        nll_C, labels_C, num_tokens = self._totals(totals)
        if not (np.isfinite(norm) and np.isfinite(nll_C).all()):
            raise StageError(self._not_finite(step, norm))
        set_learning_rate(self.parallel.optimizer, rate)
        self.parallel.optimizer.step()
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
            layout=str(self.objective.layout),
        )

    def _accumulate(self, step: int) -> torch.Tensor:
        """Gradient over all ranks; [2 C + 1] float64: nats and labels by category, tokens."""
        self.parallel.zero_gradient()
        scale = 1.0 / float(self.plan.denominators[step])
        losses: list[torch.Tensor] = []
        owners: list[np.ndarray] = []
        num_tokens = 0
        for rows, counts in self.passes(self.plan, step, self.active):
            batch = self.microbatch(self.plan, rows)
            total, nll_M = self.objective(batch)
            (total * (scale if counts else 0.0)).backward()
            if counts:
                losses.append(nll_M)
                owners.append(self._category_of_row[batch.label_rows])
                num_tokens += int(self.plan.lengths(rows).sum())
        totals = self._by_category(losses, owners, num_tokens)
        self.parallel.sum_gradient()
        summed = torch.from_numpy(totals)
        if self.group is not None:
            summed = summed.to(self.device)
            dist.all_reduce(summed, group=self.group)
        return summed

    def _by_category(
        self, losses: list[torch.Tensor], owners: list[np.ndarray], num_tokens: int
    ) -> np.ndarray:
        """[2 C + 1]; the losses of all passes are read at once, so that no pass waits for one."""
        num_categories = len(self.categories)
        totals = np.zeros(2 * num_categories + 1)
        totals[-1] = num_tokens
        if losses:
            pieces = torch.cat(losses).double().cpu().split([len(nll_M) for nll_M in losses])
            for category_M, nll_M in zip(owners, pieces, strict=True):
                totals[:num_categories] += np.bincount(category_M, nll_M.numpy(), num_categories)
                totals[num_categories:-1] += np.bincount(category_M, minlength=num_categories)
        return totals

    def _totals(self, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
        values = totals.cpu().numpy()
        num_categories = len(self.categories)
        return values[:num_categories], values[num_categories:-1], int(values[-1])

    def _not_finite(self, step: int, norm: float) -> str:
        """Looks for the rows behind it, now that speed no longer matters."""
        start, stop = self.plan.step_starts[step : step + 2]
        rows = np.arange(start, stop)
        rows = rows[self.active[rows]]
        with torch.no_grad():
            bad = [
                self.plan.ids(np.array([row]))[0]
                for row in rows  # all rows on all ranks: sharded passes need everybody
                if not bool(
                    torch.isfinite(self.objective(self.microbatch(self.plan, row[None]))[1]).all()
                )
            ]
        found = (
            f"rows whose loss is not finite: {bad[:8]}"
            if bad
            else f"each row alone is finite; its rows start with {self.plan.ids(rows[:4])}"
        )
        return (
            f"training step {step} of {self.plan.num_steps} (stage {self.plan.stage(step)!r}) gave "
            f"a loss or gradient that is not finite (gradient norm {norm}); {found}. Lower "
            "train.learning_rate, raise train.warmup_share, or remove those rows; the weights "
            "before this step are in the newest checkpoint."
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what is random within a step, so that a resumed step repeats itself."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give equal bits for equal work, wherever torch has them.

    Nothing here reads memory that nobody wrote, so torch need not fill it beforehand.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = deterministic  # its one attribute is a property of the module
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills
