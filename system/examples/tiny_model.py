"""The model `builtin:tiny`: a small Llama with its own tokenizer, warmed up on the corpus.

With it, all stages run on a laptop.  The warm-up is language modelling on the train split, with
prompts.  It is needed because with random weights, effects between categories show little more than
competition for capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from system.config import ModelConfig, TinyModelConfig
from system.data.corpus import Corpus
from system.models.base import CHATML, template_of
from system.models.chat import encode_table
from system.training.plan import build_plan
from system.training.settings import TrainSettings
from system.training.train import StepStats, train_on_plan

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER_ROWS = 20_000
SAMPLE_CHARS_PER_TOKEN = 2
"""A lower bound of the mean length of a token, so that a sample has enough tokens."""


def build_tiny_model(corpus: Corpus, config: ModelConfig, seed: int, target: Path) -> dict:
    """Trains tokenizer and model on the train split; writes a Hugging Face directory.

    Returns:
        Numbers for the record of the stage: parameters, tokens, first and last loss of the warm-up.
    """
    rows = _sample(corpus, TOKENIZER_ROWS, seed)
    tokenizer = train_tokenizer(_texts(rows), config.tiny.vocab_size, config.max_length)
    tokenizer.chat_template = template_of(config, tokenizer)
    tokenizer.save_pretrained(target)
    torch.manual_seed(seed)
    model = new_model(config.tiny, len(tokenizer), config.max_length)
    counts = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
    if config.tiny.warmup_tokens:
        counts |= _warm_up(model, tokenizer, corpus, config, seed)
    model.save_pretrained(target)
    return counts


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def new_model(tiny: TinyModelConfig, vocab_size: int, max_length: int) -> LlamaForCausalLM:
    """A Llama with random weights from the global generator of torch."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=tiny.hidden_size,
            intermediate_size=tiny.hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=tiny.num_layers,
            num_attention_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    config: ModelConfig,
    seed: int,
) -> dict:
    tiny = config.tiny
    chars = tiny.warmup_tokens * SAMPLE_CHARS_PER_TOKEN
    sample = _sample(corpus, max(64, chars // 100), seed + 1)
    tokens, _ = encode_table(sample, tokenizer, config.max_length)
    tokens = _first_tokens(_shuffled(tokens, seed), tiny.warmup_tokens)
    mean_length = max(1.0, len(tokens.column("input_ids").combine_chunks().values) / len(tokens))
    plan = build_plan(
        _all_tokens_count(tokens),
        ["warm-up"] * len(tokens),
        batch_size=max(1, round(tiny.batch_tokens / mean_length)),
        max_length=config.max_length,
        packing=True,
    )
    losses: list[float] = []

    def note(stats: StepStats) -> None:
        losses.append(stats.loss)

    settings = TrainSettings(
        learning_rate=tiny.learning_rate, lr_schedule="cosine", warmup_share=0.05, seed=seed
    )
    result = train_on_plan(model, plan, settings, on_step=note)
    return {
        "warmup_tokens": result.num_tokens,
        "warmup_steps": plan.num_steps,
        "warmup_first_loss": round(losses[0], 4),
        "warmup_last_loss": round(losses[-1], 4),
    }


def _sample(corpus: Corpus, num_rows: int, seed: int) -> pa.Table:
    """Rows of the train split, with all categories in their natural shares."""
    counts = corpus.counts("train")
    total = sum(counts.values())
    tables = [
        corpus.sample("train", category, -(-num_rows * count // total), seed)
        for category, count in counts.items()
        if count
    ]
    return pa.concat_tables(tables)


def _texts(rows: pa.Table) -> Iterator[str]:
    for messages in rows.column("messages"):
        for message in messages.as_py():
            yield message["content"]


def _shuffled(tokens: pa.Table, seed: int) -> pa.Table:
    return tokens.take(pa.array(np.random.default_rng(seed).permutation(len(tokens))))


def _first_tokens(tokens: pa.Table, budget: int) -> pa.Table:
    lengths = tokens.column("input_ids").combine_chunks().value_lengths().to_numpy()
    return tokens.slice(0, max(1, int(np.searchsorted(np.cumsum(lengths), budget))))


def _all_tokens_count(tokens: pa.Table) -> pa.Table:
    """The same rows with a loss on every token (language modelling), not on responses only."""
    ids = tokens.column("input_ids").combine_chunks()
    mask = pa.ListArray.from_arrays(ids.offsets, pa.array(np.ones(len(ids.values), dtype=bool)))
    return tokens.set_column(
        tokens.schema.get_field_index("response_mask"), tokens.schema.field("response_mask"), mask
    )
