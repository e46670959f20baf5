"""Targets that no source owns: a user's benchmark, or a general-ability set as a guard.

Their files may have any shape that sources may have; rows go through the same normal form, so ids
tell a row that is also trained on; verifiable answers are found as a source finds them.  A share of
the rows, chosen by the hash of the question as the corpus' splits are, is kept from the matrix for
stage `evaluate`: a mix is not judged on the rows that chose it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from system.config import IngestConfig, RunConfig, SourceConfig
from system.data.read.readers import Defect, FileRange, read_rows
from system.data.read.sources import list_files
from system.data.rows.conversation import SPLITS, Conversation, RowRejected, normalise, split_of
from system.data.rows.formats import Format, choose_format
from system.data.rows.labels import Labels
from system.errors import DataError
from system.schema import CORPUS

_HEAD_ROWS = 64

Side = Literal["estimate", "test"]


def read_targets(
    config: RunConfig, side: Side, exclude: Collection[str] = ()
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """The rows of all `influence.targets`: CORPUS tables by name, and rows left out by reason.

    Args:
        config: of the run.
        side: `estimate` rows the matrix is measured on, `test` rows judge what was trained.
        exclude: ids of rows that are trained on.

    Raises:
        DataError: as `read_target`.
    """
    tables: dict[str, pa.Table] = {}
    left_out: dict[str, int] = {}
    for name, target in config.influence.targets.items():
        tables[name], lost = read_target(
            target.as_source(name),
            data_dir=config.data_dir,
            ingest=config.ingest,
            exclude=exclude,
            side=side,
            test_share=target.test_share,
        )
        left_out |= {f"{name}: {reason}": count for reason, count in lost.items()}
    return tables, left_out


def read_target(
    source: SourceConfig,
    *,
    data_dir: str,
    ingest: IngestConfig,
    exclude: Collection[str],
    side: Side = "estimate",
    test_share: float = 0.0,
) -> tuple[pa.Table, dict[str, int]]:
    """One side's rows of one target's files, each once, without those that are trained on.

    Args:
        source: the target's files and answers; its name is every row's category.
        data_dir: what relative paths start from.
        ingest: limits on rows.
        exclude: ids of rows that are trained on.
        side: whose rows.
        test_share: share of the rows, by question, on the side `test`.

    Returns:
        CORPUS rows, counts of the rows left out by reason (`trained-on` and `duplicate` among
        them; rows of the other side are not).

    Raises:
        DataError: no file, an unknown format, or too large a share of broken rows.
    """
    name, path = source.name, source.path
    labels = Labels(source)
    found: dict[str, _Row] = {}
    left_out: Counter[str] = Counter()
    num_rows = num_broken = 0
    for file in list_files([source], data_dir):
        rows = read_rows(FileRange(file=file.index, uri=file.uri, stamp=file.stamp))
        first = list(itertools.islice(rows, _HEAD_ROWS))
        shape = choose_format(
            source, [row for _, row in first if not isinstance(row, Defect)], file.uri
        )
        for _, row in itertools.chain(first, rows):
            num_rows += 1
            normal = _normal(row, shape, labels, ingest, left_out)
            if normal is None:
                num_broken += 1
            elif SPLITS[split_of(normal.conversation.prompt_hash, 1.0, test_share)] != side:
                continue
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
