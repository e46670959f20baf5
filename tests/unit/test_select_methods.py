"""Which rows the methods choose: equal to their definitions, whatever the shards."""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_world import corpus_of, hex_id, make_features, rows

from system.config import SelectConfig
from system.data.corpus import Corpus
from system.errors import DataError
from system.selection import candidates, choose, coverage, diversity, select
from system.selection.choose import Chosen, choose_rows
from system.selection.coverage import rank_greedily, similarities
from system.selection.diversity import DiverseRows
from system.selection.select import StageQuota, check_chosen
from system.selection.vectors import cosines, quantise, spread

SCORES = st.lists(
    st.one_of(
        st.none(),
        st.sampled_from([float("nan"), float("inf"), 0.0, -0.0]),
        st.integers(-3, 3).map(float),
        st.floats(-1e9, 1e9),
    ),
    min_size=1,
    max_size=60,
)
DIVERSE = SelectConfig(method="quality+diversity", embedding="column", max_similarity=0.5)
COVER = SelectConfig(method="facility-location", embedding="column", block_rows=16)


def ids_of(chosen: Chosen) -> list[str]:
    return [bytes(row).hex() for row in chosen.ids]


def seeded(row_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{row_id}".encode()).digest()


def by_score(scores: list[float | None], order: str, seed: int) -> list[int]:
    """The definition: usable rows, best score first, those without one last, ties by digest."""
    sign = -1.0 if order == "highest" else 1.0
    usable = [k for k, score in enumerate(scores) if score is None or math.isfinite(score)]
    return sorted(
        usable,
        key=lambda k: (
            scores[k] is None,
            0.0 if scores[k] is None else sign * scores[k],  # type: ignore[operator]
            seeded(hex_id(k), seed),
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    scores=SCORES,
    order=st.sampled_from(["highest", "lowest"]),
    quota=st.integers(0, 70),
    shard_rows=st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_quality_is_its_definition_for_any_shards(scores, order, quota, shard_rows, seed):
    rule = SelectConfig(method="quality", order=order)
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpus_of(folder, shard_rows, rows(len(scores), score=scores))
        chosen = choose_rows(corpus, "a", quota, rule, seed)
    assert ids_of(chosen) == [hex_id(k) for k in by_score(scores, order, seed)[:quota]]
    poison = [hex_id(k) for k, s in enumerate(scores) if s is not None and not math.isfinite(s)]
    assert chosen.quarantined["id"].to_pylist() == sorted(poison)
    assert set(chosen.quarantined["reason"].to_pylist()) <= {"score-not-finite"}
    assert chosen.notes.get("no-score", 0) == scores.count(None)


@settings(max_examples=100, deadline=None)
@given(
    priority=st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=80),
    quota=st.integers(0, 90),
    cut=st.integers(1, 20),
    start=st.integers(-1, 79),
)
def test_pruned_candidates_are_the_sorted_rows(priority, quota, cut, start):
    names = [hex_id(k) for k in range(len(priority))]
    order = sorted(range(len(priority)), key=lambda k: (-priority[k], seeded(names[k], 1)))
    after = None
    if start >= 0:
        last = order[min(start, len(order) - 1)]
        digest = seeded(names[last], 1)
        halves = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
        after = (priority[last], *halves)
        order = order[min(start, len(order) - 1) + 1 :]
    slack, candidates._PRUNE_SLACK = candidates._PRUNE_SLACK, 0
    try:
        held = candidates.Candidates(quota, 1, after)
        for first in range(0, len(names), cut):
            part = slice(first, first + cut)
            some = np.arange(len(names))[part].astype(np.int32)
            held.add_ids(names[part], np.array(priority)[part], some, some)
        best = held.best()
    finally:
        candidates._PRUNE_SLACK = slack
    assert best.row.tolist() == order[:quota]


def reference_diverse(order: list[int], vectors: np.ndarray, limit: float) -> list[int]:
    taken: list[int] = []
    for k in order:
        if all(cosines(vectors[k : k + 1], vectors[j : j + 1])[0, 0] <= limit for j in taken):
            taken.append(k)
    return taken


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 50),
    quota=st.integers(1, 50),
    shard_rows=st.integers(1, 30),
    limit=st.sampled_from([0.3, 0.5, 0.9, 1.0]),
)
def test_diverse_rows_are_one_greedy_pass_over_the_whole_category(
    data, count, quota, shard_rows, limit
):
    vectors = data.draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=count,
                 max_size=count)
    )  # fmt: skip
    scores = data.draw(st.lists(st.integers(0, 4).map(float), min_size=count, max_size=count))
    rule = SelectConfig(method="quality+diversity", embedding="column", max_similarity=limit)
    table = rows(count, score=scores, vectors=vectors)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_WINDOW_ROWS", (7, 7))
        patch.setattr(diversity, "_BLOCK_ROWS", 3)
        patch.setattr(diversity, "_CHUNK_ROWS", 4)
        corpus = corpus_of(folder, shard_rows, table)
        make_features(corpus, rule, folder)
        chosen = choose_rows(corpus, "a", quota, rule, 2, folder)
    kept = quantise(spread(np.array(vectors, float)))
    order = by_score(scores, "highest", 2)
    expected = reference_diverse(order, kept, limit)[:quota]
    assert ids_of(chosen) == [hex_id(k) for k in expected]
    last = order.index(expected[-1]) + 1 if len(expected) == quota else len(order)
    assert chosen.notes["too-similar"] == last - len(expected)
    pairs = cosines(kept[expected], kept[expected])
    np.fill_diagonal(pairs, 0.0)
    assert (pairs <= limit).all()


