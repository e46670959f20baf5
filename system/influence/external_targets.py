"""Targets that no source owns: a user's benchmark, or a general-ability set as a guard.

Their files may have any shape that sources may have; rows go through the same normal form, so ids
tell a row that is also trained on; verifiable answers are found as a source finds them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from system.config import IngestConfig, SourceConfig
from system.data.conversation import Conversation, RowRejected, normalise
from system.data.formats import Format, choose_format
from system.data.labels import Labels
from system.data.readers import Defect, Piece, read_rows
from system.data.sources import list_files
from system.errors import DataError
from system.schema import CORPUS

_HEAD_ROWS = 64


def read_target(
    source: SourceConfig, *, data_dir: str, ingest: IngestConfig, exclude: Collection[str]
) -> tuple[pa.Table, dict[str, int]]:
    """The rows of one target's files, each once, without those that are trained on.

    Args:
        source: the target's files and answers; its name is every row's category.
        data_dir: what relative paths start from.
        ingest: limits on rows.
        exclude: ids of rows that interventions train on.

    Returns:
        CORPUS rows, counts of the rows left out by reason (`trained-on` and `duplicate` among
        them).

    Raises:
        DataError: no file, an unknown format, or too large a share of broken rows.
    """
    name, path = source.name, source.path
    labels = Labels(source)
    found: dict[str, _Row] = {}
    left_out: Counter[str] = Counter()
    num_rows = num_broken = 0
    for file in list_files([source], data_dir):
        rows = read_rows(Piece(file=file.index, uri=file.uri, stamp=file.stamp))
        first = list(itertools.islice(rows, _HEAD_ROWS))
        shape = choose_format(
            source, [row for _, row in first if not isinstance(row, Defect)], file.uri
        )
        for _, row in itertools.chain(first, rows):
            num_rows += 1
            normal = _normal(row, shape, labels, ingest, left_out)
            if normal is None:
                num_broken += 1
            elif normal.conversation.id in exclude:
                left_out["trained-on"] += 1
            elif normal.conversation.id in found:
                left_out["duplicate"] += 1
            else:
                found[normal.conversation.id] = normal
    if num_broken > ingest.max_rejected_share * num_rows:
        raise DataError(
            f"influence.targets {name!r} ({path}): {num_broken} of {num_rows} rows cannot be used "
            f"({dict(left_out)}), more than ingest.max_rejected_share "
            f"{ingest.max_rejected_share}. Correct the file."
        )
    return _table(name, list(found.values())), dict(left_out)


class _Row(NamedTuple):
    conversation: Conversation
    answer: str | None
    answer_pattern: str | None


def _normal(
    row: Mapping[str, Any] | Defect,
    shape: Format,
    labels: Labels,
    ingest: IngestConfig,
    left_out: Counter[str],
) -> _Row | None:
    if isinstance(row, Defect):
        left_out[row.reason] += 1
        return None
    try:
        conversation = normalise(shape.turns(row), ingest.max_chars)
    except RowRejected as rejected:
        left_out[rejected.reason] += 1
        return None
    found, rejected = labels.of([dict(row)], [conversation.contents[-1].encode()])
    if rejected:
        left_out[rejected[0][1].reason] += 1
        return None
    return _Row(conversation, found.answer[0], found.answer_pattern[0])


def _table(name: str, rows: list[_Row]) -> pa.Table:
    messages = [
        [
            {"role": role, "content": content}
            for role, content in zip(row.conversation.roles, row.conversation.contents, strict=True)
        ]
        for row in rows
    ]
    nothing = [None] * len(rows)
    return pa.table(
        {
            "id": [row.conversation.id for row in rows],
            "category": [name] * len(rows),
            "source": [name] * len(rows),
            "messages": messages,
            "answer": [row.answer for row in rows],
            "answer_pattern": [row.answer_pattern for row in rows],
            "score": nothing,
            "embedding": nothing,
        },
        schema=CORPUS,
    )
