"""Tiny models and rows for tests that run a real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from system import schema
from system.models.base import CHATML
from system.scoring.llm import EngineSettings

VOCABULARY = 384
CONTEXT = 160
SETTINGS = EngineSettings(max_length=CONTEXT, memory_gib=0.1)


def build_model(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is two plus three", "name the capital"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=marks[0])
    fast.chat_template = CHATML
    fast.save_pretrained(path)
    return str(path)


def token_table(num_rows: int, seed: int = 0, longest: int = CONTEXT) -> pa.Table:
    """Rows of all lengths up to the whole context, some with several response spans."""
    rng = np.random.default_rng(seed)
    rows, masks = [], []
    for row in range(num_rows):
        length = longest if row == 0 else int(rng.integers(4, longest + 1))
        mask = rng.random(length) < 0.5
        mask[: int(rng.integers(1, length))] = False
        mask[-1] = True
        rows.append(rng.integers(0, VOCABULARY, length).tolist())
        masks.append(mask.tolist())
    return pa.table(
        {
            "id": [f"row{row:04d}" for row in range(num_rows)],
            "category": ["a" if row % 2 else "b" for row in range(num_rows)],
            "input_ids": rows,
            "response_mask": masks,
        },
        schema=schema.TOKENS,
    )


def per_token(table: pa.Table) -> np.ndarray:
    return np.array(table["nll"]) / np.array(table["num_tokens"])
