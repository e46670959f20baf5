"""The training loop of one rank: trains a model on a frozen plan.

`job.run_job` uses it for the final training and the evaluation arms, and the influence stage for
its intervention runs.  The loss of step s is

    sum over the response tokens of its active rows of -log p(token) / denominators[s]

The denominator counts the response tokens of the *whole* batch of the step.  It does not depend on
`active`, on the rank, or on the micro-batches, and gradients are *summed* over micro-batches and
ranks.  So masking rows does not change the gradient of any other row, and the training is the same
at any world size and any accumulation, up to the order of floating-point sums.  (The mean over
ranks or micro-batches of their mean losses would weight tokens unequally.)
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
    """Numbers of one optimiser step, summed over all ranks."""

    step: int
    """0-based."""
    stage: str
    loss: float
    """Mean nats per response token of the active rows; 0 if no row is active."""
    num_labels: int
    """Response tokens of the active rows."""
    num_tokens: int
    """Tokens of the active rows, with prompts and without padding."""
    learning_rate: float
    grad_norm: float
    """Norm of the gradient before clipping."""
    seconds: float
    category_nll: dict[str, tuple[float, int]]
    """Per category: summed nats and response tokens."""
    layout: str
    """The layout of the passes, and why a faster one cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Numbers of a whole training.  S = number of steps, from `start_step` on."""

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
    """Trains the model in place; with `settings.lora`, the adapters are merged at the end.

    Args:
        model: float32 weights, on the device to train on; equal on all ranks.
        plan: the schedule.
        settings: optimiser, schedule, precision.
        active: [plan rows] bool; rows that are False are masked, the steps stay the same.
        group: process group over which gradients are summed; None: a single process.
        start_step: first step; the optimiser has no state before it.
        on_step: called after each step.

    Raises:
        StageError: a loss or gradient is not finite; names the step and its rows.
        ModelError: no layer fits the adapters, or the weights of the model are damaged.
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
    """A training that is controlled step by step; its state can be saved between steps.

    Use it as a context manager: on exit, adapters are merged and the model is in evaluation mode.
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
                f"training needs float32 weights (the forward pass may use a lower precision), "
                f"found {model.dtype}: load the model with dtype float32"
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
        """Prepares the model for training; the order of the steps matters."""
        settings = self.settings
        with ExitStack() as stack:
            stack.callback(self.model.eval)
            stack.enter_context(_deterministic())
            # Layout and kernels are probed on the plain model: no adapters, compilation, or shards.
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
            # Exit runs in reverse order: gradients are freed before adapters are merged.
            stack.callback(self.parallel.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Frees gradients and optimiser state, then merges adapters."""
        self._stack.close()

    def state(self) -> dict[str, torch.Tensor]:
        """Trainable weights and optimiser moments by name (the tensors themselves, no copies)."""
        optimizer = self.parallel.optimizer
        state = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state[f"weight.{name}"] = parameter.detach()
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        return state

    def set_steps_made(self, steps: int) -> None:
        """Sets the step counter of the optimiser, after its moments were loaded."""
        for state in self.parallel.optimizer.state.values():
            state["step"].fill_(steps)

    def passes(
        self, plan: TrainPlan, step: int, active: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """The rows of each forward pass of this rank in one step, and whether they count.

        With sharding, all ranks must make the same number of passes, so a rank with fewer passes
        repeats rows that do not count.  Each rank computes the passes of the others from the plan,
        without communication.

        Args:
            plan: the plan of this training, or another one.
            step: of the plan.
            active: [plan rows] bool, rows to use; default: all.
        """
        is_padded = not self.objective.layout.is_flat
        # A row that is longer than a pass gets its own pass.
        max_tokens = self.settings.micro_batch_tokens if self.settings.packing else 1
        ranks = range(self.world_size) if self.parallel.needs_equal_passes else [self.rank]
        passes: dict[int, list[np.ndarray]] = {}
        for rank in ranks:
            rows = plan.rows(step, rank, self.world_size)
            if active is not None:
                rows = rows[active[rows]]
            groups = group_by_tokens(plan.lengths(rows), max_tokens, is_padded=is_padded)
            passes[rank] = [rows[group] for group in groups]
        for rows in passes[self.rank]:
            yield rows, True
        longest = max(passes.values(), key=len)
        for rows in longest[len(passes[self.rank]) :]:
            yield rows, False

    def microbatch(self, plan: TrainPlan, rows: np.ndarray) -> MicroBatch:
        """The tensors of one forward pass over rows of a plan."""
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
        torch.manual_seed(_step_seed(self.settings.seed, step, self.rank))  # for dropout
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
        """Computes the gradient over all ranks.

        Returns:
            [2 C + 1] float64: summed nats by category, labels by category, number of tokens.
        """
        self.parallel.zero_gradient()
        scale = 1.0 / float(self.plan.denominators[step])
        losses: list[torch.Tensor] = []
        owners: list[np.ndarray] = []
        num_tokens = 0
        for rows, counts in self.passes(self.plan, step, self.active):
            batch = self.microbatch(self.plan, rows)
            total, nll_M = self.objective(batch)
            # A repeated pass takes part in the communication of shards, but adds nothing.
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
        """[2 C + 1], as in `_accumulate`, of this rank.

        The losses of all passes are copied to the CPU at once: a copy waits for the GPU, so one
        copy per pass would slow down the training.
        """
        num_categories = len(self.categories)
        totals = np.zeros(2 * num_categories + 1)
        totals[-1] = num_tokens
        if losses:
            per_pass = torch.cat(losses).double().cpu().split([len(nll_M) for nll_M in losses])
            for category_M, nll_M in zip(owners, per_pass, strict=True):
                totals[:num_categories] += np.bincount(category_M, nll_M.numpy(), num_categories)
                totals[num_categories:-1] += np.bincount(category_M, minlength=num_categories)
        return totals

    def _totals(self, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
        values = totals.cpu().numpy()
        num_categories = len(self.categories)
        return values[:num_categories], values[num_categories:-1], int(values[-1])

    def _not_finite(self, step: int, norm: float) -> str:
        """The error message; it names the rows whose loss alone is not finite."""
        start, stop = self.plan.step_starts[step : step + 2]
        rows = np.arange(start, stop)
        rows = rows[self.active[rows]]
        with torch.no_grad():
            bad = [
                self.plan.ids(np.array([row]))[0]
                for row in rows  # all rows on every rank, because sharded passes need all ranks
                if not bool(
                    torch.isfinite(self.objective(self.microbatch(self.plan, row[None]))[1]).all()
                )
            ]
        cause = (
            f"rows whose loss is not finite: {bad[:8]}"
            if bad
            else f"each row alone has a finite loss; the first rows are {self.plan.ids(rows[:4])}"
        )
        return (
            f"training step {step} of {self.plan.num_steps} (stage {self.plan.stage(step)!r}) gave "
            f"a loss or gradient that is not finite (gradient norm {norm}); {cause}. Lower "
            "train.learning_rate, raise train.warmup_share, or remove those rows; the weights "
            "before this step are in the newest checkpoint."
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout of a step, so that a resumed step draws the same numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Within the block torch uses deterministic kernels, wherever it has them.

    In this mode torch also fills uninitialised memory, which costs time.  This is switched off,
    because the training never reads memory that was not written.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = deterministic  # type checkers do not know the attribute of this module
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills
