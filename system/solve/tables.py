"""Reads the files of ``instructmix solve``: matrices, the base table and the limits file."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from system.errors import DataError

LARGEST = 1e15
"""Largest size of a number in a table; products of larger ones would not fit float64."""
_BASE_NUMBERS = ("count", "supply", "importance", "lower", "upper", "cap", "tokens")
_BASE_COLUMNS = ("category", *_BASE_NUMBERS, "group")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixTable:
    """A [T, S] matrix with names; an empty cell is an entry that could not be measured."""

    path: str
    targets: tuple[str, ...]
    categories: tuple[str, ...]
    values_TS: np.ndarray
    """[T, S] values, zero where the cell is empty."""
    is_measured_TS: np.ndarray
    """[T, S] bool, read only."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BaseTable:
    """The categories with their counts and limits, from the columns that the file has."""

    path: str
    categories: tuple[str, ...]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """Column name -> [S] values, NaN for an empty cell; always contains ``count``."""
    groups: tuple[str | None, ...] | None = None


def read_matrix(path: str, base: BaseTable) -> MatrixTable:
    """Read a matrix table: target names in the first column, source names in the header.

    The file is ``.csv`` or ``.parquet``, or ``.npy`` with targets and sources both in the order of
    ``base``.

    Raises:
        DataError: the file is unreadable, a cell is not a number, or the shape does not match.
    """
    suffix = _suffix(path, (".csv", ".parquet", ".npy"))
    if suffix == ".npy":
        return _read_npy(path, base)
    header, rows = _read_csv(path) if suffix == ".csv" else _read_parquet(path)
    if len(header) < 2 or not rows:
        raise DataError(
            f"{path}: expected a table with a first column of target names and one column for each "
            f"source, found {len(header)} columns and {len(rows)} rows"
        )
    values = np.zeros((len(rows), len(header) - 1))
    measured = np.ones(values.shape, bool)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row[1:]):
            if cell is None or cell == "":
                measured[i, j] = False
            else:
                values[i, j] = _number(cell, path, i, str(row[0]), header[j + 1])
    return MatrixTable(
        path=path,
        targets=_distinct([str(row[0]) for row in rows], path, "target rows"),
        categories=_distinct(header[1:], path, "source columns"),
        values_TS=values,
        is_measured_TS=measured,
    )


def align(
    table: MatrixTable, targets: tuple[str, ...], categories: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of the table, reordered to ``targets`` and ``categories``.

    Raises:
        DataError: the names differ; the message lists missing and unknown ones.
    """
    for found, expected, what in (
        (table.targets, targets, "target rows"),
        (table.categories, categories, "source columns"),
    ):
        missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        if missing or unknown:
            raise DataError(
                f"{table.path}: the {what} must have the same names as the other tables; missing: "
                f"{missing[:8]}, unknown: {unknown[:8]}"
            )
    if table.targets == targets and table.categories == categories:
        return table.values_TS, table.is_measured_TS
    rows = np.array([table.targets.index(name) for name in targets])
    columns = np.array([table.categories.index(name) for name in categories])
    where = np.ix_(rows, columns)
    return table.values_TS[where], table.is_measured_TS[where]


def read_base(path: str) -> BaseTable:
    """Read ``category,count[,supply,importance,lower,upper,cap,tokens,group]``, CSV or Parquet.

    Raises:
        DataError: a column is missing or unknown, a name occurs twice, or a cell is not a number.
    """
    suffix = _suffix(path, (".csv", ".parquet"))
    header, rows = _read_csv(path) if suffix == ".csv" else _read_parquet(path)
    unknown = [name for name in header if name not in _BASE_COLUMNS]
    missing = [name for name in ("category", "count") if name not in header]
    if unknown or missing or len(set(header)) != len(header):
        raise DataError(
            f"{path}: expected the columns category,count and any of "
            f"{','.join(_BASE_COLUMNS[2:])}; found {','.join(header)}"
        )
    if not rows:
        raise DataError(f"{path}: expected one row for each category, found none")
    column = {name: k for k, name in enumerate(header)}
    names = [_cell(row[column["category"]]) for row in rows]
    # An empty cell is NaN here: what it means depends on the column, and `request.py` decides.
    numbers = {}
    for name in _BASE_NUMBERS:
        if name in column:
            numbers[name] = np.array(
                [
                    np.nan
                    if _cell(row[column[name]]) == ""
                    else _number(row[column[name]], path, i, names[i], name)
                    for i, row in enumerate(rows)
                ]
            )
    for i in np.flatnonzero(np.isnan(numbers["count"]))[:1]:
        raise DataError(
            f"{path}: expected a count for category {names[i]!r}, found an empty cell; use 0 if it "
            "has no examples"
        )
    groups = None
    if "group" in column:
        groups = tuple(_cell(row[column["group"]]) or None for row in rows)
    return BaseTable(
        path=path,
        categories=_distinct(names, path, "categories"),
        numbers=numbers,
        groups=groups,
    )


def read_limits(path: str) -> dict[str, Any]:
    """Read the limits file (YAML) as a mapping; ``request.py`` interprets it.

    Raises:
        DataError: the file is unreadable or is not a mapping.
    """
    from system.yaml_text import parse_yaml

    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected keys such as 'groups:' and 'categories:', found "
            f"{type(content).__name__}"
        )
    return content


def _suffix(path: str, allowed: tuple[str, ...]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise DataError(f"{path}: expected a file name ending in {', '.join(allowed)}")
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    return suffix


def _read_npy(path: str, base: BaseTable) -> MatrixTable:
    try:
        # Memory-mapped: the matrix of ten thousand categories takes 800 MB.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array: {error}") from error
    S = len(base.categories)
    if values.shape != (S, S) or values.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: a .npy matrix has no names, so it must be a number for each of the {S} x {S} "
            f"pairs of {base.path}, in its order; found {values.dtype} of shape {values.shape}; "
            "use .csv or .parquet for other targets"
        )
    return MatrixTable(
        path=path,
        targets=base.categories,
        categories=base.categories,
        values_TS=values,
        # A broadcast view: every entry is True, and only one is stored.
        is_measured_TS=np.broadcast_to(np.True_, values.shape),
    )


def _read_csv(path: str) -> tuple[list[str], list[list[Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error
    if not lines:
        raise DataError(f"{path}: expected a table with a header, found an empty file")
    header = [cell.strip() for cell in lines[0]]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DataError(
                f"{path}: the header has {len(header)} columns but table row {number} has "
                f"{len(line)}: {','.join(line)[:80]}"
            )
    return header, [[cell.strip() for cell in line] for line in lines[1:]]


def _read_parquet(path: str) -> tuple[list[str], list[list[Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from system.foreign_tables import checked_table

    try:
        table = checked_table(pq.read_table(path))
        columns = [table.column(k).to_pylist() for k in range(table.num_columns)]
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    return list(table.column_names), [list(row) for row in zip(*columns, strict=True)]


def _cell(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _number(cell: Any, path: str, row: int, name: str, column: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not abs(value) <= LARGEST:
        raise DataError(
            f"{path}: expected a finite number in column {column!r} of row {name!r} (table row "
            f"{row + 2}), of at most {LARGEST:g}, found {cell!r:.100}; leave the cell empty if it "
            "could not be measured"
        )
    return value


def _distinct(names: list[str], path: str, what: str) -> tuple[str, ...]:
    if len(set(names)) != len(names) or not all(names):
        twice = next((n for n in names if not n or names.count(n) > 1), "")
        raise DataError(f"{path}: the {what} must have different names, found {twice!r} again")
    return tuple(names)
