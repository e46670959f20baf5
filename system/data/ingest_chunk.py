"""One chunk of raw files: read, shaped, normalised, and spilled by id bucket."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from system import storage
from system.config import SourceConfig
from system.data import sources
from system.data.benchmarks import benchmark_index
from system.data.conversation import Conversation, RowRejected, find_answer, normalise, split_of
from system.data.filters import run_filters
from system.data.formats import Format, choose_format
from system.data.ingest_plan import (
    REJECTED_SPILL,
    SPILL,
    ChunkOutcome,
    IngestPlan,
    PieceCount,
    bucket_of,
    chunk_uri,
)
from system.data.readers import Defect, Piece, read_numbers, read_rows
from system.data.spill import SpillWriter, spill_output
from system.errors import DataError
from system.schema import EMBEDDING, MESSAGES

_FLUSH_CHARS = 8 * 2**20
_FLUSH_ROWS = 65536
_FLUSH_REJECTED = 8192
_DETECTION_ROWS = 32
_SEARCHED_ROWS = 1000
_NUM_EXAMPLES = 3


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
        for piece in chunk.pieces:
            worker.read_piece(piece, chunk.max_rows)
        outcome = worker.finish(index)
    storage.write_json(chunk_uri(plan, index, "json"), asdict(outcome))
    return outcome


def detect_format(source: SourceConfig, piece: Piece) -> Format | None:
    """The shape of a file's rows, from its first ones; None where the file has no readable row.

    Depends on the file alone, so all pieces of a file come to the same answer.

    Raises:
        DataError: no known shape fits the rows.
    """
    if source.format != "auto":
        return choose_format(source, [], piece.uri)
    first: list[dict[str, Any]] = []
    defect: Defect | None = None
    whole = Piece(file=piece.file, uri=piece.uri, stamp=piece.stamp)
    for row, value in read_rows(whole):
        if isinstance(value, dict):
            first.append(value)
        else:
            defect = defect or value
        if len(first) == _DETECTION_ROWS:
            break
        if row >= _SEARCHED_ROWS and not first:
            raise DataError(
                f"{piece.uri}: expected rows, but none of the first {_SEARCHED_ROWS:,} can be "
                f"read; the first one: {defect.detail if defect else 'empty'}. Is it JSONL, a JSON "
                "array, CSV, Parquet or Arrow? A CSV file's name must end in .csv or .tsv."
            )
    return choose_format(source, first, piece.uri) if first else None


def check_unchanged(piece: Piece) -> None:
    """Makes sure that a file is still the one that the plan saw.

    Raises:
        DataError: it is not.
    """
    now = sources.stat(piece.uri)[1]
    if now != piece.stamp:
        raise DataError(
            f"{piece.uri}: the file changed while it was read (size and time were {piece.stamp}, "
            f"are {now}). Nothing of it was used; run again when it is complete."
        )


class _ChunkWorker:
    """The rows of one chunk on their way from the reader to the spill file."""

    def __init__(
        self, plan: IngestPlan, source: SourceConfig, rows: SpillWriter, rejected: SpillWriter
    ) -> None:
        self._settings = plan.settings
        self._labels = _Labels(source)
        self._benchmarks = (
            benchmark_index(plan.benchmark_uris, plan.settings.benchmark_ngram)
            if plan.benchmark_uris
            else None
        )
        self._source = source
        self._filters = plan.filters
        self._rows = rows
        self._rejected = rejected
        self._held = _HeldRows(sources.source_name(source), plan.num_buckets)
        self._held_rejected: list[tuple[int, int, int, str, str]] = []
        self._read = 0
        self._kept = 0
        self._reasons: Counter[str] = Counter()
        self._examples: list[tuple[int, int, int, str, str]] = []
        self._pieces: list[PieceCount] = []

    def read_piece(self, piece: Piece, max_rows: int | None) -> None:
        """Reads one piece to its end, or until the chunk has `max_rows` rows."""
        shape = detect_format(self._source, piece)
        labels = self._labels
        labels.open_file(piece.uri)
        last = -1
        for row, value in read_numbers(piece):
            last = row
            if value is None:
                continue
            if max_rows is not None and self._read >= max_rows:
                break
            self._read += 1
            try:
                if isinstance(value, Defect):
                    raise RowRejected(value.reason, value.detail)
                assert shape is not None, "a file with a readable row has a shape"
                conversation = normalise(shape.turns(value), self._settings.max_chars)
                self._keep(piece, row, conversation, labels.of(value, conversation))
            except RowRejected as why:
                self._reject(piece, row, why)
        self._pieces.append(PieceCount(file=piece.file, start=piece.start, numbers=last + 1))
        check_unchanged(piece)

    def _keep(
        self, piece: Piece, row: int, conversation: Conversation, labelled: tuple[Any, ...]
    ) -> None:
        settings = self._settings
        split = split_of(conversation.prompt_hash, settings.estimate_share, settings.test_share)
        if self._benchmarks is not None and split == 0:
            found = self._benchmarks.find(conversation.contents)
            if found is not None:
                raise RowRejected("benchmark-overlap", found)
        self._kept += 1
        held = self._held
        held.add(conversation, labelled, (split, piece.file, piece.start, row))
        if held.num_chars >= _FLUSH_CHARS or held.num_rows >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Writes the rows held, without those that a filter rejects."""
        rows, buckets = self._held.take()
        if self._filters and rows.num_rows:
            kept = np.ones(rows.num_rows, bool)
            for place, reason, name in run_filters(self._filters, rows):
                kept[place] = False
                file, start, row = (rows[key][place].as_py() for key in ("file", "start", "place"))
                self._note_rejected((file, start, row, reason, f"rejected by {name}"))
            self._kept -= int((~kept).sum())
            rows, buckets = rows.filter(pa.array(kept)), buckets[kept]
        self._rows.add(rows, buckets)

    def _reject(self, piece: Piece, row: int, why: RowRejected) -> None:
        detail = why.detail[:500].encode("utf-8", "replace").decode()
        self._note_rejected((piece.file, piece.start, row, why.reason, detail))
        if len(self._held_rejected) >= _FLUSH_REJECTED:
            self._flush_rejected()

    def _note_rejected(self, rejected: tuple[int, int, int, str, str]) -> None:
        self._reasons[rejected[3]] += 1
        if len(self._examples) < _NUM_EXAMPLES:
            self._examples.append(rejected)
        self._held_rejected.append(rejected)

    def _flush_rejected(self) -> None:
        if self._filters:
            # Filters speak later than the reader, but rejected rows are listed in file order.
            self._flush()
            self._held_rejected.sort(key=lambda rejected: rejected[:3])
        if self._held_rejected:
            columns = zip(*self._held_rejected, strict=True)
            arrays = [pa.array(c, t) for c, t in zip(columns, REJECTED_SPILL.types, strict=True)]
            table = pa.table(arrays, schema=REJECTED_SPILL)
            self._rejected.add(table, np.zeros(table.num_rows, np.int64))
            self._held_rejected.clear()

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
            pieces=tuple(self._pieces),
            batches=self._rows.batches,
            rejected_batches=self._rejected.batches.get(0, []),
        )


