"""Spill files: rows on their way from many producers to many consumers, one file a producer.

A producer adds tables with a bucket number for each row.  They are written, bucket by bucket, as
record batches of one Arrow IPC file.  `batches` says which batch belongs to which bucket.  So a
consumer reads only its own batches of each producer's file, and the number of files equals the
number of producers.

The lower half is for the steps of near-deduplication, which spill for each other: where the file
of a work unit lies, its commit, and the input of the next step.  Ingest and selection use the
upper half alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from system import storage
from system.data.ingest.plan import IngestPlan


class SpillWriter:
    """Writes one producer's file; use through `spill_output`."""

    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        self._writer = pyarrow.ipc.new_file(file, schema)
        self._num_batches = 0
        self.batches: dict[int, list[int]] = {}
        """Bucket -> numbers of its record batches, in the order of their rows."""

    def add(self, table: pa.Table, buckets: np.ndarray) -> None:
        """Writes the rows, each into its bucket; the order within a bucket is kept."""
        if not table.num_rows:
            return
        if (buckets[1:] < buckets[:-1]).any():
            order = np.argsort(buckets, kind="stable")
            table = table.take(pa.array(order))
            buckets = buckets[order]
        table = table.combine_chunks()
        present, starts = np.unique(buckets, return_index=True)
        ends = [*starts[1:].tolist(), table.num_rows]
        for bucket, start, end in zip(present.tolist(), starts.tolist(), ends, strict=True):
            for batch in table.slice(start, end - start).to_batches():
                self._writer.write_batch(batch)
                self.batches.setdefault(bucket, []).append(self._num_batches)
                self._num_batches += 1

    def close(self) -> None:
        """Writes the end of the file."""
        self._writer.close()


@contextlib.contextmanager
def spill_output(uri: str, schema: pa.Schema) -> Iterator[SpillWriter]:
    """A spill file that appears only when the `with` block ends without an error."""
    with storage.atomic_output(uri) as file:
        writer = SpillWriter(file, schema)
        yield writer
        writer.close()


def read_spill(uri: str, numbers: Sequence[int]) -> list[pa.RecordBatch]:
    """The record batches with these numbers from the file of one producer."""
    if not numbers:
        return []
    path = storage.local_path(uri)
    if path is None:
        with storage.open_input(uri) as remote:
            reader = pyarrow.ipc.open_file(pa.PythonFile(remote, mode="r"))
            return [reader.get_batch(number) for number in numbers]
    with pa.memory_map(str(path)) as mapped:
        reader = pyarrow.ipc.open_file(mapped)
        return [reader.get_batch(number) for number in numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillOutcome:
    """What a work unit wrote: consumer (a bucket, a range of keys) -> record batches."""

    index: int
    batches: dict[int, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillInput:
    """Where the rows for a work unit lie: producer -> record batches."""

    index: int
    batches: dict[int, list[int]]


def step_uri(plan: IngestPlan, step: str, index: int, ending: str) -> str:
    """A file that a work unit leaves: `json` is its commit, `arrow` its rows."""
    return storage.join(plan.attempt, "work", step, f"{index:05d}.{ending}")


def read_spill_outcome(plan: IngestPlan, step: str, index: int) -> SpillOutcome | None:
    """The outcome of a finished work unit of a step, else None."""
    uri = step_uri(plan, step, index, "json")
    if not storage.is_whole(uri):
        return None
    value = storage.read_json(uri)
    value["batches"] = {int(key): numbers for key, numbers in value["batches"].items()}
    return SpillOutcome(**value)


def commit_spill(plan: IngestPlan, step: str, outcome: SpillOutcome) -> SpillOutcome:
    """Writes the commit of a work unit; its rows must be written before."""
    storage.write_json(step_uri(plan, step, outcome.index, "json"), asdict(outcome))
    return outcome


def spill_inputs(num_units: int, outcomes: Sequence[SpillOutcome]) -> list[SpillInput]:
    """The inputs of the next step's work units, from the outcomes of the step before."""
    inputs: list[dict[int, list[int]]] = [{} for _ in range(num_units)]
    for outcome in outcomes:
        for unit, numbers in outcome.batches.items():
            inputs[unit][outcome.index] = numbers
    return [SpillInput(index=index, batches=batches) for index, batches in enumerate(inputs)]


def read_step(plan: IngestPlan, step: str, schema: pa.Schema, unit: SpillInput) -> pa.Table:
    """The rows that a step wrote for one work unit of the next step."""
    batches: list[pa.RecordBatch] = []
    for writer, numbers in sorted(unit.batches.items()):
        batches += read_spill(step_uri(plan, step, writer, "arrow"), numbers)
    return pa.Table.from_batches(batches, schema)
