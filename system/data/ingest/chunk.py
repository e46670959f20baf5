"""The first step of ingest, for one chunk: rows from raw files to a spill file, sorted by bucket.

Each batch of rows is read, brought into its normal form, labelled and split; rejected rows go into
a spill file of their own with the reason.  `actors.ingestor` calls `ingest_chunk` in its actors;
`bucket.py` reads the spill files and removes duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from system import storage
from system.config import SourceConfig
from system.data.ingest.plan import (
    REJECTED_SPILL,
    SPILL,
    ChunkOutcome,
    IngestPlan,
    RangeCount,
    chunk_uri,
)
from system.data.ingest.spill import SpillWriter, spill_output
from system.data.read import sources
from system.data.read.raw_rows import Defect, RawRow
from system.data.read.readers import FileRange, read_batches, read_rows
from system.data.row_buffer import RowBuffer
from system.data.rows.benchmarks import benchmark_index
from system.data.rows.columns import SeenColumns
from system.data.rows.conversation import RowRejected, Turn
from system.data.rows.filters import run_filters
from system.data.rows.formats import Format, choose_format
from system.data.rows.labels import LabelColumns, Labels
from system.data.rows.normal_batch import NormalBatch, normalise_batch, splits_of
from system.errors import DataError, printable

_FLUSH_BYTES = 32 * 2**20
"""Text that is written at once, a record batch for each bucket: much of a chunk, since a batch has
a cost of its own and there are as many of them as flushes times buckets."""
_FLUSH_ROWS = 2**19
_FLUSH_REJECTED = 8192
_DETECTION_ROWS = 32
_SEARCHED_ROWS = 1000
_NUM_EXAMPLES = 3
_DETAIL_CHARS = 500
_FIRST_DETAIL_CHARS = 200


def ingest_chunk(plan: IngestPlan, index: int) -> ChunkOutcome:
    """Reads, normalises and spills the rows of one chunk, then commits it.

    Raises:
        DataError: a file is damaged, of unknown format, or changed since the run was planned.
    """
    chunk = plan.chunks[index]
    with (
        spill_output(chunk_uri(plan, index, "arrow"), SPILL) as rows,
        spill_output(chunk_uri(plan, index, "rejected.arrow"), REJECTED_SPILL) as rejected,
    ):
        worker = _ChunkWorker(plan, plan.sources[chunk.source], rows, rejected)
        for file_range in chunk.ranges:
            worker.read_range(file_range, chunk.max_rows)
        outcome = worker.finish(index)
    storage.write_json(chunk_uri(plan, index, "json"), asdict(outcome))
    return outcome


def detect_format(source: SourceConfig, file_range: FileRange) -> Format | None:
    """The shape of a file's rows, from its first ones; None where the file has no readable row.

    Depends on the file alone, so all ranges of a file come to the same answer.

    Raises:
        DataError: no known shape fits the rows.
    """
    if source.format != "auto":
        return choose_format(source, [], file_range.uri)
    first: list[dict[str, Any]] = []
    defect: Defect | None = None
    whole = FileRange(file=file_range.file, uri=file_range.uri, stamp=file_range.stamp)
    for row, value in read_rows(whole):
        if isinstance(value, dict):
            first.append(value)
        else:
            defect = defect or value
        if len(first) == _DETECTION_ROWS:
            break
        if row >= _SEARCHED_ROWS and not first:
            raise DataError(
                f"{file_range.uri}: expected rows, but none of the first {_SEARCHED_ROWS:,} can be "
                f"read; the first one: {defect.detail if defect else 'empty'}. Is it JSONL, a JSON "
                "array, CSV, Parquet or Arrow? A CSV file's name must end in .csv or .tsv."
            )
    return choose_format(source, first, file_range.uri) if first else None


def check_unchanged(file_range: FileRange) -> None:
    """Makes sure that a file is still the one that the plan saw.

    Raises:
        DataError: it is not.
    """
    now = sources.stat(file_range.uri)[1]
    if now != file_range.stamp:
        raise DataError(
            f"{file_range.uri}: the file changed while it was read (size and time were "
            f"{file_range.stamp}, are {now}). Nothing of it was used; run again when it is "
            "complete."
        )


def _first_rows(values: Sequence[RawRow], num_rows: int) -> Sequence[RawRow]:
    """As many values as hold so many rows: those before the next row."""
    for place, value in enumerate(values):
        if value is not None:
            num_rows -= 1
            if num_rows < 0:
                return values[:place]
    return values


def _writable(text: str, max_chars: int) -> str:
    """The beginning of a text, without what UTF-8 cannot hold or a terminal would obey."""
    return printable(text[:max_chars].encode("utf-8", "replace").decode())


class _ChunkWorker:
    """The rows of one chunk on their way from the reader to the spill file."""

    def __init__(
        self, plan: IngestPlan, source: SourceConfig, rows: SpillWriter, rejected: SpillWriter
    ) -> None:
        self._settings = plan.settings
        self._labels = Labels(source)
        self._seen = SeenColumns(source)
        self._benchmarks = (
            benchmark_index(plan.benchmark_uris, plan.settings.benchmark_ngram)
            if plan.benchmark_uris
            else None
        )
        self._source = source
        self._filters = plan.filters
        self._rows = rows
        self._rejected = rejected
        self._buffer = RowBuffer(sources.source_name(source), plan.num_buckets)
        self._pending_rejected: list[tuple[int, int, int, str, str]] = []
        self._read = 0
        self._kept = 0
        self._reasons: Counter[str] = Counter()
        self._examples: list[tuple[int, int, int, str, str]] = []
        self._ranges: list[RangeCount] = []
        self._usable = 0
        self._first_rejected = ""
        self._without_reasoning = 0

    def read_range(self, file_range: FileRange, max_rows: int | None) -> None:
        """Reads one file range to its end, or until the chunk has `max_rows` rows."""
        shape = detect_format(self._source, file_range)
        self._labels.open_file(file_range.uri)
        num_numbers, num_before = 0, self._read
        self._usable, self._first_rejected = 0, ""
        for values in read_batches(file_range):
            if max_rows is not None:
                values = _first_rows(values, max_rows - self._read)
            self._add_rows(file_range, num_numbers, values, shape)
            num_numbers += len(values)
            if max_rows is not None and self._read >= max_rows:
                break
        self._ranges.append(
            RangeCount(
                file=file_range.file,
                start=file_range.start,
                numbers=num_numbers,
                read=self._read - num_before,
                usable=self._usable,
                first_rejected=self._first_rejected,
            )
        )
        check_unchanged(file_range)

    def _add_rows(
        self, file_range: FileRange, first: int, values: Sequence[RawRow], shape: Format | None
    ) -> None:
        """Adds a batch of rows; the first of them has the number `first` in its file range."""
        self._read += len(values) - values.count(None)
        self._seen.see(values)

        def turns_of(row: dict[str, Any]) -> list[Turn]:
            assert shape is not None, "a file with a readable row has a shape"
            return shape.turns(row)

        batch = normalise_batch(
            values,
            turns_of,
            self._settings.max_chars,
            keep_reasoning=self._settings.reasoning == "keep",
        )
        self._without_reasoning += batch.num_without_reasoning
        # Labels are read from the raw rows: the normal form holds the conversation alone.
        labels, bad = self._labels.of(
            [values[place] for place in batch.places],  # type: ignore[misc]
            batch.responses() if self._labels.need_response else (),
        )
        self._note_usable(batch, bad)
        settings = self._settings
        splits = splits_of(batch.prompts, settings.estimate_share, settings.test_share)
        # The split comes first, because only train rows may not overlap with a benchmark.
        if self._benchmarks is not None:
            bad += self._overlapping(batch, splits, dict(bad))
        rejected = batch.rejected + [(batch.places[row], why) for row, why in bad]
        if bad:
            bad_rows = {row for row, _ in bad}
            good = [row for row in range(len(batch.places)) if row not in bad_rows]
            batch, labels, splits = batch.keep(good), labels.keep(good), splits[good]
        # In file order, whichever check rejected a row: the list must not depend on the batches.
        for place, why in sorted(rejected, key=lambda item: item[0]):
            self._reject(file_range, first + place, why)
        places = np.empty((len(splits), 4), np.int64)
        places[:, 0], places[:, 1], places[:, 2] = splits, file_range.file, file_range.start
        places[:, 3] = np.array(batch.places, np.int64) + first
        self._kept += len(places)
        self._buffer_rows(batch, labels, places)
        # Last, because the user's filters may still reject rows that were just buffered.
        if len(self._pending_rejected) >= _FLUSH_REJECTED:
            self._flush_rejected()

    def _note_usable(self, batch: NormalBatch, bad: Sequence[tuple[int, RowRejected]]) -> None:
        self._usable += len(batch.places) - len(bad)
        rejected = batch.rejected + [(batch.places[row], why) for row, why in bad]
        if rejected and not self._first_rejected:
            _, why = min(rejected, key=lambda item: item[0])
            self._first_rejected = f"{why.reason}: {_writable(why.detail, _FIRST_DETAIL_CHARS)}"

    def _overlapping(
        self, batch: NormalBatch, splits: np.ndarray, wrong: Mapping[int, RowRejected]
    ) -> list[tuple[int, RowRejected]]:
        """Train rows that share a run of words with a benchmark."""
        assert self._benchmarks is not None
        rows = [row for row in np.flatnonzero(splits == 0).tolist() if row not in wrong]
        overlaps = self._benchmarks.find(batch.texts_of(rows))
        return [
            (rows[k], RowRejected("benchmark-overlap", overlap)) for k, overlap in overlaps.items()
        ]

    def _buffer_rows(self, batch: NormalBatch, labels: LabelColumns, places: np.ndarray) -> None:
        if batch.num_bytes > _FLUSH_BYTES and len(places) > 1:
            middle = len(places) // 2
            for rows in (range(middle), range(middle, len(places))):
                self._buffer_rows(
                    batch.keep(rows), labels.keep(rows), places[rows.start : rows.stop]
                )
            return
        self._buffer.add(batch, labels, places)
        if self._buffer.num_bytes >= _FLUSH_BYTES or self._buffer.num_rows >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Writes the rows held, without those that a filter rejects."""
        rows, buckets = self._buffer.take()
        if self._filters and rows.num_rows:
            kept = np.ones(rows.num_rows, bool)
            for place, reason, name in run_filters(self._filters, rows):
                kept[place] = False
                file, start, row = (rows[key][place].as_py() for key in ("file", "start", "place"))
                self._note_rejected((file, start, row, reason, f"rejected by {name}"))
            self._kept -= int((~kept).sum())
            rows, buckets = rows.filter(pa.array(kept)), buckets[kept]
        self._rows.add(rows, buckets)

    def _reject(self, file_range: FileRange, row: int, why: RowRejected) -> None:
        detail = _writable(why.detail, _DETAIL_CHARS)
        self._note_rejected((file_range.file, file_range.start, row, why.reason, detail))

    def _note_rejected(self, rejected: tuple[int, int, int, str, str]) -> None:
        self._reasons[rejected[3]] += 1
        if len(self._examples) < _NUM_EXAMPLES:
            self._examples.append(rejected)
        self._pending_rejected.append(rejected)

    def _flush_rejected(self) -> None:
        if self._filters:
            # Filters speak later than the reader, but rejected rows are listed in file order.
            self._flush()
            self._pending_rejected.sort(key=lambda rejected: rejected[:3])
        if self._pending_rejected:
            columns = zip(*self._pending_rejected, strict=True)
            arrays = [pa.array(c, t) for c, t in zip(columns, REJECTED_SPILL.types, strict=True)]
            table = pa.table(arrays, schema=REJECTED_SPILL)
            self._rejected.add(table, np.zeros(table.num_rows, np.int64))
            self._pending_rejected.clear()

    def finish(self, index: int) -> ChunkOutcome:
        """Writes what is still held."""
        self._flush()
        self._flush_rejected()
        return ChunkOutcome(
            index=index,
            read=self._read,
            kept=self._kept,
            rejected=dict(sorted(self._reasons.items())),
            examples=tuple(self._examples),
            ranges=tuple(self._ranges),
            batches=self._rows.batches,
            rejected_batches=self._rejected.batches.get(0, []),
            without_reasoning=self._without_reasoning,
            columns=tuple(sorted(_writable(name, _DETAIL_CHARS) for name in self._seen.names)),
            absent=tuple(sorted(self._seen.absent)),
        )
