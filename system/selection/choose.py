"""The rows of a category that a method puts first.

Rows are ordered by worth, equal ones by `sha256(seed:id)`.  Worth is nothing (`random`), the score
(`quality`), the score among rows that are different enough (`quality+diversity`), or the place in
the greedy cover (`facility-location`).  A smaller number of rows is a part of a larger one.

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
"""A row that cannot be ranked, and why."""

_WINDOW_ROWS = (4096, 131072)
"""Fewest and most candidates of `quality+diversity` in memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The first rows of a category, best first."""

    category: str
    supply: int
    """Rows that the category has."""
    ids: np.ndarray
    """[K, 16] uint8: content ids."""
    shard: np.ndarray
    """[K] int32: place in `Corpus.shards("train", category)`."""
    row: np.ndarray
    """[K] int32: row within the shard."""
    quarantined: pa.Table = field(default_factory=QUARANTINED.empty_table)
    """Rows that were met and can never be chosen."""
    notes: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that come last (`no-score`, ...) or were passed over (`too-similar`)."""


def choose_rows(
    corpus: Corpus,
    category: str,
    num_rows: int,
    settings: SelectConfig,
    seed: int,
    attempt: str = "",
) -> Chosen:
    """The first rows of a category; all that can be chosen where it has no more.

    Args:
        corpus: train rows are taken from it.
        category: one of its categories.
        num_rows: how many.
        settings: the method and what it goes by.
        seed: orders rows of equal worth.
        attempt: of stage `select`, where scores and vectors lie.

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
    held = Candidates(num_rows, seed)
    _stream(corpus, category, settings, attempt, held, tally)
    return _chosen(corpus, held.best(), tally)


def _choose_diverse(
    corpus: Corpus, category: str, num_rows: int, settings: SelectConfig, seed: int, attempt: str
) -> Chosen:
    tally = Tally(category)
    taken = DiverseRows(num_rows, settings.max_similarity)
    window = min(max(2 * num_rows, _WINDOW_ROWS[0]), _WINDOW_ROWS[1])
    parts: list[Rows] = []
    after: Key | None = None
    num_similar = 0
    while not taken.is_full:
        held = Candidates(window, seed, after)
        _stream(corpus, category, settings, attempt, held, tally if after is None else None)
        rows = held.best()
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
    """The units of a category's greedy cover, for `facility-location`.

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
    """The category's rows from the ranks of all its blocks."""
    held = Candidates(num_rows, seed)
    for part in ranked:
        text = part.ids.tobytes().hex()
        names = [text[start : start + 32] for start in range(0, len(text), 32)]
        held.add_ids(names, -part.key, part.shard, part.row)
    tally = Tally(category)
    for shard in corpus.shards("train", category):
        if count_vectors(attempt, shard) < shard.rows:
            _, has_vector = read_vectors(attempt, shard)
            ids = corpus.read_shard(shard, ["id"])["id"].filter(pa.array(~has_vector))
            tally.quarantine(ids.to_pylist(), NO_VECTOR)
    return _chosen(corpus, held.best(), tally)


class Tally:
    """Rows of a category that cannot be ranked, and why."""

    def __init__(self, category: str) -> None:
        self.category = category
        self._ids: list[str] = []
        self._reasons: list[str] = []
        self._notes: Counter[str] = Counter()

    def look(self, ids: pa.ChunkedArray, scores: pa.Table) -> None:
        """Takes what SELECTION_SCORES say about the rows with these ids."""
        if scores["reason"].null_count == scores.num_rows:
            return
        reasons = np.array(scores["reason"].to_pylist(), object)
        is_usable = np.asarray(scores["is_usable"])
        noted = reasons[is_usable]
        self._notes.update(str(reason) for reason in noted[noted != None])  # noqa: E711
        for place in np.flatnonzero(~is_usable).tolist():
            self.quarantine([ids[place].as_py()], str(reasons[place]))

    def quarantine(self, ids: Sequence[str], reason: str) -> None:
        """Takes rows that are never to be chosen."""
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
        """Reason -> rows that come behind all others."""
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
    held: Candidates,
    tally: Tally | None,
) -> None:
    """Shows every row of a category with its worth to the candidates."""
    for place, shard in enumerate(corpus.shards("train", category)):
        ids = corpus.read_shard(shard, ["id"])["id"]
        if not settings.uses_score:
            held.add(ids, np.zeros(shard.rows), np.arange(shard.rows, dtype=np.int32), place)
            continue
        scores = read_scores(corpus, shard, settings, attempt)
        is_usable = np.asarray(scores["is_usable"])
        worth = np.asarray(scores["score"].fill_null(0.0), np.float64)
        if settings.order == "lowest":
            worth = -worth
        worth = np.where(np.asarray(scores["reason"].is_null()), worth, -np.inf)
        if tally is not None:
            tally.look(ids, scores)
        rows = np.flatnonzero(is_usable).astype(np.int32)
        held.add(ids, worth[rows], rows, place)


def _vectors_of(
    corpus: Corpus, category: str, rows: Rows, attempt: str
) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] int8 and [N] bool for these rows, fetched shard by shard."""
    shards = corpus.shards("train", category)
    has_vector = np.zeros(len(rows.row), bool)
    found: np.ndarray | None = None
    for number in np.unique(rows.shard).tolist():
        places = np.flatnonzero(rows.shard == number)
        vectors, has = read_vectors(attempt, shards[number])
        has_vector[places] = has[rows.row[places]]
        if not has.any():
            continue
        if found is None:
            found = np.zeros((len(rows.row), vectors.shape[1]), np.int8)
        if vectors.shape[1] != found.shape[1]:
            raise dimensions_differ(category, found.shape[1], vectors.shape[1])
        found[places] = vectors[rows.row[places]]
    return (np.zeros((len(rows.row), 1), np.int8) if found is None else found), has_vector
