"""Rows with answers that can be checked, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from system.data.corpus import Corpus, make_manifest, write_manifest, write_shard
from system.models.base import CHATML
from system.schema import CORPUS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: n for n, token in enumerate([*marks, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=marks[0])
    fast.chat_template = CHATML
    return fast


def corpus_of(folder: Path, rows: dict[str, list[tuple[str, str | None]]]) -> Corpus:
    """Category -> (question, answer or None); all rows in the test split."""
    shards = []
    for place, (category, pairs) in enumerate(rows.items()):
        table = pa.table(
            {
                "id": [f"{place:02d}{n:030d}" for n in range(len(pairs))],
                "category": [category] * len(pairs),
                "source": ["s"] * len(pairs),
                "messages": [
                    [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": f"so #### {answer}"},
                    ]
                    for question, answer in pairs
                ],
                "answer": [answer for _, answer in pairs],
                "answer_pattern": ["#### (.+)"] * len(pairs),
                "score": [None] * len(pairs),
                "embedding": [None] * len(pairs),
            },
            schema=CORPUS,
        )
        shards.append(write_shard(str(folder), f"{place}.arrow", table, "test", category))
    write_manifest(str(folder / "manifest.json"), make_manifest(shards))
    return Corpus.open(str(folder / "manifest.json"))
