"""The sections of the configuration about the model: base model, tiny model, adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from system.config.data import Positive, Section


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021); the language-model head is never adapted."""

    rank: Positive = 16
    """Inner dimension of an adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear layers that get adapters."""


class TinyModelConfig(Section):
    """The Llama that `model.path: builtin:tiny` builds and warms up on the corpus."""

    vocab_size: Positive = 4096
    """Largest vocabulary of the tokenizer, which is trained on the corpus."""
    hidden_size: Positive = 128
    """Width; a multiple of 32 x num_heads."""
    num_layers: Positive = 4
    """Decoder layers."""
    num_heads: Positive = 4
    """Attention heads of a layer."""
    warmup_tokens: int = Field(default=1_000_000, ge=0)
    """Tokens of plain language modelling on train rows before the run proper."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak of this warm-up."""
    batch_tokens: Positive = 4096
    """Tokens of one of its optimiser steps, about."""

    @model_validator(mode="after")
    def _heads_fit_the_engine(self) -> TinyModelConfig:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 32 x num_heads "
                f"{self.num_heads}: vLLM's CPU attention knows no other head sizes"
            )
        return self


class ModelConfig(Section):
    """The base model."""

    path: str
    """A Hugging Face id, a local directory, a `.gguf` file, or `builtin:tiny`."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights for scoring, and of the forward pass for training."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you read it."""
    chat_template: str | None = None
    """Local file with a Jinja chat template; null: the tokenizer's own, else ChatML. Another text
    in it makes the stage run again."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens per sequence, prompt and response together; longer ones are truncated at the end."""
    tiny: TinyModelConfig = TinyModelConfig()
