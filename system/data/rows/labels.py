"""The labels of rows: category, verifiable answer, score and embedding, as the source says."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from system.config import SourceConfig
from system.config.data import name_of
from system.data.rows.conversation import RowRejected, check_combining, find_answer
from system.errors import DataError
from system.patterns import compile_pattern, encodable

_MAX_CACHED = 10_000
_UNTYPED = re.compile(r"\.[ct]sv(\.\w+)?$")
_WHOLE = re.compile(r"-?\d+\.0+")
_MAX_FLOAT32 = 3.4028235e38


class LabelColumns(NamedTuple):
    """Labels of many rows, one list for each label; a rejected row has None in all of them."""

    category: list[str | None]
    answer: list[str | None]
    answer_pattern: list[str | None]
    score: list[float | None]
    embedding: list[list[float] | None]

    def keep(self, rows: Sequence[int]) -> LabelColumns:
        """Those of the rows with these numbers."""
        columns: list[list[Any]] = list(self)
        return LabelColumns(*([column[row] for row in rows] for column in columns))


class Labels:
    """Category, verifiable answer, score and embedding of rows, as their source says."""

    def __init__(self, source: SourceConfig) -> None:
        assert isinstance(source.category_map, dict), "the plan has read the map"
        self._source = source
        self._names = source.category_map
        self._fixed: str | None = None
        self._cached: dict[str, str | None] = {}
        self._is_untyped = False
        """Whether the file knows no numbers, so that text which looks like one is one."""
        self._is_plain = (
            source.answer_column is None
            and source.answer_pattern is None
            and source.score_column is None
            and source.embedding_column is None
        )

    @property
    def need_response(self) -> bool:
        """Whether `of` looks at the responses."""
        return self._source.answer_pattern is not None and self._source.answer_column is None

    def open_file(self, uri: str) -> None:
        """Reads the category from the path of the next file, if `category_pattern` is set.

        Raises:
            DataError: `category_pattern` does not match the path, or finds an unknown category.
        """
        source = self._source
        self._is_untyped = bool(_UNTYPED.search(uri.lower()))
        self._cached.clear()
        self._fixed = source.category
        if source.category_pattern is not None:
            match = compile_pattern(source.category_pattern).search(encodable(uri))
            if match is None:
                raise DataError(
                    f"{uri}: expected its path to match category_pattern "
                    f"{source.category_pattern!r}, which names its category; it does not. Correct "
                    "the pattern or narrow the source's path."
                )
            try:
                self._fixed = self._mapped(match["category"])
            except RowRejected as why:
                raise DataError(f"{uri}: {why.detail}, which is what its path names") from None

    def of(
        self, rows: Sequence[dict[str, Any]], responses: Sequence[bytes]
    ) -> tuple[LabelColumns, list[tuple[int, RowRejected]]]:
        """Labels of the rows, and the rows whose label columns hold an unusable value.

        Args:
            rows: raw.
            responses: the last turn of each; may be left out where `need_response` is false.
        """
        columns = LabelColumns([], [], [], [], [])
        rejected: list[tuple[int, RowRejected]] = []
        nothing: list[Any] = [None] * len(rows)
        if self._is_plain and self._source.category_column is None:
            return LabelColumns([self._fixed] * len(rows), *(nothing,) * 4), rejected
        for number, row in enumerate(rows):
            try:
                columns.category.append(self._category(row))
                if not self._is_plain:
                    _append(columns, self._others(row, responses[number] if responses else b""))
            except RowRejected as why:
                rejected.append((number, why))
                _fill(columns, number + 1)
        if self._is_plain:
            columns = LabelColumns(columns.category, *(nothing,) * 4)
        return columns, rejected

    def _category(self, row: dict[str, Any]) -> str | None:
        column = self._source.category_column
        if column is None:
            return self._fixed
        value = row.get(column)
        if type(value) is not str:
            return self._mapped(_label(row, column))
        if value not in self._cached:
            category = self._mapped(_label(row, column))
            if len(self._cached) >= _MAX_CACHED:
                return category
            self._cached[value] = category
        return self._cached[value]

    def _others(
        self, row: dict[str, Any], response: bytes
    ) -> tuple[str | None, str | None, float | None, list[float] | None]:
        source = self._source
        answer = None
        if source.answer_column is not None:
            answer = _label(row, source.answer_column)
        elif source.answer_pattern is not None:
            answer = find_answer(source.answer_pattern, response.decode())
        pattern = source.answer_pattern if answer is not None else None
        vector = _vector(row, source.embedding_column)
        return answer, pattern, _score(row, source.score_column), vector

    def _mapped(self, category: str | None) -> str | None:
        if category is None:
            return None
        category = category.strip()
        if self._is_untyped and _WHOLE.fullmatch(category):
            category = category.partition(".")[0]
        renamed = self._names.get(category)
        is_unmapped = renamed is None and category and self._names
        if is_unmapped and self._source.category_unmapped != "keep":
            if self._source.category_unmapped == "untagged":
                return None
            raise RowRejected("unknown-category", f"category_map does not have {category!r}")
        return (category if renamed is None else renamed) or None


def _append(columns: LabelColumns, values: tuple[Any, ...]) -> None:
    column: list[Any]
    for column, value in zip(columns[1:], values, strict=True):
        column.append(value)


def _fill(columns: LabelColumns, length: int) -> None:
    column: list[Any]
    for column in columns:
        del column[length - 1 :]
        column.append(None)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _label(row: dict[str, Any], column: str) -> str | None:
    """A short text from a column; None where it is missing or empty."""
    value = row.get(column)
    if _is_missing(value):
        return None
    if not isinstance(value, str | int | float | Decimal):
        raise RowRejected("missing-field", f"{column!r} holds a {type(value).__name__}, not text")
    if isinstance(value, float) and math.isinf(value):
        raise RowRejected("missing-field", f"{column!r} holds {value}, not text")
    text = f"{value.normalize():f}" if isinstance(value, Decimal) else name_of(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowRejected("bad-utf8", f"{column!r} holds half of a surrogate pair") from None
    check_combining(text)
    return text or None


def _score(row: dict[str, Any], column: str | None) -> float | None:
    value = row.get(column) if column is not None else None
    if value is None or value == "":
        return None
    try:
        # An infinite one stays as it is: stage `select` quarantines and counts the row.
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowRejected(
            "missing-field", f"{column!r} holds {reprlib.repr(value)}, not a number"
        ) from None
    return None if math.isnan(score) else score


def _vector(row: dict[str, Any], column: str | None) -> list[float] | None:
    value = row.get(column) if column is not None else None
    if _is_missing(value):
        return None
    try:
        vector = [float(item) for item in value] if isinstance(value, list) else []
    except (TypeError, ValueError, OverflowError):
        vector = []
    if not vector or not all(abs(item) <= _MAX_FLOAT32 for item in vector):
        raise RowRejected(
            "missing-field", f"{column!r} holds {reprlib.repr(value)}, not a list of finite numbers"
        )
    return vector
