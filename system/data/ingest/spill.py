"""Rows on their way from many producers to many consumers: one file a producer, by bucket.

A producer adds tables with a bucket number for each row; they are written, bucket by bucket, as
record batches of one Arrow IPC file.  `batches` tells which batch belongs to which bucket, so a
consumer reads just its own batches of every producer's file, and the number of files stays the
number of producers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from system import storage


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
    """A spill file that appears only when the block ends well."""
    with storage.atomic_output(uri) as file:
        writer = SpillWriter(file, schema)
        yield writer
        writer.close()


def read_spill(uri: str, numbers: Sequence[int]) -> list[pa.RecordBatch]:
    """The record batches with these numbers of one producer."""
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
