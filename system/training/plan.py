"""The frozen training schedule (plan): step -> packed sequences -> rows.

A plan is written once, before training, with its hash.  The rows of a rank are a pure function of
(step, rank, world size), and a resumed training needs only the step.  So the order of training does
not depend on workers, data loaders, or failures.  The loss of a step is divided by the response
tokens of its whole batch (`denominators`), also if rows are masked or spread over ranks.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from system import schema, storage
from system.errors import DataError
from system.training.pack import pack_rows

FORMAT = 1
APPENDED = "appended"
"""Stage name of rows that were added to a finished schedule (`influence.append`).  Denominators do
not count these rows, so that the original rows train as before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """A schedule as a table and as arrays.  R = rows of the plan, S = steps."""

    table: pa.Table
    """PLAN schema, sorted by step, sequence, and position within the sequence."""
    sha256: str
    """Hash of the content of the schedule (not of the bytes of a file)."""
    step_starts: np.ndarray
    """[S + 1] int64; rows step_starts[s] .. step_starts[s + 1] are those of step s."""
    denominators: np.ndarray
    """[S] int64; response tokens of the whole batch of each step, except first tokens of rows."""
    sequences: np.ndarray
    """[R] int32; packed sequence of each row, numbered within its step."""
    offsets: np.ndarray
    """[R + 1] int64; tokens offsets[r] .. offsets[r + 1] are those of row r."""
    input_ids: np.ndarray
    """[tokens] int32."""
    response_mask: np.ndarray
    """[tokens] bool."""

    @property
    def num_steps(self) -> int:
        """Number of steps, S."""
        return len(self.denominators)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, with prompts."""
        return int(self.offsets[-1])

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The rows of a rank in a step, in the order of the plan.

        Rows are assigned in order of length, longest first, each to the rank with the fewest tokens
        (ties: the lowest rank).  All ranks wait for the one with the most tokens; with this rule it
        has at most 4/3 of the optimum.  A packed sequence may be split over ranks, because
        attention stays within a row.
        """
        rows = np.arange(self.step_starts[step], self.step_starts[step + 1])
        if world_size == 1:
            return rows
        lengths = self.lengths(rows)
        loads = [(0, other) for other in range(world_size)]
        own_rows = []
        for place in np.lexsort((rows, -lengths)):
            tokens, owner = loads[0]
            heapq.heapreplace(loads, (tokens + int(lengths[place]), owner))
            if owner == rank:
                own_rows.append(rows[place])
        return np.sort(np.array(own_rows, dtype=rows.dtype))

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """[rows] int64, tokens of the rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def stage(self, step: int) -> str:
        """The stage to which most rows of a step belong."""
        start, stop = (int(row) for row in self.step_starts[step : step + 2])
        names = self.table.column("stage").slice(start, stop - start).to_pylist()
        return max(dict.fromkeys(names), key=names.count)

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of the rows."""
        return self.table.column("id").take(pa.array(rows)).to_pylist()


def build_plan(
    tokens: pa.Table,
    stages: Sequence[str],
    *,
    batch_size: int,
    max_length: int,
    packing: bool,
) -> TrainPlan:
    """The schedule of rows that are in training order.

    Step s has the rows from s * batch_size on; the last step may have fewer.  Within a step, rows
    are packed (best fit) into sequences of `max_length` tokens, or each row is its own sequence.

    Args:
        tokens: TOKENS table in training order.
        stages: stage name of each row.
        batch_size: rows of an optimiser step, over all ranks.
        max_length: tokens of a sequence.
        packing: whether rows share sequences.

    Raises:
        DataError: there are no rows, the number of stages differs from the number of rows, a row
            is longer than a sequence, or a row has no response token.
    """
    if len(stages) != tokens.num_rows:
        raise DataError(
            f"expected one stage name per row, found {len(stages)} names for {tokens.num_rows} rows"
        )
    if tokens.num_rows == 0:
        raise DataError(
            "no rows to train on: the selection is empty, or every row lost its response to "
            "model.max_length"
        )
    lengths = np.diff(_flat(tokens.column("input_ids"))[1])
    num_rows = len(lengths)
    step = np.arange(num_rows, dtype=np.int32) // batch_size
    sequence = np.zeros(num_rows, dtype=np.int32)
    for start in range(0, num_rows, batch_size):
        part = slice(start, min(start + batch_size, num_rows))
        size = part.stop - start
        sequence[part] = (
            pack_rows(lengths[part], max_length) if packing else np.arange(size, dtype=np.int32)
        )
    # Sorted by step and sequence; rows of one sequence keep their order.
    order = np.lexsort((np.arange(num_rows), sequence, step))
    index = pa.array(order)
    columns = {
        "step": pa.array(step[order]),
        "sequence": pa.array(sequence[order]),
        "stage": pa.array(list(stages), type=pa.string()).take(index),
        **{
            name: tokens.column(name).cast(schema.PLAN.field(name).type).take(index)
            for name in ("id", "category", "input_ids", "response_mask")
        },
    }
    return plan_from_table(pa.table(columns))


