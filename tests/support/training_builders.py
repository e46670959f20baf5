"""Small real parts for the tests of chat, plan and training: tokenizers, models, tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from system import schema
from system.training.plan import TrainPlan, build_plan
from system.training.settings import TrainSettings

TEXT = [
    "Which city is the capital of France? Paris is the capital. Of Italy? Rome is.",
    "user assistant system tool Write a poem about the sea, please.\n\nThe sea is wide.",
    "def add(a, b):\n    return a + b\n\n2 + 2 = 4, so the answer is 4.",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN_THOUGHT = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}<|start|>{{ m['content'] }}"
    "{% else %}<|end|>{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|><think>\n{% endif %}"
)
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = REASONING.replace("{% if m.reasoning", "{% if loop.last and m.reasoning").replace(
    "reasoning_content", "thinking"
)
BACKWARDS = "{% for m in messages | reverse %}{{ m['content'] }}</s>{% endfor %}"
SILENT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def build_tokenizer(template: str | None, *, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few sentences: byte-level BPE, or SentencePiece-like."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
        alphabet = sorted(set("".join(TEXT)) | set("<|>/_\n▁"))
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", *SPECIAL], initial_alphabet=alphabet
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    tokenizer.train_from_iterator(TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.add_special_tokens(
        {"additional_special_tokens": [s for s in SPECIAL if s not in ("<s>", "</s>")]}
    )
    wrapped.chat_template = template
    return wrapped


def build_model(
    *,
    vocab_size: int = 200,
    seed: int = 0,
    hidden_size: int = 32,
    tied: bool = True,
    spread: float = 0.2,
) -> LlamaForCausalLM:
    """A tiny Llama with random weights; more key-value sharing than a toy needs, on purpose.

    `spread` is the standard deviation of the weights: large by default, so that every part of the
    network shows in the loss.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config).eval()


def build_tokens(num_rows: int = 48, *, seed: int = 0, longest: int = 60) -> pa.Table:
    """Random rows of three categories; the second half of each is its response."""
    generator = np.random.default_rng(seed)
    rows = [
        generator.integers(0, 200, size=generator.integers(8, longest)).tolist()
        for _ in range(num_rows)
    ]
    return pa.table(
        {
            "id": [f"row-{k:03d}" for k in range(num_rows)],
            "category": [("code", "math", "poem")[k % 3] for k in range(num_rows)],
            "input_ids": rows,
            "response_mask": [[k >= len(row) // 2 for k in range(len(row))] for row in rows],
        }
    ).cast(schema.TOKENS)


def build_small_plan(
    tokens: pa.Table | None = None, *, batch_size: int = 16, packing: bool = True
) -> TrainPlan:
    """Three steps over two stages."""
    tokens = build_tokens() if tokens is None else tokens
    half = tokens.num_rows // 2
    stages = ["first"] * half + ["second"] * (tokens.num_rows - half)
    return build_plan(tokens, stages, batch_size=batch_size, max_length=128, packing=packing)


def build_settings(**changes: object) -> TrainSettings:
    """Settings that move a tiny model visibly in three steps.

    The large epsilon keeps Adam from blowing the rounding of near-zero gradients up to whole steps.
    """
    values: dict = {
        "learning_rate": 1e-2,
        "lr_schedule": "cosine",
        "warmup_share": 0.1,
        "weight_decay": 0.01,
        "epsilon": 1e-4,
        "micro_batch_tokens": 200,
        **changes,
    }
    return TrainSettings(**values)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of any weight."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)
