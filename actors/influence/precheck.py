"""Checks before the expensive influence stage: limits of the mix, and the cost of the design."""

from __future__ import annotations

from typing import Any

from actors.influence.appender import earlier_of
from actors.stage import StageContext
from system.data.corpus import Corpus
from system.data.lengths import SeededLengths, mean_response_tokens
from system.influence.append.append_cost import append_cost
from system.influence.design.cost import check_token_limit, influence_cost
from system.influence.design.heldout_cost import stage_heldout
from system.mix.question import (
    check_limits,
)
from system.models.base import load_tokenizer


def check_before_influence(context: StageContext) -> None:
    """Refuses a run whose influence stage would be wasted, before it starts.

    Raises:
        InfeasibleMixError, ConfigError: see `system.mix.question.check_limits`.
        ConfigError: the design costs more than `influence.max_token_equivalents`.
        DataError: a category has too few rows for a dose.
    """
    config = context.config
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokens = mean_response_tokens(corpus) if config.solve.unit == "tokens" else None
    check_limits(config.solve, corpus.counts("train"), tokens)
    if config.influence.max_token_equivalents is not None:
        lengths = SeededLengths(corpus)
        if context.appends_to is not None:
            cost = append_cost(
                config, earlier_of(context), corpus, lengths, lambda: _tokenizer(context)
            )
        else:
            cost = influence_cost(
                config.influence,
                run_seed=config.seed,
                sources=corpus.categories,
                lengths=lengths,
                heldout=stage_heldout(config, corpus, lengths, lambda: _tokenizer(context)),
            )
        check_token_limit(config.influence, cost)


def _tokenizer(context: StageContext) -> Any:
    return load_tokenizer(
        context.input("model", "model"),
        trust_remote_code=context.config.model.trust_remote_code,
    )
