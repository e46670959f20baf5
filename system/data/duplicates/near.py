"""Near-duplicates across all sources: MinHash signatures, bands, confirmed pairs.

    bucket of rows ─ sign_rows ─> band keys ─ share_keys ─> keys of several rows ─ lend_signatures
                                                                                        │
        rows that leave <─ decide, settle ─ pairs <─ match_bands, match_again ─ rows by key

Two rows are compared when all bins of one band of their signatures agree, and are near-duplicates
when their signatures agree in at least `threshold` of all bins (corrected for chance; the standard
error at 0.8 is 0.035).  Bands are chosen so that a pair whose similarity is the threshold is
compared with probability 0.99 or more; its estimate then reaches the threshold every second time.
A row has a key for each band, and most keys no second row: signatures are handed out only to the
keys that have one.  What is done with the pairs: `system.data.duplicates.near_decide`.
Source: Broder 1997; b-bit signatures: Li & König 2010.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from system import storage
from system.data.duplicates.near_compare import near_pairs
from system.data.duplicates.shingles import NUM_BINS, find_words, minhash, mix, ngrams
from system.data.ingest.plan import IngestPlan
from system.data.ingest.spill import read_spill, spill_output

WORDS_PER_SHINGLE = 5

_RECALL = 0.99
_SIGN_ROWS = 1024
_LENT_ROWS = 2**18
_CHANCE = 1.0 / 256.0

KEYS = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("row", pa.uint64(), nullable=False),
    ]
)
"""A row once for each band of its signature.