class _Labels:
    """Category, verifiable answer and score of a row, as its source says."""

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        self._fixed: str | None = None
        self._is_plain = (
            source.category_column is None
            and source.answer_column is None
            and source.answer_pattern is None
            and source.score_column is None
            and source.embedding_column is None
        )

    def open_file(self, uri: str) -> None:
        """Takes what the file's path says.

        Raises:
            DataError: `category_pattern` does not match the path.
        """
        source = self._source
        self._fixed = source.category
        if source.category_pattern is not None:
            match = re.search(source.category_pattern, uri)
            if match is None:
                raise DataError(
                    f"{uri}: expected its path to match category_pattern "
                    f"{source.category_pattern!r}, which names its category; it does not. Correct "
                    "the pattern or narrow the source's path."
                )
            self._fixed = self._mapped(match["category"])

    def of(
        self, row: dict[str, Any], conversation: Conversation
    ) -> tuple[str | None, str | None, str | None, float | None, list[float] | None]:
        """Category, answer, answer pattern, score, embedding.

        Raises:
            RowRejected: a column holds something that cannot be meant.
        """
        if self._is_plain:
            return self._fixed, None, None, None, None
        source = self._source
        category = self._fixed
        if source.category_column is not None:
            category = self._mapped(_label(row, source.category_column))
        answer = None
        if source.answer_column is not None:
            answer = _label(row, source.answer_column)
        elif source.answer_pattern is not None:
            answer = find_answer(source.answer_pattern, conversation.contents[-1])
        pattern = source.answer_pattern if answer is not None else None
        vector = _vector(row, source.embedding_column)
        return category, answer, pattern, _score(row, source.score_column), vector

    def _mapped(self, category: str | None) -> str | None:
        if category is None:
            return None
        category = category.strip()
        return self._source.category_map.get(category, category) or None


