"""Arrow schemas of the tables that cross a stage border, and the check done there, once."""

from __future__ import annotations

import pyarrow as pa

from system.errors import DataError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation: roles system, user, assistant, tool; the last turn is the assistant's."""

EMBEDDING = pa.list_(pa.float32())
"""A vector that came with the row."""

CORPUS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # 32 hex digits of the content hash
        pa.field("category", pa.string()),  # null until tagged
        pa.field("source", pa.string(), nullable=False),
        pa.field("messages", MESSAGES, nullable=False),
        pa.field("answer", pa.string()),  # verifiable final answer
        pa.field("answer_pattern", pa.string()),  # regex with one group; null: whole response
        pa.field("score", pa.float64()),  # quality, as the source gives it
        pa.field("embedding", EMBEDDING),
    ]
)
"""A row of the corpus (stage `ingest`). The split is the shard's, not the row's."""

REJECTED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # 0-based, in file order
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
"""A row that did not enter the corpus, with its reason."""

LENGTHS = pa.schema(
    [
        pa.field("tokens", pa.int32(), nullable=False),  # after truncation; 0 where left out
        pa.field("response_tokens", pa.int32(), nullable=False),  # 0 where left out
        pa.field("left_out", pa.string()),  # reason; null where the row can be learnt
    ]
)
"""Lengths of the rows of a shard, in their order."""

TOKENS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_mask", pa.list_(pa.bool_()), nullable=False),
    ]
)
"""An encoded conversation; the mask is true on the tokens that the assistant produces."""

PLAN = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("sequence", pa.int32(), nullable=False),  # packed row within the step
        pa.field("stage", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("response_mask", pa.large_list(pa.bool_()), nullable=False),
    ]
)
"""A frozen training schedule, sorted by step, sequence, place within the packed row.  One plan may
hold more than 2^31 tokens."""

SCORES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),  # nats, summed over response tokens
        pa.field("num_tokens", pa.int32(), nullable=False),  # response tokens
    ]
)
"""How one model likes one held-out response."""

MATRIX = pa.schema(
    [
        pa.field("target", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("direction", pa.string(), nullable=False),  # add | remove
        pa.field("dose", pa.float64(), nullable=False),  # in `unit`
        pa.field("unit", pa.string(), nullable=False),  # examples | tokens
        pa.field("estimator", pa.string(), nullable=False),
        pa.field("effect", pa.float64(), nullable=False),  # nats/response token per unit
        pa.field("effect_se", pa.float64(), nullable=False),
        pa.field("effect_shrunk", pa.float64(), nullable=False),
        pa.field("gamma", pa.float64()),  # null where the own effect is not identifiable
        pa.field("gamma_low", pa.float64()),
        pa.field("gamma_high", pa.float64()),
        pa.field("identifiable", pa.bool_(), nullable=False),
    ]
)
"""The effect matrix (`influence`). Row = target (measured on), column = source (trained on)."""

SELECTION_SCORES = pa.schema(
    [
        pa.field("score", pa.float64()),  # null where there is none
        pa.field("reason", pa.string()),  # null: ranked by its score; else why it is not
        pa.field("is_usable", pa.bool_(), nullable=False),  # false: quarantined, never chosen
    ]
)
"""What select goes by, one line for each row of a shard, in its order."""

SELECTION = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),  # 0-based over all stages
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("messages", MESSAGES, nullable=False),
    ]
)
"""The training examples in training order (stage `select`)."""


def check_table(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table with exactly the schema's columns, in its order.

    Raises:
        DataError: a column is missing, has another type, or holds nulls where none may be.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{where}: expected columns {schema.names}, found {table.column_names}; "
            f"missing {missing}. The file was written by another version: run that stage again "
            "with --redo."
        )
    for field in schema:
        nulls = table.column(field.name).null_count
        if nulls and not field.nullable:
            raise DataError(f"{where}: column {field.name!r} has {nulls} nulls where none may be")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(
            f"{where}: expected {schema.to_string(show_field_metadata=False)!r}; {error}"
        ) from error
