"""Writes the selected examples: reads them shard by shard, writes them part by part.

    Selection ─ plan_gather ─> shard groups ─ gather_group ─> spill by part ─ write_part ─> Parquet

Groups and parts are independent work units, and each is committed alone.  The bytes of the parts
depend on the selection alone.  `actors.selector` calls these functions, the middle two in actors.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from system import storage
from system.config import SelectConfig
from system.data.corpus import Corpus, Shard
from system.data.ingest.spill import SpillWriter, read_spill, spill_output
from system.data.rows.canonical import canonical_table
from system.errors import StageError
from system.schema import SELECTION
from system.selection.choose import QUARANTINED, Chosen
from system.selection.select import Selection, fetch_rows

PART_ROWS = 32768
"""Examples in one Parquet file."""
GROUP_ROWS = 65536
"""Largest number of selected examples in a group, unless a single shard has more."""

SPILL_BYTES = 256 * 2**20
"""Size in memory at which the rows of a group are spilled; a larger group spills several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A work unit: some shards, which of their rows are selected, and their positions."""

    index: int
    shards: tuple[Shard, ...]
    rows: tuple[np.ndarray, ...]
    """One array a shard."""
    positions: tuple[np.ndarray, ...]
    stages: tuple[np.ndarray, ...]
    """Indices into `stage_names`."""
    stage_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutcome:
    """The record batches of a group's spill file; the JSON file with it commits the group."""

    index: int
    batches: dict[int, list[int]]
    """Part -> record batches of the spill file that hold its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInput:
    """A work unit: the record batches that hold the rows of one part."""

    index: int
    num_rows: int
    batches: dict[int, list[int]]
    """Group -> record batches of its spill file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One Parquet file of the selection, as written."""

    path: str
    """Relative to the selection's directory."""
    rows: int
    sha256: str


