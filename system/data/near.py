"""Near-duplicates across all sources: MinHash signatures, bands, confirmed pairs.

    bucket of rows ─ write_bands ─> spill by band key ─ match_bands ─> spill by id bucket ─> reduce

Two rows are compared when all bins of one band of their signatures agree, and are near-duplicates
when their signatures agree in at least `threshold` of all bins (corrected for chance; the standard
error at 0.8 is 0.035).  Bands are chosen so that a pair whose similarity is the threshold is
compared with probability 0.99 or more.  Of a pair the row that comes later leaves: test rows come
first, then estimate rows, then train rows, and within a split the order of the input.  So no train
row stays that a held-out row was found to be near to, and the result depends on no order of work.
Source: Broder 1997; b-bit signatures: Li & König 2010.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from system import storage
from system.data.ingest_plan import IngestPlan, bucket_of
from system.data.shingles import NUM_BINS, find_words, minhash, mix, ngrams
from system.data.spill import read_spill, spill_output

WORDS_PER_SHINGLE = 5

_RECALL = 0.99
_SIGN_ROWS = 1024
_FULL_GROUP_ROWS = 2000
_CHANCE = 1.0 / 256.0

BANDS = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.int8(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("signature", pa.binary(NUM_BINS), nullable=False),
    ]
)
"""A row once for each band of its signature; the signature has the low byte of each bin."""
NEAR = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("near_id", pa.string(), nullable=False),
    ]
)
"""A row that leaves, and the row that it is near to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillOutcome:
    """What a step wrote: bucket -> record batches of its spill file."""

    index: int
    batches: dict[int, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BandInput:
    """Where the rows with one range of band keys lie: bucket -> record batches."""

    index: int
    batches: dict[int, list[int]]


def rows_per_band(threshold: float) -> int:
    """The longest band with which a pair at the threshold is still compared with 99 %."""
    best = 1
    for size in range(1, NUM_BINS + 1):
        missed = (1.0 - threshold**size) ** (NUM_BINS // size)
        if 1.0 - missed >= _RECALL:
            best = size
    return best


def signatures(texts: list[str]) -> np.ndarray:
    """[R, K] uint64: MinHash over word 5-grams; rows without a word are all ones."""
    grams, rows = ngrams(find_words(texts), WORDS_PER_SHINGLE, keep_short=True)
    return minhash(grams, rows, len(texts))


def _uri(plan: IngestPlan, step: str, index: int, ending: str) -> str:
    return storage.join(plan.attempt, "work", step, f"{index:05d}.{ending}")


def read_spill_outcome(plan: IngestPlan, step: str, index: int) -> SpillOutcome | None:
    """The outcome of a finished step (`bands` or `near`), else None."""
    uri = _uri(plan, step, index, "json")
    if not storage.exists(uri):
        return None
    value = storage.read_json(uri)
    value["batches"] = {int(key): numbers for key, numbers in value["batches"].items()}
    return SpillOutcome(**value)


def write_bands(plan: IngestPlan, index: int, table: pa.Table) -> SpillOutcome:
    """Spills a bucket's rows (SPILL schema, each id once) by band key, then commits."""
    size = rows_per_band(plan.settings.near_threshold)
    with spill_output(_uri(plan, "bands", index, "arrow"), BANDS) as spill:
        for start in range(0, table.num_rows, _SIGN_ROWS):
            rows = _bands_of(table.slice(start, _SIGN_ROWS), size)
            keys = np.asarray(rows["key"])
            # The high bits name the bucket; num_buckets stays far below 2^32.
            buckets = ((keys >> np.uint64(32)) * np.uint64(plan.num_buckets)) >> np.uint64(32)
            spill.add(rows, buckets.astype(np.int64))
        outcome = SpillOutcome(index=index, batches=spill.batches)
    storage.write_json(_uri(plan, "bands", index, "json"), asdict(outcome))
    return outcome


def _bands_of(table: pa.Table, size: int) -> pa.Table:
    messages = table["messages"].to_pylist()
    found = signatures([" ".join(turn["content"] for turn in turns) for turns in messages])
    some = np.flatnonzero(found[:, 0] != np.uint64(2**64 - 1))
    found = found[some]
    num_bands = NUM_BINS // size
    keys = np.empty((len(some), num_bands), np.uint64)
    for band in range(num_bands):
        key = np.full(len(some), mix(np.array([band + 1], np.uint64))[0])
        for place in range(band * size, (band + 1) * size):
            key = mix(key ^ found[:, place])
        keys[:, band] = key
    short = (found & np.uint64(0xFF)).astype(np.uint8)
    repeated = np.repeat(some, num_bands)
    columns = {name: table[name].take(pa.array(repeated)) for name in BANDS.names[1:-1]}
    packed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(NUM_BINS),
        len(repeated),
        [None, pa.py_buffer(np.repeat(short, num_bands, axis=0).tobytes())],
    )
    return pa.table({"key": keys.ravel(), **columns, "signature": packed}, schema=BANDS)


def band_inputs(plan: IngestPlan, outcomes: list[SpillOutcome]) -> list[BandInput]:
    """What each range of band keys is made from."""
    batches: list[dict[int, list[int]]] = [{} for _ in range(plan.num_buckets)]
    for outcome in outcomes:
        for key, numbers in outcome.batches.items():
            batches[key][outcome.index] = numbers
    return [BandInput(index=index, batches=found) for index, found in enumerate(batches)]


def match_bands(plan: IngestPlan, given: BandInput) -> SpillOutcome:
    """Finds the rows that leave among those with a common band, spills them, then commits."""
    batches: list[pa.RecordBatch] = []
    for bucket, numbers in sorted(given.batches.items()):
        batches += read_spill(_uri(plan, "bands", bucket, "arrow"), numbers)
    with spill_output(_uri(plan, "near", given.index, "arrow"), NEAR) as spill:
        if batches:
            found = _near_pairs(pa.Table.from_batches(batches), plan.settings.near_threshold)
            spill.add(found, bucket_of(found["id"].to_pylist(), plan.num_buckets))
        outcome = SpillOutcome(index=given.index, batches=spill.batches)
    storage.write_json(_uri(plan, "near", given.index, "json"), asdict(outcome))
    return outcome


def _near_pairs(table: pa.Table, threshold: float) -> pa.Table:
    """Every row that leaves, with the first row of a band that it is near to (smallest id)."""
    counted = pc.value_counts(table["key"].combine_chunks())
    shared = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    table = table.filter(pc.is_in(table["key"], value_set=shared))
    if not table.num_rows:
        return NEAR.empty_table()
    keys = [("key", "ascending"), ("split", "descending")]
    keys += [(name, "ascending") for name in ("file", "start", "place")]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    ids = [str(row_id) for row_id in table["id"].to_pylist()]
    packed = b"".join(table["signature"].to_pylist())
    bytes_RK = np.frombuffer(packed, np.uint8).reshape(-1, NUM_BINS)
    least = int(np.ceil(NUM_BINS * (threshold * (1.0 - _CHANCE) + _CHANCE)))
    _, starts = np.unique(np.asarray(table["key"]), return_index=True)
    ends = [*starts[1:].tolist(), len(ids)]
    pairs: dict[str, str] = {}
    for start, end in zip(starts.tolist(), ends, strict=True):
        for later, earlier in _matches(bytes_RK[start:end], least):
            leaving, kept = ids[start + later], ids[start + earlier]
            pairs[leaving] = min(kept, pairs[leaving]) if leaving in pairs else kept
    return pa.table({"id": list(pairs), "near_id": list(pairs.values())}, schema=NEAR)


def _matches(signatures_RK: np.ndarray, least: int) -> list[tuple[int, int]]:
    """(later, earlier) places of rows that agree in at least `least` bins, first match each.

    A row is compared with all rows before it; in groups of more than 2,000 only with those that do
    not leave themselves.
    """
    found: list[tuple[int, int]] = []
    is_small = len(signatures_RK) <= _FULL_GROUP_ROWS
    compared = [0]
    for later in range(1, len(signatures_RK)):
        before = signatures_RK[:later] if is_small else signatures_RK[compared]
        agree = np.count_nonzero(before == signatures_RK[later], axis=1)
        hits = np.flatnonzero(agree >= least)
        if len(hits):
            found.append((later, int(hits[0]) if is_small else compared[hits[0]]))
        else:
            compared.append(later)
    return found


def read_near(plan: IngestPlan, batches: dict[int, list[int]]) -> dict[str, str]:
    """Row that leaves -> row it is near to (the smallest id of several), for one bucket."""
    pairs: dict[str, str] = {}
    for index, numbers in sorted(batches.items()):
        for batch in read_spill(_uri(plan, "near", index, "arrow"), numbers):
            for row_id, near_id in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                pairs[row_id] = min(near_id, pairs.get(row_id, near_id))
    return pairs
