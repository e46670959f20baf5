"""Verifiable answers: draws rows that have one, makes prompts of them, checks generated answers."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from system.data.corpus import Corpus, seeded_rank
from system.models.chat import encode, encode_prompt
from system.scoring.verify import is_correct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),  # as the model read it
        pa.field("expected", pa.string(), nullable=False),
        pa.field("output", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
    ]
)
"""One model's answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Generated answers."""

    texts: list[str | None]
    """One text per prompt; None if the engine failed on it (which is no fault of the model)."""
    failures: dict[int, str]
    """Position of a prompt without a text -> reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Rows with a verifiable answer, and their prompts."""

    rows: pa.Table
    """CORPUS schema, `answer` never null."""
    prompts: list[list[int]]
    stop_token_ids: list[int]


def ask(rows: pa.Table, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int) -> Questions:
    """Makes prompts of the rows' questions.

    Args:
        rows: CORPUS schema, each with an answer.
        tokenizer: with a chat template.
        max_prompt_tokens: a longer prompt keeps its last tokens.
    """
    return Questions(
        rows=rows,
        prompts=[
            encode_prompt(tokenizer, messages, max_prompt_tokens)
            for messages in rows.column("messages").to_pylist()
        ],
        stop_token_ids=end_of_turn(tokenizer) if rows.num_rows else [],
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token with which the chat template ends an assistant turn, if any."""
    sample = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    encoded = encode(tokenizer, sample, 2**20)
    said = encoded.input_ids[encoded.response_mask]
    special = {int(token) for token in tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted({int(token) for token in said} & special)


def check_answers(
    questions: Questions, generated: Generated, tokenizer: PreTrainedTokenizerBase
) -> tuple[pa.Table, dict[str, str]]:
    """The ANSWERS table of generated answers, and id -> reason for prompts that failed."""
    rows, rejected = [], {}
    for place, (row, prompt, output) in enumerate(
        zip(questions.rows.to_pylist(), questions.prompts, generated.texts, strict=True)
    ):
        if output is None:
            rejected[row["id"]] = generated.failures[place]
            continue
        rows.append(
            {
                "id": row["id"],
                "category": row["category"],
                "prompt": tokenizer.decode(prompt),
                "expected": row["answer"],
                "output": output,
                "correct": is_correct(output, row["answer"], row["answer_pattern"]),
            }
        )
    return pa.Table.from_pylist(rows, schema=ANSWERS), rejected


def draw_rows(corpus: Corpus, split: str, category: str, num_rows: int, seed: int) -> pa.Table:
    """Draws rows that have an answer (CORPUS schema): those with the smallest `sha256(seed:id)`."""
    ranked: list[tuple[int, str]] = []
    for table in corpus.iter_tables(split, category, ["id", "answer"]):
        kept = table.filter(table.column("answer").is_valid())
        ranked += [(seeded_rank(seed, name), name) for name in kept.column("id").to_pylist()]
    first = heapq.nsmallest(num_rows, ranked)
    return corpus.rows_by_id(split, category, [name for _, name in first])
