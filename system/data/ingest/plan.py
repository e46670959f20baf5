"""The plan of an ingest, fixed before it starts: files, chunks, number of buckets, commit files.

Every worker gets the plan and a work unit.  The plan is written to `work/plan.json`, so that a run
that continues an attempt cuts the input in the same way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from system import storage
from system.config import IngestConfig, RunConfig, SourceConfig
from system.data.read import sources
from system.data.read.blocks import COMPRESSION_ENDINGS
from system.data.read.readers import FileRange
from system.data.read.sources import Chunk, SourceFile
from system.data.rows.category_maps import category_map_digests, with_category_map
from system.errors import DataError, StageError
from system.functions import UserFunction
from system.rundir import describe_change, flatten
from system.schema import CORPUS

BUCKET_BYTES = 64 * 2**20
"""Input, as plain text, in one bucket: a worker holds one bucket in memory."""
MAX_BUCKETS = 65536

_COMPRESSED_GROWTH = 4
"""Assumed ratio of plain text to compressed bytes."""
_UNKNOWN_BYTES = 16 * 2**30
"""Assumed size of a hub data set that states none: too many buckets cost less than too few."""
_DENSE = (*COMPRESSION_ENDINGS, ".parquet")
_PLACE = (
    pa.field("file", pa.int32(), nullable=False),
    pa.field("start", pa.int64(), nullable=False),  # of the file range, in the file
    pa.field("place", pa.int64(), nullable=False),  # row within the file range
)

SPILL = pa.schema([*CORPUS, pa.field("split", pa.int8(), nullable=False), *_PLACE])
"""A normalised row on its way to its bucket; (file, start, place) says where it was read."""
REJECTED_SPILL = pa.schema(
    [
        *_PLACE,
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
"""A rejected row; its number in the file is known only when all chunks are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestPlan:
    """All that a worker needs besides its work unit."""

    settings: IngestConfig
    sources: tuple[SourceConfig, ...]
    files: tuple[SourceFile, ...]
    chunks: tuple[Chunk, ...]
    num_buckets: int
    """Ranges of ids, each reduced alone; only the size of the input decides how many."""
    attempt: str
    """Where the result is written; `work/` below it is removed at the end."""
    benchmark_uris: tuple[str, ...] = ()
    filters: tuple[UserFunction, ...] = ()

    def source_of(self, file: int) -> str:
        """Name of the source that a file belongs to."""
        return sources.source_name(self.sources[self.files[file].source])


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeCount:
    """Counts of one file range."""

    file: int
    start: int
    numbers: int
    """How many row numbers of the file the range uses up; an empty line uses one, too."""
    read: int
    usable: int
    """Rows that are conversations with labels, even if a later check rejects them."""
    first_rejected: str
    """Why the first row that is not usable was rejected; empty: every row is usable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOutcome:
    """What happened to the rows of a chunk; its file is the chunk's commit."""

    index: int
    read: int
    kept: int
    """Rows in the spill file, duplicates included."""
    rejected: dict[str, int]
    examples: tuple[tuple[int, int, int, str, str], ...]
    """The first rejected rows: file, start of the file range, row within it, reason, detail."""
    ranges: tuple[RangeCount, ...]
    batches: dict[int, list[int]]
    """Bucket -> record batches of the spill file."""
    rejected_batches: list[int]
    without_reasoning: int
    """Conversations whose reasoning was dropped, duplicates included."""
    columns: tuple[str, ...] = ()
    """Some of the columns that the rows have, for messages."""
    absent: tuple[str, ...] = ()
    """Columns that the configuration names and that no row of the chunk has."""


def source_fingerprint(config: RunConfig) -> dict[str, str]:
    """Every input file with a stamp of its content: part of the fingerprint of the stage.

    Raises:
        ConfigError: a filter's module is missing.
        DataError: a source, benchmark or category file is missing.
    """
    files = sources.list_files(config.sources, config.data_dir)
    stamps = {file.uri: file.stamp for file in files}
    stamps |= {uri: sources.stat(uri)[1] for uri in _benchmark_uris(config)}
    stamps |= category_map_digests(config.sources, config.data_dir)
    return stamps | {item.name: item.source_digest() for item in _filters(config)}


