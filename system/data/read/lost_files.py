"""Stops an ingest when no row of a file can be used.

Without this check such a file would go unnoticed behind the rows of the other files: the limit on
rejected rows counts all files together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from system.data.ingest.plan import ChunkOutcome, IngestPlan
from system.data.read.readers import FileRange, file_kind, read_rows
from system.errors import DataError

_NUM_NAMED = 3


def check_lost_files(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> None:
    """Stops an ingest that can use none of the rows of some file.

    A row that is a duplicate, or that a benchmark or a filter removes, counts as usable here: these
    may rightly remove all rows of a file.

    Raises:
        DataError: there is such a file, and `ingest.unusable_files` is `error`.
    """
    if plan.settings.unusable_files == "count":
        return
    read: dict[int, int] = {}
    first: dict[int, str] = {}
    usable: set[int] = set()
    for file_range in (file_range for outcome in outcomes for file_range in outcome.ranges):
        read[file_range.file] = read.get(file_range.file, 0) + file_range.read
        if file_range.usable:
            usable.add(file_range.file)
        # Only the start of a file can say why its first row was rejected.
        if file_range.start == 0:
            first[file_range.file] = file_range.first_rejected
    lost = sorted(file for file, rows in read.items() if rows and file not in usable)
    if not lost:
        return
    named = "; ".join(_description(plan, file, read[file], first) for file in lost[:_NUM_NAMED])
    more = f"; and {len(lost) - _NUM_NAMED} more files" if len(lost) > _NUM_NAMED else ""
    raise DataError(
        f"expected usable rows in every file, found none in {len(lost)} of {len(plan.files)} "
        f"files; every row was rejected: {named}{more}. Correct the files or the source's "
        "`format`, leave the files out with a narrower `path`, or set ingest.unusable_files: "
        "count, which counts and lists their rows among the rejected ones."
    )


def _description(plan: IngestPlan, file: int, num_rows: int, first: dict[int, str]) -> str:
    uri = plan.files[file].uri
    rows = "its only row" if num_rows == 1 else f"all {num_rows:,} rows"
    why = f", the first one {first[file]}" if first.get(file) else ""
    return f"{uri} ({', '.join([rows + why, *_list_inside(plan, file, num_rows)])})"


def _list_inside(plan: IngestPlan, file: int, num_rows: int) -> Iterator[str]:
    """A hint for a file that is one object with a list of objects in it, perhaps the rows."""
    source = plan.files[file]
    if num_rows > 1 or file_kind(source.uri).name not in ("lines", "values"):
        return
    file_range = FileRange(file=file, uri=source.uri, stamp=source.stamp)
    row = next((value for _, value in read_rows(file_range)), None)
    if not isinstance(row, dict):
        return
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield (
                f"which holds a list of {len(value):,} objects under {key!r}; if they are the "
                f"rows, write one a line: jq -c '.[{json.dumps(key)}][]'"
            )
