"""Files of which nothing would be used: they would go unseen behind the others' rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from system.data.ingest.plan import ChunkOutcome, IngestPlan
from system.data.read.readers import FileRange, file_kind, read_rows
from system.errors import DataError

_NUM_NAMED = 3


def check_lost_files(plan: IngestPlan, outcomes: Sequence[ChunkOutcome]) -> None:
    """Stops an ingest that can use no row of a file which has rows.

    Rows count as usable here before anything is known of duplicates, benchmarks and filters: those
    may well take all of them.

    Raises:
        DataError: such a file, and `ingest.unusable_files` is `error`.
    """
    if plan.settings.unusable_files == "count":
        return
    read: dict[int, int] = {}
    first: dict[int, str] = {}
    usable: set[int] = set()
    for file_range in (file_range for outcome in outcomes for file_range in outcome.pieces):
        read[file_range.file] = read.get(file_range.file, 0) + file_range.read
        if file_range.usable:
            usable.add(file_range.file)
        if file_range.start == 0:
            first[file_range.file] = file_range.first_rejected
    lost = sorted(file for file, rows in read.items() if rows and file not in usable)
    if not lost:
        return
    named = "; ".join(_description(plan, file, read[file], first) for file in lost[:_NUM_NAMED])
    more = f"; and {len(lost) - _NUM_NAMED} more files" if len(lost) > _NUM_NAMED else ""
    raise DataError(
        f"{len(lost)} of {len(plan.files)} files would be lost, for every row of theirs was "
        f"rejected: {named}{more}. Correct them or the source's `format`, leave them out with a "
        "narrower `path`, or set ingest.unusable_files: count, which counts and lists their rows "
        "among the rejected ones."
    )


def _description(plan: IngestPlan, file: int, num_rows: int, first: dict[int, str]) -> str:
    uri = plan.files[file].uri
    rows = "its only row" if num_rows == 1 else f"all {num_rows:,} rows"
    why = f", the first one {first[file]}" if first.get(file) else ""
    return f"{uri} ({', '.join([rows + why, *_list_inside(plan, file, num_rows)])})"


def _list_inside(plan: IngestPlan, file: int, num_rows: int) -> Iterator[str]:
    """What to do about one object that holds a list of objects, which may be the rows."""
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
