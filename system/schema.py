"""Arrow schemas of the tables that one stage writes and another reads.

`check_table` checks a table once, where the reading stage opens it.
"""

from __future__ import annotations

import pyarrow as pa

from system.errors import DataError

MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("loss", pa.bool_()),  # false: an assistant turn that is not learned; else null
            ("reasoning", pa.string()),  # what the assistant thought before it answered
            ("call_ids", pa.list_(pa.string())),  # of a turn's tool calls, or of a result's call
        ]
    )
)
"""A conversation: roles system, user, assistant, tool; the last turn is the assistant's."""

EMBEDDING = pa.list_(pa.float32())
"""The embedding that the source gives for a row."""

CORPUS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # 32 hex digits of the content hash
        pa.field("category", pa.string()),  # null until tagged
        pa.field("source", pa.string(), nullable=False),
        pa.field("messages", MESSAGES, nullable=False),
        pa.field("answer", pa.string()),  # verifiable final answer
        pa.field("answer_pattern", pa.string()),  # regex with one group; null: whole response
        pa.field("score", pa.float64()),  # quality, from the source
        pa.field("embedding", EMBEDDING),
    ]
)
"""A row of the corpus (stage `ingest`). Its split is stored with the shard."""

REJECTED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # 0-based, in file order
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
"""A rejected row, with the reason."""

LENGTHS = pa.schema(
    [
        pa.field("tokens", pa.int32(), nullable=False),  # after truncation; 0 if left out
        pa.field("response_tokens", pa.int32(), nullable=False),  # 0 if left out
        pa.field("left_out", pa.string()),  # reason; null if the row is used
    ]
)
"""Lengths of the rows of a shard, in the order of the rows."""

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
        pa.field("sequence", pa.int32(), nullable=False),  # packed sequence within the step
        pa.field("stage", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("response_mask", pa.large_list(pa.bool_()), nullable=False),
    ]
)
"""A training schedule, sorted by step, sequence, and position in the packed sequence.  One plan may
hold more than 2^31 tokens."""

SCORES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),  # nats, summed over response tokens
        pa.field("num_tokens", pa.int32(), nullable=False),  # response tokens
    ]
)
"""Negative log-likelihood of one held-out response under one model."""

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
        pa.field("gamma", pa.float64()),  # null if the own effect is not identifiable
        pa.field("gamma_low", pa.float64()),
        pa.field("gamma_high", pa.float64()),
        pa.field("identifiable", pa.bool_(), nullable=False),
    ]
)
"""The effect matrix (`influence`). Row = target (measured on), column = source (trained on)."""

SELECTION_SCORES = pa.schema(
    [
        pa.field("score", pa.float64()),  # null if the row has none
        pa.field("reason", pa.string()),  # null: ranked by score; else why not
        pa.field("is_usable", pa.bool_(), nullable=False),  # false: never selected
    ]
)
"""Scores by which stage `select` ranks rows; one line for each row of a shard, in its order."""

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
    """The table with exactly the columns of the schema, in its order.

    Raises:
        DataError: a column is missing, has another type, or contains forbidden nulls.
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
            raise DataError(
                f"{where}: expected no null, but column {field.name!r} has {nulls} nulls. The file "
                "is damaged: run that stage again with --redo."
            )
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(
            f"{where}: expected {schema.to_string(show_field_metadata=False)!r}; {error}"
        ) from error
