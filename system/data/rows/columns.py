"""Columns that the configuration names and no row has.

Without this check such a name goes unnoticed: every row counts as a row without that label.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from system.config import SourceConfig
from system.errors import ConfigError

_NUM_NAMES = 100
_KEYS = ("category_column", "answer_column", "score_column", "embedding_column")


class SeenColumns:
    """Which columns the rows of a source have, as far as the configuration names them."""

    def __init__(self, source: SourceConfig) -> None:
        self.absent = set(named_columns(source).values())
        """Columns that the configuration names and that no row had so far."""
        self.names: set[str] = set()
        """Some of the columns that the rows have, for messages."""

    def see(self, rows: Iterable[Any]) -> None:
        """Takes note of the columns of these rows; what is no dict is no row."""
        if not self.absent and self.names:
            return
        for row in rows:
            if not isinstance(row, dict):
                continue
            self.absent -= row.keys()
            if len(self.names) < _NUM_NAMES:
                self.names.update(itertools.islice(row, _NUM_NAMES))
            if not self.absent:
                return


def named_columns(source: SourceConfig) -> dict[str, str]:
    """Key of the source's configuration -> column that it names."""
    columns = {key: getattr(source, key) for key in _KEYS}
    if source.format == "columns":
        columns |= {f"columns.{key}": column for key, column in source.columns.items()}
    return {key: column for key, column in columns.items() if column is not None}


def check_columns(
    where: str, source: SourceConfig, parts: Sequence[tuple[Collection[str], Collection[str]]]
) -> None:
    """Makes sure that some row has each column that the configuration names.

    Args:
        where: the source, for the message.
        source: its configuration.
        parts: `names` and `absent` of `SeenColumns` for each part of the source.

    Raises:
        ConfigError: no row has one of the columns.
    """
    # A part without rows says nothing.
    parts = [part for part in parts if part[0]]
    names = sorted({name for part_names, _ in parts for name in part_names})[:_NUM_NAMES]
    for key, column in named_columns(source).items():
        if not parts or not all(column in absent for _, absent in parts):
            continue
        by_folded = {name.casefold(): name for name in names}
        near = difflib.get_close_matches(column.casefold(), by_folded, n=1)
        hint = f" Did you mean {by_folded[near[0]]!r}?" if near else ""
        raise ConfigError(
            f"{where}: expected {key} to name a column that some row has, found that no row has "
            f"{column!r}. The rows have {', '.join(map(repr, names))}.{hint} Correct {key} of this "
            "source."
        )