def plan_from_table(table: pa.Table) -> TrainPlan:
    """A plan from its table.

    Raises:
        DataError: the table has another schema or order, or a row has no token to learn.
    """
    table = schema.check_table(table, schema.PLAN, "training plan").combine_chunks()
    step = table.column("step").to_numpy()
    sequence = table.column("sequence").to_numpy()
    ids, offsets = _flat(table.column("input_ids"))
    mask, mask_offsets = _flat(table.column("response_mask"))
    if not np.array_equal(offsets, mask_offsets):
        raise DataError("training plan: input_ids and response_mask differ in length; redo train")
    ahead = np.lexsort((sequence, step))
    if not np.array_equal(ahead, np.arange(len(step))) or len(np.unique(step)) != step[-1] + 1:
        raise DataError("training plan: rows are not sorted by step and sequence; redo train")
    is_label = mask.copy()
    is_label[offsets[:-1]] = False  # no token comes before the first one and predicts it
    per_row = np.add.reduceat(is_label, offsets[:-1], dtype=np.int64)
    if (per_row == 0).any():
        row = int(np.argmin(per_row))
        raise DataError(
            f"training plan: row {row} (id {table.column('id')[row].as_py()}) has no response "
            "token to learn from; leave it out before the plan is built"
        )
    step_starts = np.searchsorted(step, np.arange(step[-1] + 2)).astype(np.int64)
    stage = table.column("stage").combine_chunks().dictionary_encode()
    is_counted = np.array([name != APPENDED for name in stage.dictionary.to_pylist()])
    return TrainPlan(
        table=table,
        sha256=_content_hash(table, ids, offsets, mask),
        step_starts=step_starts,
        denominators=np.add.reduceat(
            per_row * is_counted[stage.indices.to_numpy()], step_starts[:-1]
        ),
        sequences=sequence,
        offsets=offsets,
        input_ids=ids,
        response_mask=mask,
    )


def write_plan(uri: str, plan: TrainPlan) -> None:
    """Writes the plan (`.arrow` or `.parquet`), with its hash in the metadata of the table."""
    metadata = {"instructmix.plan": f"{FORMAT}", "instructmix.sha256": plan.sha256}
    storage.write_table(uri, plan.table.replace_schema_metadata(metadata))


def read_plan(uri: str) -> TrainPlan:
    """Reads a plan of `write_plan` and checks its hash.

    Raises:
        DataError: the file is not a plan, or its content was changed.
    """
    table = storage.read_table(uri)
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    if metadata.get("instructmix.plan") != f"{FORMAT}":
        raise DataError(
            f"{uri}: expected a training plan of format {FORMAT}, found metadata {metadata}; run "
            "the train stage again with --redo train"
        )
    plan = plan_from_table(table.replace_schema_metadata(None))
    if plan.sha256 != metadata["instructmix.sha256"]:
        raise DataError(
            f"{uri}: expected a plan with hash {metadata['instructmix.sha256']}, found "
            f"{plan.sha256}: the file was changed after it was written; run again with --redo train"
        )
    return plan


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and [rows + 1] offsets of a list column of one chunk."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def _content_hash(table: pa.Table, ids: np.ndarray, offsets: np.ndarray, mask: np.ndarray) -> str:
    digest = hashlib.sha256(f"plan {FORMAT} {table.num_rows}\n".encode())
    for name in ("step", "sequence"):
        digest.update(np.ascontiguousarray(table.column(name).to_numpy(), dtype="<i4").tobytes())
    for name in ("stage", "id", "category"):
        text = "\n".join(table.column(name).to_pylist())
        digest.update(f"{name} {len(text)}\n{text}".encode())
    digest.update(np.ascontiguousarray(offsets, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()
