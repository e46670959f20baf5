"""Configuration sections for training and evaluation: `train` and `evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from system.config.data import Positive, Section, Share
from system.config.model import LoraConfig


class TrainConfig(Section):
    """Stage `train`: curriculum SFT under Ray Train. Details: `docs/training.md`."""

    num_workers: Positive | tuple[Positive, Positive] = 2
    """Number of training workers, or [fewest, most] for a group that grows when there is room
    (elastic)."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "warmup-stable-decay"] = "cosine"
    """Learning-rate schedule. One schedule covers all curriculum stages."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises."""
    decay_share: Share = 0.2
    """`warmup-stable-decay`: share of the steps, at the end, in which the learning rate falls."""
    min_lr_share: Share = 0.0
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW. Norms and biases have none."""
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """beta2 of AdamW: decay rate of the mean squared gradient. beta1 is 0.9."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping: a gradient with a larger norm is scaled down to this norm."""
    batch_size: Positive = 16
    """Examples per optimiser step, over all workers."""
    micro_batch_tokens: Positive = 4096
    """Tokens, padding included, of one forward pass of one worker. Memory grows with it."""
    packing: bool = True
    """Pack several rows into one sequence, with block-diagonal attention: no row sees another, and
    the result equals unpacked training. `false`: one row a sequence, which is slower; for
    comparison."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole model; `fsdp`: parameters, gradients and optimiser state
    are sharded over the workers (FSDP2)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more
    time."""
    kernels: Literal["auto", "torch", "liger"] = "torch"
    """Implementation of the model's layers. `liger` needs a GPU and the package liger-kernel;
    `auto` uses it when both are there."""
    compile: bool = False
    """Compile the decoder layers with torch.compile. On a CPU this needs a C++ compiler."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights. They are merged into the exported model."""
    checkpoint_every: Positive = 50
    """Optimiser steps between two checkpoints. After a failure, at most this many steps are
    repeated."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints that are kept, the newest ones."""
    keep_best: bool = False
    """Measure the loss on held-out rows (`estimate` split) at every checkpoint and at the end, and
    keep the best checkpoint besides the newest."""
    heldout_rows: Positive = 32
    """`keep_best`: number of rows of each category on which this loss is measured."""
    export: Literal["last", "best"] = "last"
    """Which checkpoint becomes the exported model. `best` needs `keep_best: true`."""
    max_failures: int = Field(default=3, ge=0)
    """Largest number of times that a failed worker group, or its controller, is started again."""
    resize_seconds: float = Field(default=60.0, gt=0)
    """Seconds between two checks whether an elastic group can grow. Growing restarts the group."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that get the metrics besides `train/metrics.jsonl`."""

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
            raise ValueError("export: best needs keep_best: true; set it, or use export: last")
        return self


Arm = Literal[
    "natural", "uniform", "random", "solved", "natural-curriculum", "natural-reversed",
    "solved-curriculum", "solved-reversed",
]  # fmt: skip


class EvaluateConfig(Section):
    """Stage `evaluate`: held-out loss and accuracy of the solved mix against baselines."""

    arms: tuple[Arm, ...] = ("natural", "solved", "solved-curriculum")
    """Arms (mix and order) that are trained with equal budget and compared. Arms without
    `-curriculum` or `-reversed` are trained in shuffled order. `random` moves as many examples as
    `solved`, but in a random direction that ignores the effects and differs from seed to seed."""
    seeds: Positive = 3
    """Number of trainings of every arm. Each seed draws other examples and another order, the same
    ones for all arms."""
    test_rows: Positive = 200
    """Number of rows of each category's `test` split that are scored."""
    accuracy_rows: int = Field(default=50, ge=0)
    """Number of rows of each category whose answers are generated and checked; they must have a
    final answer."""
    max_new_tokens: Positive = 128
    """Largest number of generated tokens of an answer. Prompts get the rest of
    `model.max_length`, at least half of it."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Confidence level of all intervals."""