def plan_gather(selection: Selection) -> list[Group]:
    """Groups the shards with selected rows, about GROUP_ROWS selected examples a group."""
    order = np.argsort(selection.shard, kind="stable")
    present, starts = np.unique(selection.shard[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    groups: list[Group] = []
    members: list[tuple[int, np.ndarray]] = []
    num_rows = 0
    for number, start, end in zip(present.tolist(), starts.tolist(), ends, strict=True):
        if num_rows and num_rows + end - start > GROUP_ROWS:
            groups.append(_group(len(groups), selection, members))
            members, num_rows = [], 0
        members.append((number, order[start:end]))
        num_rows += end - start
    groups.append(_group(len(groups), selection, members))
    return groups


def _group(index: int, selection: Selection, shards: Sequence[tuple[int, np.ndarray]]) -> Group:
    return Group(
        index=index,
        shards=tuple(selection.shards[number] for number, _ in shards),
        rows=tuple(selection.row[positions] for _, positions in shards),
        positions=tuple(positions for _, positions in shards),
        stages=tuple(selection.stage[positions] for _, positions in shards),
        stage_names=selection.stages,
    )


def _group_uri(attempt: str, index: int, ending: str) -> str:
    return storage.join(attempt, "work", f"{index:06d}.{ending}")


def read_group_outcome(attempt: str, index: int) -> GroupOutcome | None:
    """The outcome of a group that is committed, else None."""
    uri = _group_uri(attempt, index, "json")
    if not storage.is_whole(uri):
        return None
    value = storage.read_json(uri)
    value["batches"] = {int(part): numbers for part, numbers in value["batches"].items()}
    return GroupOutcome(**value)


def gather_group(corpus: Corpus, group: Group, attempt: str) -> GroupOutcome:
    """Reads the group's rows, spills them by part, and commits the group."""
    with spill_output(_group_uri(attempt, group.index, "arrow"), SELECTION) as spill:
        tables: list[pa.Table] = []
        num_bytes = 0
        for shard, rows, positions, stages in zip(
            group.shards, group.rows, group.positions, group.stages, strict=True
        ):
            names = [group.stage_names[stage] for stage in stages]
            tables.append(fetch_rows(corpus, shard, rows, positions, names))
            num_bytes += tables[-1].nbytes
            if num_bytes >= SPILL_BYTES:
                _spill_by_part(spill, tables)
                tables, num_bytes = [], 0
        if tables:
            _spill_by_part(spill, tables)
        outcome = GroupOutcome(index=group.index, batches=spill.batches)
    storage.write_json(_group_uri(attempt, group.index, "json"), asdict(outcome))
    return outcome


def _spill_by_part(spill: SpillWriter, tables: Sequence[pa.Table]) -> None:
    """Adds one record batch for each part, whatever the number of shards the rows come from."""
    table = pa.concat_tables(tables).combine_chunks()
    spill.add(table, np.asarray(table["position"]) // PART_ROWS)


def part_inputs(num_rows: int, outcomes: Sequence[GroupOutcome]) -> list[PartInput]:
    """The inputs of all parts, collected from the outcomes of all groups."""
    num_parts = -(-num_rows // PART_ROWS)
    batches: list[dict[int, list[int]]] = [{} for _ in range(num_parts)]
    for outcome in outcomes:
        for part, numbers in outcome.batches.items():
            batches[part][outcome.index] = numbers
    return [
        PartInput(
            index=part,
            num_rows=min(PART_ROWS, num_rows - part * PART_ROWS),
            batches=group_batches,
        )
        for part, group_batches in enumerate(batches)
    ]


def read_part(attempt: str, index: int) -> Part | None:
    """The part if it is committed, else None."""
    uri = _group_uri(attempt, index, "part.json")
    return Part(**storage.read_json(uri)) if storage.is_whole(uri) else None


def write_part(part_input: PartInput, attempt: str) -> Part:
    """Orders a part's rows, writes them as Parquet, and commits the part.

    Raises:
        StageError: rows are missing, or occur twice.
    """
    index, num_rows = part_input.index, part_input.num_rows
    batches: list[pa.RecordBatch] = []
    for group, numbers in sorted(part_input.batches.items()):
        batches += read_spill(_group_uri(attempt, group, "arrow"), numbers)
    table = pa.Table.from_batches(batches, SELECTION)
    positions = np.asarray(table["position"])
    order = np.argsort(positions, kind="stable")
    # Spill files of an interrupted attempt are reused; this check finds one that was lost since.
    first = index * PART_ROWS
    if not np.array_equal(positions[order], np.arange(first, first + num_rows)):
        raise StageError(
            f"select: part {index}: expected the {num_rows:,} examples from position {first:,}, "
            f"found {table.num_rows:,} examples in the spill files. Files below work/ were "
            "changed or lost; run `select` again with --redo."
        )
    sink = io.BytesIO()
    pq.write_table(canonical_table(table.take(pa.array(order))), sink, compression="zstd")
    data = sink.getvalue()
    path = f"part-{index:05d}.parquet"
    storage.write_bytes(storage.join(attempt, "parts", path), data)
    part = Part(path=path, rows=num_rows, sha256=hashlib.sha256(data).hexdigest())
    storage.write_json(_group_uri(attempt, index, "part.json"), asdict(part))
    return part


def write_selection_manifest(
    attempt: str,
    selection: Selection,
    parts: Sequence[Part],
    chosen: Mapping[str, Chosen],
    settings: SelectConfig,
) -> dict[str, Any]:
    """Writes the quarantined rows, then manifest.json, and removes the spill files.

    The manifest comes after all other files: a selection with a manifest is complete.
    """
    quarantined = [
        QUARANTINED.empty_table(),
        *(chosen[name].quarantined for name in sorted(chosen)),
    ]
    storage.write_table(storage.join(attempt, "quarantined.parquet"), pa.concat_tables(quarantined))
    # Parts are in training order, so this digest changes with any row and with any order.
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    manifest = {
        "format": 1,
        "method": describe_method(settings),
        "categories": {
            name: {
                "supply": rows.supply,
                "quarantined": dict(
                    sorted(Counter(rows.quarantined["reason"].to_pylist()).items())
                ),
                "notes": {reason: count for reason, count in rows.notes.items() if count},
            }
            for name, rows in sorted(chosen.items())
        },
        "rows": sum(part.rows for part in parts),
        "stages": list(selection.stages),
        "counts": selection.counts,
        "repeats": selection.repeats,
        "sha256": digest,
        "files": [asdict(part) for part in parts],
    }
    storage.write_json(storage.join(attempt, "manifest.json"), manifest)
    storage.delete(storage.join(attempt, "work"))
    return manifest


def describe_method(settings: SelectConfig) -> dict[str, Any]:
    """The settings of the method, without the fields that it does not read."""
    value = settings.model_dump(mode="json")
    unread = {name.removeprefix("select.") for name in settings.unread_fields}
    return {name: value[name] for name in value if name not in unread}


def method_line(manifest: Mapping[str, Any]) -> str:
    """One line for the log: how the rows were chosen, and how many were passed over."""
    method = manifest["method"]
    text = f"method {method['method']}"
    if "score" in method:
        text += f" by {method['score']}, {method['order']} first"
    if "embedding" in method:
        text += f", similarity on {method['embedding']}"
    if "max_similarity" in method:
        text += f" at most {method['max_similarity']:g}"
    totals: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    for item in manifest["categories"].values():
        totals.update(item["notes"])
        quarantined.update(item["quarantined"])
    notes = [f"{reason} {count:,}" for reason, count in sorted(totals.items())]
    if quarantined:
        reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(quarantined.items()))
        notes.append(f"quarantined {sum(quarantined.values()):,} ({reasons})")
    return f"{text}; {', '.join(notes)}" if notes else text
