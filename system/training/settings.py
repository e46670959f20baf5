"""Settings of a training: one record for intervention runs, evaluation arms, and the final run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from system.config import InfluenceConfig, LoraConfig, ModelConfig, TrainConfig

LAYOUT = ("micro_batch_tokens", "packing", "parallel", "activation_checkpointing")
"""Settings that change only the order of sums, not what is summed.  A training can resume with
other values, for example after it ran out of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """All settings of the training loop, except model and plan."""

    learning_rate: float
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "warmup-stable-decay"]
    warmup_share: float
    decay_share: float = 0.2
    min_lr_share: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 4096
    """Largest number of tokens in one forward pass of one rank."""
    packing: bool = True
    """Whether rows share forward passes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass on a GPU; weights and optimiser are float32, and so is
    everything on a CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    kernels: Literal["auto", "torch", "liger"] = "torch"
    compile: bool = False
    """Whether decoder layers are compiled with torch.compile."""
    lora: LoraConfig | None = None
    seed: int = 0
    """For adapter initialisation and dropout; the order of rows comes from the plan."""

    @classmethod
    def from_train(cls, train: TrainConfig, model: ModelConfig, seed: int) -> TrainSettings:
        """Settings of the final run and of evaluation arms."""
        return cls(
            learning_rate=train.learning_rate,
            lr_schedule=train.lr_schedule,
            warmup_share=train.warmup_share,
            decay_share=train.decay_share,
            min_lr_share=train.min_lr_share,
            weight_decay=train.weight_decay,
            beta2=train.beta2,
            max_grad_norm=train.max_grad_norm,
            micro_batch_tokens=train.micro_batch_tokens,
            packing=train.packing,
            dtype=model.dtype,
            parallel=train.parallel,
            activation_checkpointing=train.activation_checkpointing,
            kernels=train.kernels,
            compile=train.compile,
            lora=train.lora,
            seed=seed,
        )

    @classmethod
    def from_influence(
        cls, influence: InfluenceConfig, model: ModelConfig, seed: int
    ) -> TrainSettings:
        """Settings of an intervention run: linear decay to zero, a single process."""
        return cls(
            learning_rate=influence.learning_rate,
            lr_schedule="linear",
            warmup_share=influence.warmup_share,
            dtype=model.dtype,
            lora=influence.lora,
            seed=seed,
        )

    def sha256(self) -> str:
        """Hash of the settings that decide the trained weights, up to the order of sums."""
        values = {name: value for name, value in asdict(self).items() if name not in LAYOUT}
        values["lora"] = None if self.lora is None else self.lora.model_dump(mode="json")
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