def test_rows_without_a_vector_are_quarantined_and_never_chosen(tmp_path):
    vectors = [None if k % 5 == 0 else [float(k), 1.0] for k in range(40)]
    for rule in (DIVERSE.model_copy(update={"max_similarity": 1.0}), COVER):
        folder = tmp_path / rule.method
        corpus = corpus_of(folder, 9, rows(40, score=[1.0] * 40, vectors=vectors))
        make_features(corpus, rule, str(folder))
        chosen = choose_rows(corpus, "a", 40, rule, 0, str(folder))
        lost = sorted(hex_id(k) for k in range(0, 40, 5))
        assert chosen.quarantined["id"].to_pylist() == lost
        assert set(chosen.quarantined["reason"].to_pylist()) == {"no-vector"}
        assert sorted(ids_of(chosen)) == sorted({hex_id(k) for k in range(40)} - set(lost))


def test_vectors_of_different_lengths_are_an_error(tmp_path):
    vectors = [[1.0, 2.0]] * 20 + [[1.0, 2.0, 3.0]] * 20
    mixed = corpus_of(tmp_path / "m", 40, rows(40, score=[1.0] * 40, vectors=vectors))
    with pytest.raises(DataError, match="one length"):
        make_features(mixed, COVER, str(tmp_path / "m"))
    tables = [rows(20, score=[1.0] * 20, vectors=vectors[:20])]
    tables.append(rows(20, start=20, score=[1.0] * 20, vectors=vectors[20:]))
    joined = corpus_of(tmp_path / "j", 1, *tables)
    for rule in (DIVERSE, COVER):
        make_features(joined, rule, str(tmp_path / "j"))
        with pytest.raises(DataError, match="one length"):
            choose_rows(joined, "a", 20, rule, 0, str(tmp_path / "j"))


def naive_greedy(alike: np.ndarray, count: int) -> list[int]:
    taken: list[int] = []
    covered = np.zeros(len(alike), np.int64)
    for _ in range(count):
        gains = [
            -1 if k in taken else int(np.maximum(alike[k], covered).sum() - covered.sum())
            for k in range(len(alike))
        ]
        best = int(np.argmax(gains))
        taken.append(best)
        covered = np.maximum(covered, alike[best])
    return taken


VECTORS = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=n, max_size=n)
)


@settings(max_examples=150, deadline=None)
@given(vectors=VECTORS, data=st.data())
def test_the_lazy_greedy_is_the_greedy_and_keeps_its_bound(vectors, data):
    count = data.draw(st.integers(1, len(vectors)))
    kept = quantise(spread(np.array(vectors, float)))
    alike = similarities(kept).astype(np.int64)
    order = rank_greedily(kept, count).tolist()
    assert order == naive_greedy(alike, count)
    best = max(
        int(alike[list(some)].max(axis=0).sum())
        for some in itertools.combinations(range(len(vectors)), count)
    )
    assert coverage.coverage(kept, order) >= (1 - 1 / math.e) * best