def _label(row: dict[str, Any], column: str) -> str | None:
    """A short text from a column; None where it is missing or empty."""
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise RowRejected("missing-field", f"{column!r} holds a {type(value).__name__}, not text")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowRejected("bad-utf8", f"{column!r} holds half of a surrogate pair") from None
    return text or None


def _score(row: dict[str, Any], column: str | None) -> float | None:
    value = row.get(column) if column is not None else None
    if value is None or value == "":
        return None
    try:
        # One that is not finite stays as it is: stage `select` quarantines and counts the row.
        return float(value)
    except (TypeError, ValueError):
        raise RowRejected(
            "missing-field", f"{column!r} holds {value!r:.40}, not a number"
        ) from None


def _vector(row: dict[str, Any], column: str | None) -> list[float] | None:
    value = row.get(column) if column is not None else None
    if value is None:
        return None
    try:
        vector = [float(item) for item in value]
    except (TypeError, ValueError):
        vector = []
    if not vector or not all(math.isfinite(item) for item in vector):
        raise RowRejected("missing-field", f"{column!r} holds {value!r:.40}, not finite numbers")
    return vector


class _HeldRows:
    """Normalised rows, column by column, until there are enough to write."""

    def __init__(self, source: str, num_buckets: int) -> None:
        self._source = source
        self._num_buckets = num_buckets
        self._clear()

    def _clear(self) -> None:
        # Flat columns: a container for each row would keep the garbage collector busy.
        self.num_chars = 0
        self._ids: list[str] = []
        self._roles: list[str] = []
        self._contents: list[str] = []
        self._ends = array("q", [0])
        self._labels: list[Any] = []
        self._places = array("q")

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self._ids)

    def add(
        self,
        conversation: Conversation,
        labels: tuple[Any, ...],
        place: tuple[int, int, int, int],
    ) -> None:
        """Takes one row: labels in the order of `_Labels.of`, place as split, file, start, row."""
        self._ids.append(conversation.id)
        self._roles += conversation.roles
        self._contents += conversation.contents
        self._ends.append(len(self._roles))
        self._labels.extend(labels)
        self._places.extend(place)
        self.num_chars += conversation.num_chars + 4 * len(labels[4] or ())

    def take(self) -> tuple[pa.Table, np.ndarray]:
        """All rows as a SPILL table with each row's bucket; nothing is held afterwards."""
        if not self._ids:
            return SPILL.empty_table(), np.zeros(0, np.int64)
        buckets = bucket_of(self._ids, self._num_buckets)
        turns = pa.StructArray.from_arrays(
            [_strings(self._roles), _strings(self._contents)], fields=list(MESSAGES.value_type)
        )
        messages = pa.ListArray.from_arrays(
            pa.array(np.array(self._ends, np.int32)), turns, type=MESSAGES
        )
        category, answer, pattern, score, vector = (self._labels[k::5] for k in range(5))
        places = np.array(self._places, np.int64).reshape(-1, 4)
        columns = {
            "id": _strings(self._ids),
            "category": pa.array(category, pa.string()),
            "source": pa.repeat(pa.scalar(self._source, pa.string()), len(self._ids)),
            "messages": messages,
            "answer": pa.array(answer, pa.string()),
            "answer_pattern": pa.array(pattern, pa.string()),
            "score": pa.array(score, pa.float64()),
            "embedding": pa.array(vector, EMBEDDING),
            "split": pa.array(places[:, 0].astype(np.int8)),
            "file": pa.array(places[:, 1].astype(np.int32)),
            "start": pa.array(places[:, 2]),
            "place": pa.array(places[:, 3]),
        }
        self._clear()
        return pa.table(columns, schema=SPILL), buckets


def _strings(values: list[str]) -> pa.Array:
    return pa.array(values, pa.string())
