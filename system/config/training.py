"""The sections of the configuration about training and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from system.config.data import Positive, Section, Share
from system.config.model import LoraConfig


class TrainConfig(Section):
    """Stage `train`: curriculum SFT under Ray Train. Details: `docs/training.md`."""

    num_workers: Positive | tuple[Positive, Positive] = 2
    """Workers, or [fewest, most] for an elastic group."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak."""
    lr_schedule: Literal["cosine", "linear", "warmup-stable-decay"] = "cosine"
    """One schedule through all stages."""
    warmup_share: Share = 0.03
    """Share of the steps with rising learning rate."""
    decay_share: Share = 0.2
    """Share of the steps in which warmup-stable-decay decays."""
    min_lr_share: Share = 0.0
    """Last learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's; norms and biases do not decay."""
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """AdamW's decay rate of the mean squared gradient; beta1 is 0.9."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of one step with a larger norm are scaled down to it."""
    batch_size: Positive = 16
    """Examples per optimiser step, over all workers."""
    micro_batch_tokens: Positive = 4096
    """Padded tokens of one forward pass of one worker; memory follows this number."""
    packing: bool = True
    """Rows share forward passes, with block-diagonal attention (equal to unpacked training).
    false: every row has a pass of its own, which is slower: to compare with."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds everything; `fsdp`: parameters, gradients and optimiser state are
    sharded over the workers (FSDP2)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more
    time."""
    kernels: Literal["auto", "torch", "liger"] = "torch"
    """`liger` needs a GPU and the package liger-kernel; `auto` takes it where both are there."""
    compile: bool = False
    """Decoder layers through torch.compile; on a CPU it needs a C++ compiler."""
    lora: LoraConfig | None = None
    """Train adapters (the exported model has them merged) instead of all weights."""
    checkpoint_every: Positive = 50
    """Optimiser steps between checkpoints: what a failure repeats at most."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that stay."""
    keep_best: bool = False
    """Measure the loss on held-out rows (`estimate` split) at every checkpoint and at the end, and
    keep the best checkpoint besides the newest."""
    heldout_rows: Positive = 32
    """Rows of each category that this loss is measured on."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model; `best` needs keep_best."""
    max_failures: int = Field(default=3, ge=0)
    """Times the worker group, or its controller, is started again after a failure."""
    resize_seconds: float = Field(default=60.0, gt=0)
    """How often an elastic group looks for room for more workers; growing restarts it."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers besides train/metrics.jsonl."""

    @field_validator("num_workers")
    @classmethod
    def _fewest_come_first(cls, num_workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(num_workers, int) and num_workers[0] > num_workers[1]:
            raise ValueError(
                f"expected [fewest, most], found {list(num_workers)}: swap the two numbers"
            )
        return num_workers

    @model_validator(mode="after")
    def _best_is_kept(self) -> TrainConfig:
        if self.export == "best" and not self.keep_best:
            raise ValueError("export: best needs keep_best: true")
        return self


Arm = Literal[
    "natural", "uniform", "random", "solved", "natural-curriculum", "natural-reversed",
    "solved-curriculum", "solved-reversed",
]  # fmt: skip


class EvaluateConfig(Section):
    """Stage `evaluate`: held-out loss and verifiable accuracy against honest baselines."""

    arms: tuple[Arm, ...] = ("natural", "solved", "solved-curriculum")
    """Trained at equal budget; names without `-curriculum` or `-reversed` are shuffled. `random`
    moves as much as `solved`, in a direction that no effect speaks for, another one every seed."""
    seeds: Positive = 3
    """Trainings per arm; every seed draws other examples and another order for all arms alike."""
    test_rows: Positive = 200
    """Rows of each category's test split that are scored."""
    accuracy_rows: int = Field(default=50, ge=0)
    """Verifiable rows of each category whose answers are generated and checked."""
    max_new_tokens: Positive = 128
    """Longest generated answer, in tokens; prompts have the rest of model.max_length, half at
    least."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of all intervals."""