`row` is the row's bucket (high 32 bits) and its place among the bucket's different ids in their
order; so rows are in the order of their ids, whatever the number of buckets.
"""
SIGNED = pa.schema(
    [
        pa.field("row", pa.uint64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.int8(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("signature", pa.binary(NUM_BINS), nullable=False),
    ]
)
"""A row with a word; the signature has the low byte of each bin."""
BANDS = pa.schema([KEYS.field("key"), *SIGNED])
"""A row once for each key that it shares with another row."""
NEAR = pa.schema(
    [
        pa.field("row", pa.uint64(), nullable=False),
        pa.field("near", pa.uint64(), nullable=False),
        pa.field("near_id", pa.string(), nullable=False),
    ]
)
"""A row, and an earlier row that it is near to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillOutcome:
    """What a step wrote: whom it is for (a bucket, a range of keys) -> record batches."""

    index: int
    batches: dict[int, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillInput:
    """Where the rows for a unit lie: who wrote them -> record batches."""

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


def least_bins(threshold: float) -> int:
    """Bins that agree, some of them by chance, when the similarity is the threshold."""
    return int(np.ceil(NUM_BINS * (threshold * (1.0 - _CHANCE) + _CHANCE)))


def signatures(texts: list[str]) -> np.ndarray:
    """[R, K] uint64: MinHash over word 5-grams; rows without a word are all ones."""
    grams, rows = ngrams(find_words(texts), WORDS_PER_SHINGLE, keep_short=True)
    return minhash(grams, rows, len(texts))


def step_uri(plan: IngestPlan, step: str, index: int, ending: str) -> str:
    """A file of a unit's outcome: `json` its commit, `arrow` its rows."""
    return storage.join(plan.attempt, "work", step, f"{index:05d}.{ending}")


def read_spill_outcome(plan: IngestPlan, step: str, index: int) -> SpillOutcome | None:
    """The outcome of a finished unit of a step, else None."""
    uri = step_uri(plan, step, index, "json")
    if not storage.exists(uri):
        return None
    value = storage.read_json(uri)
    value["batches"] = {int(key): numbers for key, numbers in value["batches"].items()}
    return SpillOutcome(**value)


def commit_spill(plan: IngestPlan, step: str, outcome: SpillOutcome) -> SpillOutcome:
    """Writes the unit's commit; its rows are written."""
    storage.write_json(step_uri(plan, step, outcome.index, "json"), asdict(outcome))
    return outcome


def spill_inputs(num_units: int, outcomes: Sequence[SpillOutcome]) -> list[SpillInput]:
    """What each of the units is made from."""
    batches: list[dict[int, list[int]]] = [{} for _ in range(num_units)]
    for outcome in outcomes:
        for unit, numbers in outcome.batches.items():
            batches[unit][outcome.index] = numbers
    return [SpillInput(index=index, batches=found) for index, found in enumerate(batches)]


def read_step(plan: IngestPlan, step: str, schema: pa.Schema, given: SpillInput) -> pa.Table:
    """The rows of a step for one unit."""
    batches: list[pa.RecordBatch] = []
    for writer, numbers in sorted(given.batches.items()):
        batches += read_spill(step_uri(plan, step, writer, "arrow"), numbers)
    return pa.Table.from_batches(batches, schema)


def sign_rows(plan: IngestPlan, index: int, table: pa.Table) -> SpillOutcome:
    """Signs a bucket's rows (SPILL schema, each id once, in order), spills their keys, commits."""
    size = rows_per_band(plan.settings.near_threshold)
    signed = [SIGNED.empty_table()]
    with spill_output(step_uri(plan, "keys", index, "arrow"), KEYS) as spill:
        held: list[np.ndarray] = []
        for start in range(0, table.num_rows, _SIGN_ROWS):
            part = table.slice(start, _SIGN_ROWS)
            found = signatures(_texts(part))
            some = np.flatnonzero(found[:, 0] != np.uint64(2**64 - 1))
            signed.append(_signed(part, some, found[some], (index << 32) + start))
            held.append(_band_keys(found[some], size))
        rows = pa.concat_tables(signed)
        keys = np.concatenate([np.zeros((0, NUM_BINS // size), np.uint64), *held])
        repeated = np.repeat(np.asarray(rows["row"]), keys.shape[1])
        whole = pa.table({"key": keys.ravel(), "row": repeated}, schema=KEYS)
        spill.add(whole, _range_of(whole, plan.num_buckets))
        outcome = SpillOutcome(index=index, batches=spill.batches)
    storage.write_table(step_uri(plan, "keys", index, "signed.arrow"), rows)
    return commit_spill(plan, "keys", outcome)


def _texts(table: pa.Table) -> list[str]:
    messages = table["messages"].to_pylist()
    return [" ".join(turn["content"] for turn in turns) for turns in messages]


def _signed(table: pa.Table, some: np.ndarray, found: np.ndarray, first_row: int) -> pa.Table:
    short = (found & np.uint64(0xFF)).astype(np.uint8).tobytes()
    packed = [None, pa.py_buffer(short)]
    columns = {name: table[name].take(pa.array(some)) for name in SIGNED.names[1:-1]}
    columns["row"] = some.astype(np.uint64) + np.uint64(first_row)
    columns["signature"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(NUM_BINS), len(some), packed
    )
    return pa.table({name: columns[name] for name in SIGNED.names}, schema=SIGNED)


def _band_keys(found: np.ndarray, size: int) -> np.ndarray:
    """[R, bands] uint64 of [R, K] signatures."""
    num_bands = NUM_BINS // size
    keys = np.empty((len(found), num_bands), np.uint64)
    for band in range(num_bands):
        key = np.full(len(found), mix(np.array([band + 1], np.uint64))[0])
        for place in range(band * size, (band + 1) * size):
            key = mix(key ^ found[:, place])
        keys[:, band] = key
    return keys


def _range_of(table: pa.Table, num_ranges: int) -> np.ndarray:
    """[rows] int64: the range of keys that each row is in."""
    # The high bits name the range; there are far fewer than 2^32.
    heads = np.asarray(table["key"]) >> np.uint64(32)
    return ((heads * np.uint64(num_ranges)) >> np.uint64(32)).astype(np.int64)


def share_keys(plan: IngestPlan, given: SpillInput) -> SpillOutcome:
    """Spills, by bucket, the rows of those keys of a range that several rows have; commits."""
    table = read_step(plan, "keys", KEYS, given)
    keys = np.asarray(table["key"])
    order = np.argsort(keys, kind="stable")
    is_same = keys[order[1:]] == keys[order[:-1]]
    is_shared = np.zeros(len(keys), bool)
    is_shared[order[1:][is_same]] = True
    is_shared[order[:-1][is_same]] = True
    shared = table.filter(pa.array(is_shared))
    with spill_output(step_uri(plan, "shared", given.index, "arrow"), KEYS) as spill:
        spill.add(shared, (np.asarray(shared["row"]) >> np.uint64(32)).astype(np.int64))
        outcome = SpillOutcome(index=given.index, batches=spill.batches)
    return commit_spill(plan, "shared", outcome)


def lend_signatures(plan: IngestPlan, given: SpillInput) -> SpillOutcome:
    """Spills a bucket's rows by the keys that they share, with their signatures; commits."""
    shared = read_step(plan, "shared", KEYS, given)
    with spill_output(step_uri(plan, "bands", given.index, "arrow"), BANDS) as spill:
        if shared.num_rows:
            signed = storage.read_table(step_uri(plan, "keys", given.index, "signed.arrow"))
            places = np.searchsorted(np.asarray(signed["row"]), np.asarray(shared["row"]))
            for start in range(0, shared.num_rows, _LENT_ROWS):
                rows = signed.take(pa.array(places[start : start + _LENT_ROWS]))
                rows = rows.add_column(
                    0, BANDS.field("key"), shared["key"].slice(start, _LENT_ROWS)
                )
                spill.add(rows, _range_of(rows, plan.num_buckets))
        outcome = SpillOutcome(index=given.index, batches=spill.batches)
    return commit_spill(plan, "bands", outcome)


def match_bands(plan: IngestPlan, given: SpillInput) -> SpillOutcome:
    """The first row that each row is near to, of each band; spilled, then committed."""
    return _match(plan, "near", given, None)


def match_again(plan: IngestPlan, given: SpillInput) -> SpillOutcome:
    """All rows that each undecided row is near to; spilled, then committed."""
    undecided = storage.read_table(step_uri(plan, "decided", 0, "undecided.arrow"))
    return _match(plan, "near-all", given, np.asarray(undecided["row"]))


def _match(
    plan: IngestPlan, step: str, given: SpillInput, wanted: np.ndarray | None
) -> SpillOutcome:
    table = read_step(plan, "bands", BANDS, given)
    with spill_output(step_uri(plan, step, given.index, "arrow"), NEAR) as spill:
        found = _near_pairs(table, plan.settings.near_threshold, wanted)
        spill.add(found, np.zeros(found.num_rows, np.int64))
        outcome = SpillOutcome(index=given.index, batches=spill.batches)
    return commit_spill(plan, step, outcome)


def _near_pairs(table: pa.Table, threshold: float, wanted: np.ndarray | None) -> pa.Table:
    """Pairs of rows (BANDS schema) with a common key that are near-duplicates, each once.

    Args:
        table: all rows with some keys.
        threshold: of the similarity.
        wanted: the rows whose pairs are asked for, each with all earlier rows; None: all rows, each
            with the first row in each band.
    """
    if wanted is not None:
        own = table["key"].filter(pc.is_in(table["row"], value_set=pa.array(wanted)))
        table = table.filter(pc.is_in(table["key"], value_set=own.combine_chunks()))
    keys = [("key", "ascending"), ("split", "descending")]
    keys += [(name, "ascending") for name in ("file", "start", "place")]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    if not table.num_rows:
        return NEAR.empty_table()
    rows = np.asarray(table["row"])
    groups = np.asarray(table["key"])
    is_wanted = np.ones(len(rows), bool) if wanted is None else np.isin(rows, wanted)
    least = least_bins(threshold)
    later, earlier = near_pairs(_signatures_RK(table), groups, is_wanted, least)
    if wanted is None:
        later, first = np.unique(later, return_index=True)
        earlier = earlier[first]
    order = np.lexsort([rows[earlier], rows[later]])
    later, earlier = later[order], earlier[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(rows[later]) != 0) | (np.diff(rows[earlier]) != 0)
    later, earlier = later[is_new], earlier[is_new]
    near_ids = table["id"].take(pa.array(earlier))
    return pa.table({"row": rows[later], "near": rows[earlier], "near_id": near_ids}, schema=NEAR)


def _signatures_RK(table: pa.Table) -> np.ndarray:
    """[rows, K] uint8."""
    packed = table["signature"].combine_chunks()
    packed = packed.chunk(0) if isinstance(packed, pa.ChunkedArray) else packed
    data = np.frombuffer(packed.buffers()[1], np.uint8).reshape(-1, NUM_BINS)
    return data[packed.offset : packed.offset + len(packed)]