def plan_ingest(config: RunConfig, attempt: str) -> IngestPlan:
    """Makes the plan: lists the files, cuts them into chunks, chooses the number of buckets.

    Raises:
        DataError: a source is missing or empty.
    """
    files = [
        replace(file, shown=config.without_secrets(file.uri))
        for file in sources.list_files(config.sources, config.data_dir)
    ]
    for number, source in enumerate(config.sources):
        source_files = [file for file in files if file.source == number]
        # A hub data set may state no size before it is downloaded.
        if not any(file.size or file.uri.startswith("hf://") for file in source_files):
            raise empty_source(source, [file.uri for file in source_files])
    total = sum(_text_bytes(file) for file in files)
    return IngestPlan(
        settings=config.ingest,
        sources=tuple(with_category_map(item, config.data_dir) for item in _named(config)),
        files=tuple(files),
        chunks=tuple(sources.plan_chunks(files, config.sources, config.ingest.chunk_bytes)),
        num_buckets=min(max(1, -(-total // BUCKET_BYTES)), MAX_BUCKETS),
        attempt=attempt,
        benchmark_uris=tuple(_benchmark_uris(config)),
        filters=_filters(config),
    )


def _named(config: RunConfig) -> list[SourceConfig]:
    """The sources with their names, which are made from paths whose variables are not expanded."""
    written = [item["path"] for item in config.to_write()["sources"]]
    names = [
        sources.source_name(source.model_copy(update={"path": path}))
        for source, path in zip(config.sources, written, strict=True)
    ]
    return [
        source.model_copy(update={"name": name})
        for source, name in zip(config.sources, names, strict=True)
    ]


def _text_bytes(file: SourceFile) -> int:
    if file.uri.startswith("hf://") and not file.size:
        return _UNKNOWN_BYTES
    return file.size * (_COMPRESSED_GROWTH if file.uri.lower().endswith(_DENSE) else 1)


def open_plan(config: RunConfig, attempt: str) -> IngestPlan:
    """The plan of an attempt.  The first session writes it down, later sessions read it.

    The committed work units were cut by the first plan, and a new plan may differ: a hub data set
    may state its size only after it was downloaded.  With another number of buckets, equal rows
    could lie in different buckets, and duplicates would stay.

    Raises:
        DataError: a source is missing or empty.
        StageError: the attempt was begun with other files or settings.
    """
    plan = plan_ingest(config, attempt)
    uri = storage.join(attempt, "work", "plan.json")
    inputs = _plan_inputs(plan, config)
    if not storage.is_whole(uri):
        # The addresses are in the plan of every session; a file must not show their secrets.
        files = [asdict(file) | {"uri": file.name} for file in plan.files]
        chunks = [asdict(chunk) for chunk in plan.chunks]
        for file_range in (item for chunk in chunks for item in chunk["ranges"]):
            file_range["uri"] = plan.files[file_range["file"]].name
        cut = {"num_buckets": plan.num_buckets, "files": files, "chunks": chunks}
        storage.write_json(uri, {"given": inputs, "cut": cut})
        return plan
    value = storage.read_json(uri)
    # Files that changed, or other settings, would mix rows of two inputs in one corpus.
    if value["given"] != inputs:
        raise StageError(
            f"{uri}: the rows read so far are those of another plan "
            f"({describe_change(flatten('', value['given']), flatten('', inputs))}). Run again "
            "with the files and settings that it was begun with, or start over with --redo."
        )
    cut = value["cut"]
    chunks = [
        chunk
        | {
            "ranges": tuple(
                FileRange(**item | {"uri": plan.files[item["file"]].uri})
                for item in chunk["ranges"]
            )
        }
        for chunk in cut["chunks"]
    ]
    files = zip(plan.files, cut["files"], strict=True)
    return replace(
        plan,
        num_buckets=cut["num_buckets"],
        files=tuple(replace(file, size=item["size"]) for file, item in files),
        chunks=tuple(Chunk(**chunk) for chunk in chunks),
    )


def _plan_inputs(plan: IngestPlan, config: RunConfig) -> dict[str, Any]:
    """What a plan is made from, in a form that is equal after a round trip through JSON."""
    values = config.to_hash()
    maps = [source.model_dump(mode="json", include={"category_map"}) for source in plan.sources]
    return {
        "ingest": values["ingest"],
        "sources": [value | read for value, read in zip(values["sources"], maps, strict=True)],
        "files": {f"{file.index} {file.name}": file.stamp for file in plan.files},
        "benchmarks": list(map(config.without_secrets, plan.benchmark_uris)),
        "filters": {item.name: item.source_digest() for item in plan.filters},
    }


def empty_source(source: SourceConfig, uris: list[str]) -> DataError:
    """The error for a source that has no row."""
    return DataError(
        f"source {sources.source_name(source)!r}: expected rows, found none in "
        f"{', '.join(uris[:3])}{', ...' if len(uris) > 3 else ''}. Remove the source, or give it a "
        "file with rows."
    )


def _benchmark_uris(config: RunConfig) -> list[str]:
    return [
        uri for path in config.ingest.benchmarks for uri in sources.resolve(path, config.data_dir)
    ]


def _filters(config: RunConfig) -> tuple[UserFunction, ...]:
    return tuple(UserFunction.here(name, "ingest.filters") for name in config.ingest.filters)


def chunk_uri(plan: IngestPlan, index: int, ending: str) -> str:
    """A chunk's file: `json` its commit, `arrow` its rows, `rejected.arrow` its rejected rows."""
    return storage.join(plan.attempt, "work", "chunks", f"{index:06d}.{ending}")


def read_outcome(plan: IngestPlan, index: int) -> ChunkOutcome | None:
    """The outcome of a finished chunk, else None."""
    uri = chunk_uri(plan, index, "json")
    if not storage.is_whole(uri):
        return None
    value = storage.read_json(uri)
    value["ranges"] = tuple(RangeCount(**count) for count in value["ranges"])
    value["examples"] = tuple(tuple(example) for example in value["examples"])
    value |= {name: tuple(value.get(name, ())) for name in ("columns", "absent")}
    value["batches"] = {int(bucket): numbers for bucket, numbers in value["batches"].items()}
    return ChunkOutcome(**value)


def bucket_of_heads(heads: np.ndarray, num_buckets: int) -> np.ndarray:
    """[N] int64: the bucket of each id; `heads` [N] are the first 32 bits, a bucket is a range."""
    return (heads.astype(np.int64) * num_buckets) >> 32
