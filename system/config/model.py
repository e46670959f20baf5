"""Configuration sections for the model: `model`, `model.tiny`, and `lora` of two stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from system.config.data import Positive, Section


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021); the language-model head is never adapted."""

    rank: Positive = 16
    """Rank (inner dimension) of an adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that is set to zero at random during training."""
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear layers that get adapters."""


class TinyModelConfig(Section):
    """The small Llama that `model.path: builtin:tiny` creates and pretrains on the corpus."""

    vocab_size: Positive = 4096
    """Largest vocabulary size of the tokenizer, which is trained on the corpus."""
    hidden_size: Positive = 128
    """Hidden size; a multiple of 32 x num_heads."""
    num_layers: Positive = 4
    """Number of decoder layers."""
    num_heads: Positive = 4
    """Number of attention heads of a layer."""
    warmup_tokens: int = Field(default=1_000_000, ge=0)
    """Number of tokens of the pretraining (plain language modelling on train rows)."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of the pretraining."""
    batch_tokens: Positive = 4096
    """Approximate number of tokens of one optimiser step of the pretraining."""

    @model_validator(mode="after")
    def _heads_fit_the_engine(self) -> TinyModelConfig:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 32 x num_heads "
                f"{self.num_heads}: vLLM's CPU attention supports no other head sizes"
            )
        return self


class ModelConfig(Section):
    """The base model."""

    path: str
    """A Hugging Face id, a local directory, a `.gguf` file, or `builtin:tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Null: the newest of its main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in scoring, and of the forward pass in training."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read that code before you set this."""
    chat_template: str | None = None
    """Local file with a Jinja chat template. Null: the template of the tokenizer, or ChatML when it
    has none. When the content of the file changes, the stage runs again."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Largest number of tokens in a sequence, prompt and response together. Longer sequences are
    truncated at the end."""
    tiny: TinyModelConfig = TinyModelConfig()
