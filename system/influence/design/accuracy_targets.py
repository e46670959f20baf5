"""Targets that are measured by accuracy instead of loss (`influence.metric: accuracy`).

Every intervention run answers the held-out questions of each category whose rows have a verifiable
answer.  The value of a question is 1 if the answer is right, else 0, so P_i is the accuracy on
target i.  Differences between runs are paired by question, and their held-out errors are those of
paired binomial counts.  Schedules, doses, replications and intervals work as they do for losses.
A category without verifiable rows is a source but not a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from system import schema
from system.config import RunConfig
from system.data.corpus import Corpus
from system.errors import DataError
from system.influence.design.design import Target
from system.influence.design.heldout import MIN_HELDOUT_ROWS, in_seeded_order
from system.influence.design.interventions import seed_of
from system.models.chat import encode_prompt
from system.scoring.answers import Generated, draw_rows, end_of_turn
from system.scoring.score import Scored
from system.scoring.verify import is_correct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),  # name of the target
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),  # the prompt
        pa.field("answer", pa.string(), nullable=False),
        pa.field("answer_pattern", pa.string()),
        pa.field("stop_token_ids", pa.list_(pa.int32()), nullable=False),
    ]
)
"""Held-out questions in the form that the engine takes."""


def answer_tokens(config: RunConfig) -> int:
    """Maximum tokens of an answer: `influence.max_new_tokens`, but at most half of the context."""
    return min(config.influence.max_new_tokens, config.model.max_length // 2)


def draw_accuracy_targets(
    *,
    run_seed: int,
    corpus: Corpus,
    num_rows: int,
    max_prompt_tokens: int,
    external: Mapping[str, pa.Table],
    tokenizer: PreTrainedTokenizerBase,
    only: Sequence[str] | None = None,
) -> tuple[pa.Table, tuple[Target, ...], dict[str, int]]:
    """Draws the held-out questions of every target; all intervention runs answer the same ones.

    Args:
        run_seed: seed of the run.
        corpus: the questions are drawn from its estimate split.
        num_rows: largest number of questions per target.
        max_prompt_tokens: a longer prompt keeps its last tokens.
        external: further targets (`influence.targets`): name -> CORPUS table.
        tokenizer: with a chat template.
        only: draw for these categories alone, and accept that none of them has questions.
            None: draw for all categories.

    Returns:
        QUESTIONS rows; the targets in order (categories first); counts of unused rows by reason.

    Raises:
        DataError: no category has enough verifiable rows, or an external target has too few.
    """
    seed = seed_of(run_seed, "influence", "heldout")
    stops = end_of_turn(tokenizer)
    parts, targets, left_out = [], [], {}
    for name in (*(corpus.categories if only is None else only), *external):
        if name in external:
            rows = external[name].filter(external[name].column("answer").is_valid())
            rows = in_seeded_order(rows, seed).slice(0, num_rows)
        else:
            rows = draw_rows(corpus, "estimate", name, num_rows, seed)
        if rows.num_rows < min(MIN_HELDOUT_ROWS, num_rows):
            # The user named an external target, so it must work; a category may just be a source.
            if name in external:
                raise DataError(
                    f"influence.targets {name!r} has {rows.num_rows} rows with a verifiable "
                    f"answer; with influence.metric accuracy it needs at least {MIN_HELDOUT_ROWS}: "
                    "say where they are (`{path: ..., answer_column: ...}` or answer_pattern), or "
                    "measure losses"
                )
            left_out[f"{name}: verifiable rows too few to be a target"] = rows.num_rows
            continue
        parts.append(_questions(name, rows, tokenizer, max_prompt_tokens, stops))
        targets.append(
            Target(
                name=name,
                num_rows=rows.num_rows,
                num_tokens=rows.num_rows,
                is_external=name in external,
            )
        )
    if not targets and only is not None:
        return QUESTIONS.empty_table(), (), left_out
    if not targets:
        raise DataError(
            "influence.metric is accuracy, but no category has at least "
            f"{MIN_HELDOUT_ROWS} verifiable rows in its estimate split; name the answers "
            "(sources.answer_column or sources.answer_pattern), or use influence.metric loss"
        )
    return pa.concat_tables(parts), tuple(targets), left_out


def score_answers(generated: Generated, questions: pa.Table) -> Scored:
    """Turns answers into scores: `nll` is 0 for a right answer and 1 for a wrong one.

    Each answer counts as one token.  A question on which the engine failed is rejected, as a row
    is that the engine could not score.

    Args:
        generated: the model's output, one text per question.
        questions: QUESTIONS schema.
    """
    questions = schema.check_table(questions, QUESTIONS, "questions")
    ids = questions.column("id").to_pylist()
    rejected = {ids[place]: reason for place, reason in generated.failures.items()}
    texts = [text for text in generated.texts if text is not None]
    is_answered = pa.array([text is not None for text in generated.texts])
    if len(is_answered) != questions.num_rows:
        raise ValueError(f"{len(is_answered)} answers to {questions.num_rows} questions")
    questions = questions.filter(is_answered)
    patterns = questions.column("answer_pattern").to_pylist()
    answers = questions.column("answer").to_pylist()
    wrong = [
        0.0 if is_correct(output, answer, pattern) else 1.0
        for output, answer, pattern in zip(texts, answers, patterns, strict=True)
    ]
    table = pa.table(
        {
            "id": questions.column("id"),
            "category": questions.column("category"),
            "nll": pa.array(wrong, type=pa.float64()),
            "num_tokens": pa.array(np.ones(len(wrong)), type=pa.int32()),
        },
        schema=schema.SCORES,
    )
    return Scored(table=table, rejected=rejected)


def check_some_vary(losses: Mapping[str, np.ndarray]) -> None:
    """Checks that at least one answer differs between the runs.

    Args:
        losses: run -> [N] 0 or 1.

    Raises:
        DataError: all runs gave the same results on all questions, so no effect can be measured.
    """
    values = np.stack(list(losses.values()))
    if np.ptp(values, axis=0).any():
        return
    right = 1.0 - float(values[0].mean())
    raise DataError(
        f"influence.metric is accuracy, but all {len(values)} runs answered every one of "
        f"{values.shape[1]} questions alike ({right:.1%} right): the proxy model cannot do these "
        "tasks, or does them all. Use a larger model, easier questions, or influence.metric loss."
    )


def _questions(
    name: str,
    rows: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    stops: list[int],
) -> pa.Table:
    prompts = [
        encode_prompt(tokenizer, messages, max_prompt_tokens)
        for messages in rows.column("messages").to_pylist()
    ]
    columns = {
        "id": rows.column("id"),
        "category": pa.array([name] * rows.num_rows, type=pa.string()),
        "input_ids": pa.array(prompts, type=pa.list_(pa.int32())),
        "answer": rows.column("answer"),
        "answer_pattern": rows.column("answer_pattern"),
        "stop_token_ids": pa.array([stops] * rows.num_rows, type=pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=QUESTIONS)
