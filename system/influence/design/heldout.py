"""Which rows an intervention trains on and which it is measured on, as tokens.

Rows are drawn by the hash of (seed, id), so the choice depends on the corpus' content alone, and a
larger draw begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from system.data.corpus import Corpus, seeded_rank
from system.errors import DataError
from system.influence.design.design import Target
from system.influence.design.interventions import Draw, response_tokens, seed_of
from system.models.chat import encode_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_HELDOUT = 4
"""Held-out rows below which a category is no target."""


def seeded_draw(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Draw:
    """A draw of usable rows: rows that lose their response to truncation are replaced by the next.

    The draw asks for twice as many rows until it has enough or the category has no more, so the
    first rows are the same however many were asked for.
    """

    def draw(split: str, category: str, wanted: int, seed: int) -> tuple[pa.Table, dict[str, int]]:
        available = corpus.num_rows(split, category)
        asked = min(wanted, available)
        while True:
            rows = corpus.sample(split, category, asked, seed)
            tokens, dropped = encode_table(rows, tokenizer, max_length)
            if tokens.num_rows >= wanted or asked >= available:
                return tokens.slice(0, wanted), dropped
            asked = min(available, 2 * asked)

    return draw


def in_seeded_order(rows: pa.Table, seed: int) -> pa.Table:
    """The rows in the order in which `Corpus.sample` would give them."""
    ids = rows.column("id").to_pylist()
    order = sorted(range(len(ids)), key=lambda row: seeded_rank(seed, ids[row]))
    return rows.take(pa.array(order, type=pa.int64()))


def draw_targets(
    *,
    run_seed: int,
    sources: tuple[str, ...],
    num_rows: int,
    draw: Draw,
    external: Mapping[str, pa.Table],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[pa.Table, tuple[Target, ...], dict[str, int]]:
    """The held-out rows of every target, the same for all runs of all replications.

    Args:
        run_seed: seed of the run.
        sources: categories; each is a target, measured on its estimate split.
        num_rows: rows of each target.
        draw: from the corpus.
        external: further targets, CORPUS tables by name.
        tokenizer: with a chat template.
        max_length: tokens of a row.

    Returns:
        TOKENS rows whose category is the target's name, the targets in order (sources first),
        dropped rows by reason.

    Raises:
        DataError: a target has too few usable rows.
    """
    seed = seed_of(run_seed, "influence", "heldout")
    parts: list[pa.Table] = []
    targets: list[Target] = []
    dropped: dict[str, int] = {}
    for name in (*sources, *external):
        if name in external:
            tokens, lost = encode_external(
                external[name], name, num_rows, seed, tokenizer, max_length
            )
        else:
            tokens, lost = draw("estimate", name, num_rows, seed)
        _check_enough(name, tokens.num_rows, num_rows)
        for reason, count in lost.items():
            dropped[reason] = dropped.get(reason, 0) + count
        parts.append(tokens)
        targets.append(
            Target(
                name=name,
                num_rows=tokens.num_rows,
                num_tokens=response_tokens(tokens),
                is_external=name in external,
            )
        )
    return pa.concat_tables(parts), tuple(targets), dropped


def encode_external(
    rows: pa.Table,
    name: str,
    num_rows: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[pa.Table, dict[str, int]]:
    """The rows of a target that no source owns, as TOKENS, and rows left out by reason."""
    first = in_seeded_order(rows, seed).slice(0, 2 * num_rows)
    tokens, lost = encode_table(_named(first, name), tokenizer, max_length)
    return tokens.slice(0, num_rows), lost


def _named(rows: pa.Table, name: str) -> pa.Table:
    place = rows.schema.get_field_index("category")
    return rows.set_column(place, "category", pa.array([name] * rows.num_rows, type=pa.string()))


def _check_enough(target: str, num_rows: int, asked: int) -> None:
    least = min(LEAST_HELDOUT, asked)
    if num_rows < least:
        raise DataError(
            f"influence: target {target!r} has {num_rows} usable held-out rows; expected "
            f"{asked} (influence.heldout_rows), and at least {least}. Give it more data, raise "
            "ingest.estimate_share, or merge the category into another."
        )
