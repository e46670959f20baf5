"""Chooses the first rows of a category, in the order of `select.method`.

Rows are ordered by priority, and rows of equal priority by `sha256(seed:id)`.  The priority depends
on the method:

    random              the same for all rows
    quality             the score
    quality+diversity   the score; rows too similar to a better one are left out
    facility-location   the place in the greedy cover

A smaller number of rows is always a subset of a larger one.  Called by `actors.selector`, and by
`system.selection.select` for the arms of stage `evaluate`.

Memory: at most 2 K + 65,536 candidates of 48 bytes for K rows; with `quality+diversity` also K
vectors and one window of candidates.  Scores and ids are streamed shard by shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from system.config import SelectConfig
from system.data.corpus import Corpus
from system.selection.candidates import Candidates, Key, Rows
from system.selection.coverage import CoverUnit, Ranked, plan_cover, rank_unit
from system.selection.diversity import DiverseRows
from system.selection.embed import count_vectors, dimensions_differ, read_vectors
from system.selection.scores import read_scores

NO_VECTOR = "no-vector"
TOO_SIMILAR = "too-similar"

QUARANTINED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""Table of rows that cannot be ranked, with the reason."""

_WINDOW_ROWS = (4096, 131072)
"""Smallest and largest number of candidates that `quality+diversity` holds in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The first rows of a category, best first."""

    category: str
    supply: int
    """Number of train rows of the category."""
    ids: np.ndarray
    """[K, 16] uint8: content ids."""
    shard: np.ndarray
    """[K] int32: place in `Corpus.shards("train", category)`."""
    row: np.ndarray
    """[K] int32: row within the shard."""
    quarantined: pa.Table = field(default_factory=QUARANTINED.empty_table)
    """Rows that can never be chosen, with their reasons."""
    notes: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows that come last (`no-score`, ...) or are left out (`too-similar`)."""


def choose_rows(
    corpus: Corpus,
    category: str,
    num_rows: int,
    settings: SelectConfig,
    seed: int,
    attempt: str = "",
) -> Chosen:
    """Chooses the first rows of a category; all usable rows when there are fewer.

    Args:
        corpus: its train rows are used.
        category: one of its categories.
        num_rows: number of rows to choose.
        settings: the method and its settings.
        seed: seed of the order among rows of equal priority.
        attempt: attempt of stage `select` that holds scores and vectors.

    Raises:
        DataError: scores or vectors are missing.
    """
    match settings.method:
        case "random" | "quality":
            return _choose_ranked(corpus, category, num_rows, settings, seed, attempt)
        case "quality+diversity":
            return _choose_diverse(corpus, category, num_rows, settings, seed, attempt)
        case "facility-location":
            units = cover_units(corpus, category, num_rows, settings, attempt)
            ranked = (rank_unit(corpus, unit, attempt) for unit in units)
            return merge_ranked(corpus, category, num_rows, ranked, seed, attempt)


def _choose_ranked(
    corpus: Corpus, category: str, num_rows: int, settings: SelectConfig, seed: int, attempt: str
) -> Chosen:
    tally = Tally(category)
    candidates = Candidates(num_rows, seed)
    _stream(corpus, category, settings, attempt, candidates, tally)
    return _chosen(corpus, candidates.best(), tally)


def _choose_diverse(
    corpus: Corpus, category: str, num_rows: int, settings: SelectConfig, seed: int, attempt: str
) -> Chosen:
    tally = Tally(category)
    taken = DiverseRows(num_rows, settings.max_similarity)
    window = min(max(2 * num_rows, _WINDOW_ROWS[0]), _WINDOW_ROWS[1])
    parts: list[Rows] = []
    after: Key | None = None
    num_similar = 0
    # Every window is one pass over the category, from where the last one ended: memory stays
    # bounded, and the outcome is that of one pass in order.
    while not taken.is_full:
        candidates = Candidates(window, seed, after)
        _stream(corpus, category, settings, attempt, candidates, tally if after is None else None)
        rows = candidates.best()
        if not len(rows.row):
            break
        vectors, has_vector = _vectors_of(corpus, category, rows, attempt)
        tally.quarantine(rows.hex_ids(~has_vector), NO_VECTOR)
        offered = np.flatnonzero(has_vector)
        if len(offered):
            places, num_seen = taken.offer(vectors[offered])
            parts.append(rows.take(offered[places]))
            num_similar += num_seen - len(places)
        if len(rows.row) < window:
            break
        after = rows.key(-1)
    return _chosen(corpus, Rows.joined(parts), tally, {TOO_SIMILAR: num_similar})


def cover_units(
    corpus: Corpus, category: str, num_rows: int, settings: SelectConfig, attempt: str
) -> list[CoverUnit]:
    """The work units of a category's greedy cover, for `facility-location`.

    Raises:
        DataError: vectors are missing.
    """
    shards = corpus.shards("train", category)
    return plan_cover(
        category,
        supply=sum(shard.rows for shard in shards),
        available=sum(count_vectors(attempt, shard) for shard in shards),
        quota=num_rows,
        block_rows=settings.block_rows,
    )


def merge_ranked(
    corpus: Corpus,
    category: str,
    num_rows: int,
    ranked: Iterable[Ranked],
    seed: int,
    attempt: str,
) -> Chosen:
    """Merges the ranks of all work units of a category and chooses its first rows."""
    candidates = Candidates(num_rows, seed)
    for part in ranked:
        text = part.ids.tobytes().hex()
        names = [text[start : start + 32] for start in range(0, len(text), 32)]
        candidates.add_ids(names, -part.key, part.shard, part.row)
    tally = Tally(category)
    for shard in corpus.shards("train", category):
        if count_vectors(attempt, shard) < shard.rows:
            _, has_vector = read_vectors(attempt, shard)
            ids = corpus.read_shard(shard, ["id"])["id"].filter(pa.array(~has_vector))
            tally.quarantine(ids.to_pylist(), NO_VECTOR)
    return _chosen(corpus, candidates.best(), tally)


class Tally:
    """Collects the rows of a category that cannot be ranked, with their reasons."""

    def __init__(self, category: str) -> None:
        self.category = category
        self._ids: list[str] = []
        self._reasons: list[str] = []
        self._notes: Counter[str] = Counter()

    def add_scores(self, ids: pa.ChunkedArray, scores: pa.Table) -> None:
        """Adds the reasons in SELECTION_SCORES of the rows with these ids."""
        if scores["reason"].null_count == scores.num_rows:
            return
        reasons = np.array(scores["reason"].to_pylist(), object)
        is_usable = np.asarray(scores["is_usable"])
        usable_reasons = reasons[is_usable]
        has_reason = usable_reasons != None  # noqa: E711
        self._notes.update(str(reason) for reason in usable_reasons[has_reason])
        for place in np.flatnonzero(~is_usable).tolist():
            self.quarantine([ids[place].as_py()], str(reasons[place]))

    def quarantine(self, ids: Sequence[str], reason: str) -> None:
        """Adds rows that must never be chosen."""
        self._ids += ids
        self._reasons += [reason] * len(ids)

    def table(self) -> pa.Table:
        """The quarantined rows, ordered by id."""
        order = sorted(range(len(self._ids)), key=lambda place: self._ids[place])
        columns = {
            "id": [self._ids[place] for place in order],
            "category": [self.category] * len(order),
            "reason": [self._reasons[place] for place in order],
        }
        return pa.table(columns, schema=QUARANTINED)

    def notes(self) -> dict[str, int]:
        """Reason -> number of rows that come after all others."""
        return dict(sorted(self._notes.items()))


def _chosen(
    corpus: Corpus, rows: Rows, tally: Tally, more_notes: Mapping[str, int] | None = None
) -> Chosen:
    return Chosen(
        category=tally.category,
        supply=corpus.num_rows("train", tally.category),
        ids=rows.ids,
        shard=rows.shard,
        row=rows.row,
        quarantined=tally.table(),
        notes={**tally.notes(), **(more_notes or {})},
    )


def _stream(
    corpus: Corpus,
    category: str,
    settings: SelectConfig,
    attempt: str,
    candidates: Candidates,
    tally: Tally | None,
) -> None:
    """Offers every row of a category, with its priority, to the candidates."""
    for place, shard in enumerate(corpus.shards("train", category)):
        ids = corpus.read_shard(shard, ["id"])["id"]
        if not settings.uses_score:
            rows = np.arange(shard.rows, dtype=np.int32)
            candidates.add(ids, np.zeros(shard.rows), rows, place)
            continue
        scores = read_scores(corpus, shard, settings, attempt)
        is_usable = np.asarray(scores["is_usable"])
        priority = np.asarray(scores["score"].fill_null(0.0), np.float64)
        if settings.order == "lowest":
            priority = -priority
        priority = np.where(np.asarray(scores["reason"].is_null()), priority, -np.inf)
        if tally is not None:
            tally.add_scores(ids, scores)
        rows = np.flatnonzero(is_usable).astype(np.int32)
        candidates.add(ids, priority[rows], rows, place)


def _vectors_of(
    corpus: Corpus, category: str, rows: Rows, attempt: str
) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] int8 vectors of these rows and [N] bool which have one, read shard by shard."""
    shards = corpus.shards("train", category)
    has_vector = np.zeros(len(rows.row), bool)
    vectors: np.ndarray | None = None
    for number in np.unique(rows.shard).tolist():
        places = np.flatnonzero(rows.shard == number)
        shard_vectors, shard_has = read_vectors(attempt, shards[number])
        has_vector[places] = shard_has[rows.row[places]]
        # A shard without any vector has no dimension that could be compared.
        if not shard_has.any():
            continue
        if vectors is None:
            vectors = np.zeros((len(rows.row), shard_vectors.shape[1]), np.int8)
        if shard_vectors.shape[1] != vectors.shape[1]:
            raise dimensions_differ(category, vectors.shape[1], shard_vectors.shape[1])
        vectors[places] = shard_vectors[rows.row[places]]
    return (np.zeros((len(rows.row), 1), np.int8) if vectors is None else vectors), has_vector
