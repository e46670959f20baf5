"""The model and the rows of the training benchmarks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    # hidden, feed-forward, layers, heads, key-value heads, vocabulary
    "1m": (96, 288, 4, 2, 1, 4096),
    "4m": (192, 576, 6, 4, 2, 8192),
    "30m": (384, 1152, 8, 8, 4, 32768),
    "1b": (2048, 8192, 16, 32, 8, 128256),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every trainer trains on."""

    rows: list[dict[str, Any]]
    max_length: int
    batch_rows: int
    micro_batch_tokens: int
    """Of this project's forward passes; the others take a whole step in one."""


def build_rows(num_rows: int, vocab_size: int, max_length: int) -> list[dict[str, Any]]:
    """Rows with the length profile of instruction data: log-normal, median about 120 tokens.

    With sequences of 2048 tokens or more the median is 360.
    """
    generator = np.random.default_rng(0)
    median = 360 if max_length >= 2048 else 120
    lengths = generator.lognormal(np.log(median), 0.7, num_rows)
    lengths = np.clip(lengths, 16, max_length).astype(int)
    rows = []
    for number, length in enumerate(lengths):
        ids = generator.integers(5, vocab_size, size=length)
        prompt = int(length * generator.uniform(0.2, 0.7))
        rows.append({"id": f"row-{number}", "input_ids": ids.tolist(), "prompt": prompt})
    return rows


def build_model(folder: Path, size: str) -> None:
    """A Llama of one of `SIZES` (1b: as Llama 3.2 1B) with random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, inner, layers, heads, key_value_heads, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=1024 if size != "1b" else 8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{k}": k for k in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2")
    fast.save_pretrained(folder)


def labelled(row: dict[str, Any]) -> list[int]:
    """Labels with the prompt masked out."""
    return [-100] * row["prompt"] + row["input_ids"][row["prompt"] :]


def build_packed_plan(work: Workload) -> Any:
    """This project's plan for the rows."""
    import pyarrow as pa

    from system import schema
    from system.training.plan import build_plan

    rows = work.rows
    tokens = pa.table(
        {
            "id": [row["id"] for row in rows],
            "category": ["all"] * len(rows),
            "input_ids": [row["input_ids"] for row in rows],
            "response_mask": [
                [place >= row["prompt"] for place in range(len(row["input_ids"]))] for row in rows
            ],
        }
    ).cast(schema.TOKENS)
    return build_plan(
        tokens,
        ["all"] * len(rows),
        batch_size=work.batch_rows,
        max_length=work.max_length,
        packing=True,
    )


def build_workload(model_dir: str, args: argparse.Namespace) -> Workload:
    """The rows and how they are cut."""
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(model_dir).vocab_size
    return Workload(
        rows=build_rows(args.rows, vocabulary, args.max_length),
        max_length=args.max_length,
        batch_rows=args.batch_rows,
        micro_batch_tokens=args.micro_batch_tokens,
    )