def test_one_block_is_the_greedy_over_the_whole_category(tmp_path):
    draw = np.random.default_rng(3)
    vectors = draw.normal(size=(30, 6)).tolist()
    rule = COVER.model_copy(update={"block_rows": 32})
    corpus = corpus_of(tmp_path, 7, rows(30, vectors=vectors))
    make_features(corpus, rule, str(tmp_path))
    names = sorted(hex_id(k) for k in range(30))
    place = {hex_id(k): k for k in range(30)}
    kept = quantise(spread(np.array(vectors)))[[place[name] for name in names]]
    chosen = choose_rows(corpus, "a", 8, rule, 0, str(tmp_path))
    assert ids_of(chosen) == [names[k] for k in rank_greedily(kept, 8)]


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 150),
    quota=st.integers(1, 160),
    shard_rows=st.tuples(st.integers(20, 60), st.integers(8, 60)),
    seed=st.integers(0, 99),
)
def test_the_cover_does_not_depend_on_shards_and_nests(count, quota, shard_rows, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 5)).tolist()
    found = []
    for size in shard_rows:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(coverage, "UNIT_ROWS", 40)
            corpus = corpus_of(folder, size, rows(count, vectors=vectors))
            make_features(corpus, COVER, folder)
            chosen = ids_of(choose_rows(corpus, "a", quota, COVER, seed, folder))
            whole = ids_of(choose_rows(corpus, "a", count, COVER, seed, folder))
        assert len(whole) == len(set(whole)) == count
        assert chosen == whole[:quota]
        found.append(chosen)
    assert found[0] == found[1]
    num_blocks = -(-count // COVER.block_rows)
    sizes, taken = np.zeros(num_blocks), np.zeros(num_blocks)
    for counted, names in ((sizes, [hex_id(k) for k in range(count)]), (taken, found[0])):
        for name in names:
            counted[int(name[:8], 16) * num_blocks >> 32] += 1
    share = min(quota, count) / count
    assert (np.abs(taken - share * sizes) <= 1.0 + num_blocks / 2 * sizes / count).all()


def test_tf_idf_vectors_tell_topics_apart_and_not_shards(tmp_path):
    animals = [f"the {a} eats {b} in the zoo" for a in ("lion", "tiger") for b in ("meat", "fish")]
    sums = [f"the sum of {a} and {b} makes {a + b}" for a in (3, 4) for b in (7, 8)]
    table = rows(8, score=[1.0] * 8, texts=animals + sums)
    rule = SelectConfig(method="facility-location", block_rows=16)
    found = []
    for size in (3, 8):
        corpus = corpus_of(tmp_path / str(size), size, table)
        make_features(corpus, rule, str(tmp_path / str(size)))
        parts = [
            choose.read_vectors(str(tmp_path / str(size)), shard)[0]
            for shard in corpus.shards("train", "a")
        ]
        found.append(np.concatenate(parts))
        two = ids_of(choose_rows(corpus, "a", 2, rule, 0, str(tmp_path / str(size))))
        assert {hex_id(k) in two for k in range(4)} == {True, False}, "one row of each topic"
        assert {hex_id(k) in two for k in range(4, 8)} == {True, False}
    assert np.array_equal(found[0], found[1])
    place = {name: k for k, name in enumerate(table["id"].to_pylist())}
    within = cosines(found[0], found[0])[place[hex_id(0)], place[hex_id(1)]]
    across = cosines(found[0], found[0])[place[hex_id(0)], place[hex_id(5)]]
    assert within > across + 0.2


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda d: st.lists(
            st.lists(st.floats(-1e3, 1e3), min_size=d, max_size=d), min_size=1, max_size=12
        )
    )
)
def test_turned_vectors_keep_their_cosines(vectors):
    given_ND = np.array(vectors)
    turned = spread(given_ND)
    size = turned.shape[1]
    np.testing.assert_allclose(turned @ turned.T, size * given_ND @ given_ND.T, atol=1e-6 * size)


@pytest.mark.parametrize("size", [300, 2000])
def test_cosines_of_stored_vectors_are_exact_for_any_blocks(size):
    kept = np.random.default_rng(0).integers(-127, 128, (40, size)).astype(np.int8)
    whole = cosines(kept, kept)
    for rows_of in (1, 7):
        parts = [cosines(kept[k : k + rows_of], kept) for k in range(0, 40, rows_of)]
        assert np.array_equal(np.concatenate(parts), whole)
    exact = kept.astype(object) @ kept.T.astype(object)
    squares = np.diag(exact).astype(float)
    assert np.array_equal(whole, exact.astype(float) / np.sqrt(np.outer(squares, squares)))
    assert (np.diag(whole) == 1.0).all()


def chosen_of(corpus: Corpus, rule: SelectConfig, quota: int, attempt: Path) -> dict[str, Chosen]:
    return {"a": choose_rows(corpus, "a", quota, rule, 0, str(attempt))}


def test_a_quota_above_what_can_be_chosen_repeats_or_is_refused(tmp_path):
    vectors = [[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 10
    corpus = corpus_of(tmp_path, 40, rows(40, score=[1.0] * 40, vectors=vectors))
    make_features(corpus, DIVERSE, str(tmp_path))
    quotas = (StageQuota(name="s", counts={"a": 5}),)
    chosen = chosen_of(corpus, DIVERSE, 5, tmp_path)
    assert len(chosen["a"].row) == 2
    check_chosen(quotas, chosen, DIVERSE)
    arranged = select.arrange(corpus, quotas, chosen, 0)
    assert arranged.repeats == {"a": 3}
    assert len(set(arranged.row.tolist())) == 2
    with pytest.raises(DataError, match=r"2 of its 40 train rows can be chosen.*max_similarity"):
        check_chosen(quotas, chosen, DIVERSE.model_copy(update={"repeats": False}))


def test_too_many_poison_scores_end_the_stage_and_name_rows(tmp_path):
    scores = [float("nan")] * 10 + [1.0] * 90
    corpus = corpus_of(tmp_path, 30, rows(100, score=scores))
    rule = SelectConfig(method="quality")
    quotas = (StageQuota(name="s", counts={"a": 5}),)
    chosen = chosen_of(corpus, rule, 5, tmp_path)
    with pytest.raises(DataError, match=r"10 of 100 .*score-not-finite.*select\.score: column"):
        check_chosen(quotas, chosen, rule)
    check_chosen(quotas, chosen, rule.model_copy(update={"max_quarantined_share": 0.1}))


def test_a_taken_row_is_never_above_the_limit_even_with_itself_repeated():
    taken = DiverseRows(10, 0.9)
    places, seen = taken.offer(np.array([[10, 0], [10, 0], [0, 10], [10, 1]], np.int8))
    assert (places.tolist(), seen) == ([0, 2], 4)
