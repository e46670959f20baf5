"""Draws the training rows of interventions and the held-out rows of targets, as tokens.

Rows are ordered by the hash of (seed, id).  So the choice depends only on the content of the
corpus, and a larger draw begins with the rows of a smaller one.
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

MIN_HELDOUT_ROWS = 4
"""Minimum number of held-out rows of a target."""


def seeded_draw(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Draw:
    """Makes the function that draws usable rows of a category.

    A row that loses its whole response to truncation is replaced by the next one.  The draw doubles
    the number of rows until enough are usable or the category has no more, so the first rows do not
    depend on how many are requested.
    """

    def draw(
        split: str, category: str, num_rows: int, seed: int
    ) -> tuple[pa.Table, dict[str, int]]:
        available = corpus.num_rows(split, category)
        num_sampled = min(num_rows, available)
        while True:
            rows = corpus.sample(split, category, num_sampled, seed)
            tokens, dropped = encode_table(rows, tokenizer, max_length)
            if tokens.num_rows >= num_rows or num_sampled >= available:
                return tokens.slice(0, num_rows), dropped
            num_sampled = min(available, 2 * num_sampled)

    return draw


def in_seeded_order(rows: pa.Table, seed: int) -> pa.Table:
    """Sorts rows into the order that `Corpus.sample` uses."""
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
    """Draws the held-out rows of every target; all runs of all replications use the same ones.

    Args:
        run_seed: seed of the run.
        sources: categories; each is a target, measured on its estimate split.
        num_rows: rows per target.
        draw: draws rows of the corpus.
        external: further targets (`influence.targets`): name -> CORPUS table.
        tokenizer: with a chat template.
        max_length: maximum tokens of a row.

    Returns:
        TOKENS rows whose category is the name of the target; the targets in order (sources first);
        counts of dropped rows by reason.

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
    """Encodes rows of an external target: TOKENS rows, and counts of unused rows by reason."""
    first = in_seeded_order(rows, seed).slice(0, 2 * num_rows)
    tokens, lost = encode_table(_named(first, name), tokenizer, max_length)
    return tokens.slice(0, num_rows), lost


def _named(rows: pa.Table, name: str) -> pa.Table:
    place = rows.schema.get_field_index("category")
    return rows.set_column(place, "category", pa.array([name] * rows.num_rows, type=pa.string()))


def _check_enough(target: str, num_rows: int, requested: int) -> None:
    minimum = min(MIN_HELDOUT_ROWS, requested)
    if num_rows < minimum:
        raise DataError(
            f"influence: target {target!r} has {num_rows} usable held-out rows; expected "
            f"{requested} (influence.heldout_rows), and at least {minimum}. Give it more data, "
            "raise ingest.estimate_share, or merge the category into another."
        )
