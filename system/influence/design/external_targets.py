"""External targets (`influence.targets`): a user's benchmark, or a guard set of general ability.

They are not categories of the corpus.  Their files may have any format that sources may have.  The
rows are normalised in the same way, so equal ids reveal a row that is also trained on, and
verifiable answers are found as in a source.  A share of the rows, chosen by the hash of the prompt,
is kept for stage `evaluate`, so that a mix is not judged on the rows that chose it.
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
from system.data.rows.columns import SeenColumns, check_columns
from system.data.rows.conversation import (
    SPLITS,
    Conversation,
    Marks,
    RowRejected,
    normalise,
    split_of,
    without_reasoning,
)
from system.data.rows.formats import Format, choose_format
from system.data.rows.labels import Labels
from system.errors import DataError
from system.schema import CORPUS

_HEAD_ROWS = 64

Side = Literal["estimate", "test"]


def read_targets(
    config: RunConfig, side: Side, exclude: Collection[str] = ()
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Reads all `influence.targets`: name -> CORPUS table, and counts of unused rows by reason.

    Args:
        config: of the run.
        side: `estimate`: rows on which the matrix is measured; `test`: rows that judge the
            trained models.
        exclude: ids of training rows, which must not be measured on.

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
    """Reads one side of one target, without duplicates and without training rows.

    Args:
        source: the target's files and answers; its name becomes the category of every row.
        data_dir: base directory of relative paths.
        ingest: limits on rows.
        exclude: ids of training rows.
        side: which side to read.
        test_share: share of the prompts that belong to the side `test`.

    Returns:
        CORPUS rows, and counts of unused rows by reason.  Reasons include `trained-on` and
        `duplicate`; rows of the other side are not counted.

    Raises:
        ConfigError: no row has a column that the configuration names.
        DataError: no file, an unknown format, or too large a share of broken rows.
    """
    name, path = source.name, source.path
    labels = Labels(source)
    rows_by_id: dict[str, _Row] = {}
    left_out: Counter[str] = Counter()
    num_rows = num_broken = 0
    seen = SeenColumns(source)
    for file in list_files([source], data_dir):
        labels.open_file(file.uri)
        rows = read_rows(FileRange(file=file.index, uri=file.uri, stamp=file.stamp))
        # The format is guessed from the first rows, which must then not be lost.
        first = list(itertools.islice(rows, _HEAD_ROWS))
        shape = choose_format(
            source, [row for _, row in first if not isinstance(row, Defect)], file.uri
        )
        for _, row in itertools.chain(first, rows):
            num_rows += 1
            seen.see([row])
            normal = _normal(row, shape, labels, ingest, left_out)
            if normal is None:
                num_broken += 1
            elif SPLITS[split_of(normal.conversation.prompt_hash, 1.0, test_share)] != side:
                continue
            elif normal.conversation.id in exclude:
                left_out["trained-on"] += 1
            elif normal.conversation.id in rows_by_id:
                left_out["duplicate"] += 1
            else:
                rows_by_id[normal.conversation.id] = normal
    check_columns(f"influence.targets {name!r} ({path})", source, [(seen.names, seen.absent)])
    if num_broken > ingest.max_rejected_share * num_rows:
        raise DataError(
            f"influence.targets {name!r} ({path}): {num_broken} of {num_rows} rows cannot be used "
            f"({dict(left_out)}), more than ingest.max_rejected_share "
            f"{ingest.max_rejected_share}. Correct the file."
        )
    return _table(name, list(rows_by_id.values())), dict(left_out)


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
        turns = shape.turns(row)
        if ingest.reasoning == "drop":
            turns = without_reasoning(turns)
        conversation = normalise(turns, ingest.max_chars)
    except RowRejected as rejected:
        left_out[rejected.reason] += 1
        return None
    label, rejected = labels.of([dict(row)], [conversation.contents[-1].encode()])
    if rejected:
        left_out[rejected[0][1].reason] += 1
        return None
    return _Row(conversation, label.answer[0], label.answer_pattern[0])


def _table(name: str, rows: list[_Row]) -> pa.Table:
    messages = [
        [
            {"role": role, "content": content, **row.conversation.marks.get(k, Marks())._asdict()}
            for k, (role, content) in enumerate(
                zip(row.conversation.roles, row.conversation.contents, strict=True)
            )
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
