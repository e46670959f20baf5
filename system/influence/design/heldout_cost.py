"""The tokens that the scoring of one run takes, over all held-out rows of all targets.

For losses they follow from row lengths and, for external targets, from their files.  For accuracy
(`influence.metric: accuracy`) the questions are drawn as the stage draws them, and every answer
counts with its maximum length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from system.config import RunConfig
from system.data.corpus import Corpus
from system.data.lengths import RowLengths
from system.influence.design.accuracy_targets import answer_tokens, draw_accuracy_targets
from system.influence.design.cost import HeldoutLengths
from system.influence.design.external_targets import read_targets
from system.influence.design.heldout import encode_external
from system.influence.design.interventions import seed_of


def stage_heldout(
    config: RunConfig, corpus: Corpus, lengths: RowLengths, tokenizer: Callable[[], Any]
) -> HeldoutLengths:
    """The lengths of everything that one run of the stage is scored on.

    Args:
        config: of the run.
        corpus: of stage `tag`.
        lengths: lengths of the rows of the corpus.
        tokenizer: loads the tokenizer; called only if rows have to be encoded.
    """
    if config.influence.metric == "accuracy":
        return _questions(config, corpus, tokenizer())
    if not config.influence.targets:
        return loss_heldout(config, corpus.categories, lengths)
    return loss_heldout(config, corpus.categories, lengths, _external(config, tokenizer()))


def loss_heldout(
    config: RunConfig,
    sources: Sequence[str],
    lengths: RowLengths,
    external: HeldoutLengths | None = None,
) -> HeldoutLengths:
    """Lengths of the held-out rows when losses are measured.

    Args:
        config: of the run.
        sources: categories; rows of their estimate splits are scored.
        lengths: lengths of these rows.
        external: lengths of the rows of `influence.targets`, if there are any.
    """
    seed = seed_of(config.seed, "influence", "heldout")

    def heldout(trained: Collection[str]) -> np.ndarray:
        parts = [
            lengths("estimate", category, config.influence.heldout_rows, seed).tokens
            for category in sources
        ]
        if external is not None:
            parts.append(external(trained))
        return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])

    return heldout


def _external(config: RunConfig, tokenizer: Any) -> HeldoutLengths:
    seed = seed_of(config.seed, "influence", "heldout")

    def heldout(trained: Collection[str]) -> np.ndarray:
        row_lengths: list[int] = []
        for name, rows in read_targets(config, "estimate", trained)[0].items():
            tokens, _ = encode_external(
                rows,
                name,
                config.influence.heldout_rows,
                seed,
                tokenizer,
                config.model.max_length,
            )
            row_lengths += _row_lengths(tokens)
        return np.array(row_lengths, dtype=np.float64)

    return heldout


def _questions(config: RunConfig, corpus: Corpus, tokenizer: Any) -> HeldoutLengths:
    def heldout(trained: Collection[str]) -> np.ndarray:
        external, _ = read_targets(config, "estimate", trained)
        return question_lengths(config, corpus, tokenizer, external)

    return heldout


def question_lengths(
    config: RunConfig,
    corpus: Corpus,
    tokenizer: Any,
    external: Mapping[str, pa.Table],
    only: Sequence[str] | None = None,
) -> np.ndarray:
    """[rows] tokens of each question plus the maximum length of an answer.

    Args:
        config: of the run.
        corpus: of stage `tag`.
        tokenizer: with a chat template.
        external: further targets.
        only: these categories alone; None: all.
    """
    longest = answer_tokens(config)
    questions, _, _ = draw_accuracy_targets(
        run_seed=config.seed,
        corpus=corpus,
        num_rows=config.influence.heldout_rows,
        max_prompt_tokens=config.model.max_length - longest,
        external=external,
        tokenizer=tokenizer,
        only=only,
    )
    return np.array(_row_lengths(questions), dtype=np.float64) + longest


def _row_lengths(table: pa.Table) -> list[int]:
    return [len(row) for row in table.column("input_ids").to_pylist()]
