"""Filters that the user writes: they reject rows for personal data, safety, licences and so on.

A filter is a function `module:function` in `ingest.filters`.  It gets rows as an Arrow table (`id`,
`category`, `source`, `messages`, `answer`, `score`) and returns one value a row: None keeps the
row, a short name such as `email-address` rejects it under that reason.  Rows come in tables of any
size, so a filter must judge each row by itself; then nothing depends on how the input was cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from system.functions import UserFunction

FILTER_COLUMNS = ("id", "category", "source", "messages", "answer", "score")
"""Columns of the table that a filter gets."""

_REASON = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def run_filters(filters: Sequence[UserFunction], rows: pa.Table) -> list[tuple[int, str, str]]:
    """The rows that a filter rejects: place in the table, reason, the filter's name.

    The first filter that rejects a row gives the reason; later ones still see the row.

    Raises:
        ConfigError: a filter fails, or returns something else than one answer a row.
    """
    rejected: dict[int, tuple[str, str]] = {}
    shown = rows.select(list(FILTER_COLUMNS))
    for item in filters:
        for place, reason in enumerate(_answers(item, shown)):
            if reason is not None:
                rejected.setdefault(place, (reason, item.name))
    return [(place, *rejected[place]) for place in sorted(rejected)]


def _answers(item: UserFunction, rows: pa.Table) -> list[str | None]:
    function = item.load()
    first = rows["id"][0].as_py()
    try:
        returned = function(rows)
    except Exception as error:
        raise item.failed(
            f"raised {type(error).__name__}: {error} (on {rows.num_rows:,} rows from id {first})"
        ) from error
    is_arrow = isinstance(returned, pa.Array | pa.ChunkedArray)
    answers = returned.to_pylist() if is_arrow else returned
    if not isinstance(answers, list | tuple) or len(answers) != rows.num_rows:
        size = f"{len(answers):,} values" if isinstance(answers, list | tuple) else type(answers)
        raise item.failed(
            f"expected a list of {rows.num_rows:,} answers, one a row, found {size}; return None "
            "for a row to keep and a short reason for one to reject"
        )
    for answer in answers:
        if answer is not None and not (isinstance(answer, str) and _REASON.fullmatch(answer)):
            raise item.failed(
                f"expected None or a reason of lower-case letters, digits and hyphens, found "
                f"{answer!r:.60}"
            )
    return list(answers)
