"""The rows on which the stage `evaluate` scores all models: test rows and questions.

They come from the categories and from further targets (`influence.targets`).  They are drawn by the
hash of (seed, id), so they are the same for every model.  Of a further target, only rows are used
that the effect matrix did not use and that no model was trained on.
"""

# (pyarrow.compute makes its functions at import, where no type checker sees them)
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from system.config import RunConfig
from system.data.corpus import Corpus
from system.influence.design.external_targets import read_targets
from system.influence.design.heldout import encode_external, in_seeded_order, seeded_draw
from system.influence.design.interventions import seed_of
from system.scoring.answers import Questions, ask, draw_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def untrained_rows(
    config: RunConfig, trained: Iterable[pa.ChunkedArray]
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Test rows of the further targets: CORPUS tables by name, and left-out rows by reason.

    Args:
        config: of the run.
        trained: ids of the training rows of each model; read only if there are further targets.

    Raises:
        DataError: the files of a target cannot be read.
    """
    if not config.influence.targets:
        return {}, {}
    tables, left_out = read_targets(config, "test")
    for ids in trained:
        for name, table in tables.items():
            is_trained = pc.is_in(table.column("id"), value_set=ids.combine_chunks())
            if count := pc.sum(is_trained).as_py():
                reason = f"{name}: trained-on"
                left_out[reason] = left_out.get(reason, 0) + count
                tables[name] = table.filter(pc.invert(is_trained))
    return tables, left_out


def draw_test_rows(
    config: RunConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    external: Mapping[str, pa.Table],
) -> tuple[pa.Table, dict[str, int]]:
    """Draws test rows: TOKENS (category: name of category or target), and drops by reason.

    Args:
        config: of the run; at most `evaluate.test_rows` rows are drawn for each name.
        corpus: its test split is drawn from.
        tokenizer: with a chat template.
        external: tables of `untrained_rows`.
    """
    draw = seeded_draw(corpus, tokenizer, config.model.max_length)
    num_rows, seed = config.evaluate.test_rows, seed_of(config.seed, "evaluate-test")
    drawn = [draw("test", category, num_rows, seed) for category in corpus.categories]
    drawn += [
        encode_external(rows, name, num_rows, seed, tokenizer, config.model.max_length)
        for name, rows in external.items()
    ]
    dropped: dict[str, int] = {}
    for _, lost in drawn:
        for reason, count in lost.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return pa.concat_tables([tokens for tokens, _ in drawn]), dropped


def draw_test_questions(
    config: RunConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    external: Mapping[str, pa.Table],
) -> Questions:
    """Draws test rows with a verifiable answer, at most `evaluate.accuracy_rows` for each name.

    Args:
        config: of the run.
        corpus: its test split is drawn from.
        tokenizer: with a chat template.
        external: tables of `untrained_rows`.
    """
    longest = config.model.max_length
    room = min(config.evaluate.max_new_tokens, longest // 2)
    num_rows, seed = config.evaluate.accuracy_rows, seed_of(config.seed, "evaluate-questions")
    drawn = [draw_rows(corpus, "test", name, num_rows, seed) for name in corpus.categories]
    for table in external.values():
        verifiable = table.filter(table.column("answer").is_valid())
        drawn.append(in_seeded_order(verifiable, seed).slice(0, num_rows))
    return ask(pa.concat_tables(drawn), tokenizer, max_prompt_tokens=longest - room)
