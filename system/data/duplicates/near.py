"""Near-duplicates across all sources: MinHash signatures, bands of them, and confirmed pairs.

    bucket of rows ─ sign_rows ─> keys of bands ─ keep_shared_keys ─> keys that several rows have
                                                                              │ send_signatures
      rows to remove <─ decide, settle ─ pairs <─ match_bands, match_again ─ rows by key

`system.data.ingest.ingest` runs these steps when `ingest.deduplicate` is `near`.  Each step reads
the spill files of the step before, and each of its work units is committed alone.

**Which pairs.**  Two rows are compared when all bins in one band of their signatures agree.  They
are near-duplicates when their signatures agree in at least `threshold` of all bins, corrected for
bins that agree by chance (standard error at 0.8: 0.035).  The band length is chosen so that a pair
whose similarity equals the threshold is compared with probability 0.99 or more; the estimate of
such a pair then reaches the threshold in half of the cases.  Each row has one key for each band,
and most keys belong to one row only.  Signatures are sent only to the keys of several rows.
`near_compare` bounds the number of comparisons.  Source: Broder 1997; b-bit signatures: Li & König
2010.

**Which rows are removed.**  Test rows come first, then estimate rows, then train rows; within a
split the order of the input holds.  A row is removed when it is near to an earlier row that is
kept, and for no other reason.  In a chain A ~ B ~ C without A ~ C, row B is removed and C is kept.
So every removed row is near to a row of the corpus, no kept train row is near to a kept held-out
row as far as pairs were found, and the result does not depend on the order of work.

Most rows need only the first near row of each band (`decide`): that row has no earlier neighbour,
so it is kept.  For the few other rows `settle` looks at all their neighbours.

Shapes: R rows, K bins of a signature.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from system import storage
from system.data.duplicates.near_compare import near_pairs
from system.data.duplicates.shingles import NUM_BINS, find_words, minhash, mix, ngrams
from system.data.ingest.plan import IngestPlan
from system.data.ingest.spill import (
    SpillInput,
    SpillOutcome,
    commit_spill,
    read_spill_outcome,
    read_step,
    spill_output,
    step_uri,
)

WORDS_PER_SHINGLE = 5

_RECALL = 0.99
"""Probability with which a pair at the threshold is compared."""
_SIGN_ROWS = 1024
_SEND_ROWS = 2**18
_CHANCE = 1.0 / 256.0
"""Probability that the stored bytes of two different hashes agree."""

KEYS = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("row", pa.uint64(), nullable=False),
    ]
)
"""One line for each row and band of its signature.

`row` holds the row's bucket (high 32 bits) and its position among the different ids of the bucket
(low 32 bits).  So the numbers of rows sort like their ids, whatever the number of buckets.
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
"""A row that has at least one word.  The signature keeps the low byte of each bin."""
BANDS = pa.schema([KEYS.field("key"), *SIGNED])
"""One line for each row and key that it shares with another row."""
NEAR = pa.schema(
    [
        pa.field("row", pa.uint64(), nullable=False),
        pa.field("near", pa.uint64(), nullable=False),
        pa.field("near_id", pa.string(), nullable=False),
    ]
)
"""A row, and an earlier row that it is near to."""
_UNDECIDED = pa.schema([pa.field("row", pa.uint64(), nullable=False)])


def rows_per_band(threshold: float) -> int:
    """Length of the longest band with which a pair at the threshold is compared with 99 %."""
    best = 1
    for size in range(1, NUM_BINS + 1):
        missed = (1.0 - threshold**size) ** (NUM_BINS // size)
        if 1.0 - missed >= _RECALL:
            best = size
    return best


def min_agreeing_bins(threshold: float) -> int:
    """Number of bins that agree, some by chance, when the similarity equals the threshold."""
    return int(np.ceil(NUM_BINS * (threshold * (1.0 - _CHANCE) + _CHANCE)))


def signatures(texts: list[str]) -> np.ndarray:
    """[R, K] uint64: MinHash over word 5-grams; rows without a word are all ones."""
    grams, rows = ngrams(find_words(texts), WORDS_PER_SHINGLE, keep_short=True)
    return minhash(grams, rows, len(texts))


def sign_rows(plan: IngestPlan, index: int, table: pa.Table) -> SpillOutcome:
    """Signs the rows of a bucket (SPILL schema, each id once, by id) and spills their keys."""
    size = rows_per_band(plan.settings.near_threshold)
    signed = [SIGNED.empty_table()]
    with spill_output(step_uri(plan, "keys", index, "arrow"), KEYS) as spill:
        key_batches = [np.zeros((0, NUM_BINS // size), np.uint64)]
        for start in range(0, table.num_rows, _SIGN_ROWS):
            batch = table.slice(start, _SIGN_ROWS)
            signatures_RK = signatures(_texts(batch))
            # Rows without a word all have the same signature; they would be near to each other.
            with_words = np.flatnonzero(signatures_RK[:, 0] != np.uint64(2**64 - 1))
            signatures_RK = signatures_RK[with_words]
            signed.append(_signed(batch, with_words, signatures_RK, (index << 32) + start))
            key_batches.append(_band_keys(signatures_RK, size))
        rows = pa.concat_tables(signed)
        keys = np.concatenate(key_batches)
        repeated = np.repeat(np.asarray(rows["row"]), keys.shape[1])
        lines = pa.table({"key": keys.ravel(), "row": repeated}, schema=KEYS)
        spill.add(lines, _range_of(lines, plan.num_buckets))
        outcome = SpillOutcome(index=index, batches=spill.batches)
    storage.write_table(step_uri(plan, "keys", index, "signed.arrow"), rows)
    return commit_spill(plan, "keys", outcome)


def _texts(table: pa.Table) -> list[str]:
    messages = table["messages"].to_pylist()
    return [" ".join(turn["content"] for turn in turns) for turns in messages]


def _signed(
    table: pa.Table, with_words: np.ndarray, signatures_RK: np.ndarray, first_row: int
) -> pa.Table:
    """The SIGNED table of the rows at the places `with_words`, numbered from `first_row`."""
    low_bytes = (signatures_RK & np.uint64(0xFF)).astype(np.uint8).tobytes()
    columns = {name: table[name].take(pa.array(with_words)) for name in SIGNED.names[1:-1]}
    columns["row"] = with_words.astype(np.uint64) + np.uint64(first_row)
    columns["signature"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(NUM_BINS), len(with_words), [None, pa.py_buffer(low_bytes)]
    )
    return pa.table({name: columns[name] for name in SIGNED.names}, schema=SIGNED)


def _band_keys(signatures_RK: np.ndarray, size: int) -> np.ndarray:
    """[R, bands] uint64 of [R, K] signatures."""
    num_bands = NUM_BINS // size
    keys = np.empty((len(signatures_RK), num_bands), np.uint64)
    for band in range(num_bands):
        # The band's number starts the hash: equal bins in different bands give different keys.
        key = np.full(len(signatures_RK), mix(np.array([band + 1], np.uint64))[0])
        for place in range(band * size, (band + 1) * size):
            key = mix(key ^ signatures_RK[:, place])
        keys[:, band] = key
    return keys


def _range_of(table: pa.Table, num_ranges: int) -> np.ndarray:
    """[rows] int64: the range of keys that each row is in."""
    # The high bits name the range; there are far fewer than 2^32 ranges.
    heads = np.asarray(table["key"]) >> np.uint64(32)
    return ((heads * np.uint64(num_ranges)) >> np.uint64(32)).astype(np.int64)


def keep_shared_keys(plan: IngestPlan, unit: SpillInput) -> SpillOutcome:
    """Spills, by bucket, the lines of one range of keys whose key several rows have."""
    table = read_step(plan, "keys", KEYS, unit)
    keys = np.asarray(table["key"])
    order = np.argsort(keys, kind="stable")
    is_same = keys[order[1:]] == keys[order[:-1]]
    is_shared = np.zeros(len(keys), bool)
    is_shared[order[1:][is_same]] = True
    is_shared[order[:-1][is_same]] = True
    shared = table.filter(pa.array(is_shared))
    with spill_output(step_uri(plan, "shared", unit.index, "arrow"), KEYS) as spill:
        spill.add(shared, (np.asarray(shared["row"]) >> np.uint64(32)).astype(np.int64))
        outcome = SpillOutcome(index=unit.index, batches=spill.batches)
    return commit_spill(plan, "shared", outcome)


def send_signatures(plan: IngestPlan, unit: SpillInput) -> SpillOutcome:
    """Spills, by range of keys, the signed rows of a bucket, once for each key that they share."""
    shared = read_step(plan, "shared", KEYS, unit)
    with spill_output(step_uri(plan, "bands", unit.index, "arrow"), BANDS) as spill:
        if shared.num_rows:
            signed = storage.read_table(step_uri(plan, "keys", unit.index, "signed.arrow"))
            places = np.searchsorted(np.asarray(signed["row"]), np.asarray(shared["row"]))
            for start in range(0, shared.num_rows, _SEND_ROWS):
                rows = signed.take(pa.array(places[start : start + _SEND_ROWS]))
                rows = rows.add_column(
                    0, BANDS.field("key"), shared["key"].slice(start, _SEND_ROWS)
                )
                spill.add(rows, _range_of(rows, plan.num_buckets))
        outcome = SpillOutcome(index=unit.index, batches=spill.batches)
    return commit_spill(plan, "bands", outcome)


def match_bands(plan: IngestPlan, unit: SpillInput) -> SpillOutcome:
    """Spills, for each row and band, the first row that it is near to."""
    return _match(plan, "near", unit, None)


def match_again(plan: IngestPlan, unit: SpillInput) -> SpillOutcome:
    """Spills, for each undecided row, all earlier rows that it is near to."""
    undecided = storage.read_table(step_uri(plan, "decided", 0, "undecided.arrow"))
    return _match(plan, "near-all", unit, np.asarray(undecided["row"]))


def _match(
    plan: IngestPlan, step: str, unit: SpillInput, undecided: np.ndarray | None
) -> SpillOutcome:
    table = read_step(plan, "bands", BANDS, unit)
    with spill_output(step_uri(plan, step, unit.index, "arrow"), NEAR) as spill:
        pairs = _near_pairs(table, plan.settings.near_threshold, undecided)
        spill.add(pairs, np.zeros(pairs.num_rows, np.int64))
        outcome = SpillOutcome(index=unit.index, batches=spill.batches)
    return commit_spill(plan, step, outcome)


def _near_pairs(table: pa.Table, threshold: float, undecided: np.ndarray | None) -> pa.Table:
    """Pairs of near-duplicates (NEAR schema) among rows with a common key, each pair once.

    Args:
        table: BANDS, all rows of some keys.
        threshold: of the similarity.
        undecided: the rows to search for, each with all earlier rows; None: search for all rows,
            each with the first row in each band.
    """
    if undecided is not None:
        own = table["key"].filter(pc.is_in(table["row"], value_set=pa.array(undecided)))
        table = table.filter(pc.is_in(table["key"], value_set=own.combine_chunks()))
    # Within a key the row that is to be kept comes first: test (the highest split) before train,
    # then the order of the input.
    keys = [("key", "ascending"), ("split", "descending")]
    keys += [(name, "ascending") for name in ("file", "start", "place")]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    if not table.num_rows:
        return NEAR.empty_table()
    rows = np.asarray(table["row"])
    groups = np.asarray(table["key"])
    is_searched = np.ones(len(rows), bool) if undecided is None else np.isin(rows, undecided)
    later, earlier = near_pairs(
        _signatures_RK(table), groups, is_searched, min_agreeing_bins(threshold)
    )
    if undecided is None:
        later, first = np.unique(later, return_index=True)
        earlier = earlier[first]
    # A pair with several common keys was found once for each of them.
    order = np.lexsort([rows[earlier], rows[later]])
    later, earlier = later[order], earlier[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(rows[later]) != 0) | (np.diff(rows[earlier]) != 0)
    later, earlier = later[is_new], earlier[is_new]
    near_ids = table["id"].take(pa.array(earlier))
    return pa.table({"row": rows[later], "near": rows[earlier], "near_id": near_ids}, schema=NEAR)


def _signatures_RK(table: pa.Table) -> np.ndarray:
    """[R, K] uint8."""
    packed = table["signature"].combine_chunks()
    packed = packed.chunk(0) if isinstance(packed, pa.ChunkedArray) else packed
    data = np.frombuffer(packed.buffers()[1], np.uint8).reshape(-1, NUM_BINS)
    return data[packed.offset : packed.offset + len(packed)]


def decide(plan: IngestPlan, unit: SpillInput) -> SpillOutcome:
    """Spills, by bucket, the rows that are near to a row without an earlier neighbour.

    Rows that have earlier neighbours, but none of this kind, are undecided; they are written to a
    file of their own.
    """
    # The pairs of all ranges may not fit in memory together, so they are read one range at a time.
    parts = [
        SpillInput(index=0, batches={writer: numbers}) for writer, numbers in unit.batches.items()
    ]
    rows = [np.zeros(0, np.uint64)]
    rows += [np.unique(read_step(plan, "near", NEAR, part)["row"]) for part in parts]
    later = np.unique(np.concatenate(rows))
    decided = [NEAR.empty_table()]
    for part in parts:
        pairs = read_step(plan, "near", NEAR, part)
        is_kept = ~_is_in(np.asarray(pairs["near"]), later)
        decided.append(_first_of_each(pairs.filter(pa.array(is_kept))))
    leaving = _first_of_each(pa.concat_tables(decided))
    undecided = np.setdiff1d(later, np.asarray(leaving["row"]), assume_unique=True)
    storage.write_table(
        step_uri(plan, "decided", 0, "undecided.arrow"),
        pa.table([pa.array(undecided)], schema=_UNDECIDED),
    )
    return _spill_leaving(plan, "decided", leaving)


def has_undecided(plan: IngestPlan) -> bool:
    """Whether `decide` left rows for `settle`."""
    return storage.read_table(step_uri(plan, "decided", 0, "undecided.arrow")).num_rows > 0


def settle(plan: IngestPlan, unit: SpillInput) -> SpillOutcome:
    """Spills, by bucket, the undecided rows that are removed."""
    decided = read_spill_outcome(plan, "decided", 0)
    assert decided is not None, "rows are settled after the others are decided"
    numbers = sorted(number for own in decided.batches.values() for number in own)
    removed = read_step(plan, "decided", NEAR, SpillInput(index=0, batches={0: numbers}))
    undecided = np.asarray(
        storage.read_table(step_uri(plan, "decided", 0, "undecided.arrow"))["row"]
    )
    pairs = read_step(plan, "near-all", NEAR, unit)
    # A row that `decide` removed can no longer be the reason to remove another one.
    is_removed = _is_in(np.asarray(pairs["near"]), np.sort(np.asarray(removed["row"])))
    pairs = pairs.filter(pa.array(~is_removed))
    leaving = leaving_rows(undecided, np.asarray(pairs["row"]), np.asarray(pairs["near"]))
    leaves = _is_in(np.asarray(pairs["row"]), leaving)
    is_kept = ~_is_in(np.asarray(pairs["near"]), leaving)
    return _spill_leaving(plan, "settled", _first_of_each(pairs.filter(pa.array(leaves & is_kept))))


def leaving_rows(undecided: np.ndarray, rows: np.ndarray, nears: np.ndarray) -> np.ndarray:
    """The undecided rows that are near to a row that is kept, sorted.

    Args:
        undecided: sorted.
        rows: the later row of each pair, an undecided one.
        nears: the earlier row of each pair; it is kept unless it is undecided.
    """
    is_open = _is_in(nears, undecided)
    leaves_now = np.zeros(len(undecided), bool)
    leaves_now[np.searchsorted(undecided, rows[~is_open])] = True
    later = np.searchsorted(undecided, rows[is_open])
    earlier = np.searchsorted(undecided, nears[is_open])
    # followers[bounds[k]:bounds[k + 1]] are the later neighbours of the undecided row k.
    order = np.argsort(earlier, kind="stable")
    bounds = np.searchsorted(earlier[order], np.arange(len(undecided) + 1)).tolist()
    followers = later[order].tolist()
    num_open = np.bincount(later, minlength=len(undecided)).tolist()
    leaves = leaves_now.tolist()
    # A row is ready when its fate is known: one of its neighbours is kept, or all have their fate.
    ready = [row for row, count in enumerate(num_open) if leaves[row] or not count]
    seen = set(ready)
    while ready:
        row = ready.pop()
        for follower in followers[bounds[row] : bounds[row + 1]]:
            num_open[follower] -= 1
            leaves[follower] |= not leaves[row]
            if (leaves[follower] or not num_open[follower]) and follower not in seen:
                seen.add(follower)
                ready.append(follower)
    return undecided[np.array(leaves, bool)]


def read_leaving(plan: IngestPlan, steps: dict[str, list[int]]) -> dict[int, str]:
    """Position of a removed row among the bucket's different ids -> id of the row kept for it.

    Args:
        plan: of the ingest.
        steps: `decided` and perhaps `settled` -> record batches of the bucket.
    """
    kept_ids: dict[int, str] = {}
    for step, numbers in steps.items():
        rows = read_step(plan, step, NEAR, SpillInput(index=0, batches={0: numbers}))
        places = (np.asarray(rows["row"]) & np.uint64(0xFFFFFFFF)).tolist()
        kept_ids.update(zip(places, rows["near_id"].to_pylist(), strict=True))
    return kept_ids


def _spill_leaving(plan: IngestPlan, step: str, leaving: pa.Table) -> SpillOutcome:
    with spill_output(step_uri(plan, step, 0, "arrow"), NEAR) as spill:
        spill.add(leaving, (np.asarray(leaving["row"]) >> np.uint64(32)).astype(np.int64))
        outcome = SpillOutcome(index=0, batches=spill.batches)
    return commit_spill(plan, step, outcome)


def _first_of_each(pairs: pa.Table) -> pa.Table:
    """For each row the pair whose earlier row has the smallest number."""
    rows, nears = np.asarray(pairs["row"]), np.asarray(pairs["near"])
    order = np.lexsort([nears, rows])
    _, first = np.unique(rows[order], return_index=True)
    return pairs.take(pa.array(order[first]))


def _is_in(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Whether each value is among the members, which are sorted."""
    if not len(members):
        return np.zeros(len(values), bool)
    places = np.searchsorted(members, values).clip(max=len(members) - 1)
    return members[places] == values
