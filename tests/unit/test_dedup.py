from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_builders import ingest, numbered, run_config, write_lines

from system.config import SourceConfig
from system.data.duplicates.dedup import split_by_category
from system.data.duplicates.near import min_agreeing_bins, rows_per_band, signatures
from system.data.duplicates.shingles import NUM_BINS, find_words, mix, ngrams
from system.data.ingest.ingest import plan_ingest
from system.data.rows.benchmarks import BenchmarkIndex

VOCABULARY = [f"word{k}" for k in range(3000)]


def text_of(draw: random.Random, count: int = 120) -> list[str]:
    return [draw.choice(VOCABULARY) for _ in range(count)]


def changed(words: list[str], draw: random.Random, share: float) -> list[str]:
    return [draw.choice(VOCABULARY) if draw.random() < share else word for word in words]


def jaccard(one: list[str], two: list[str]) -> float:
    sets = [{tuple(words[k : k + 5]) for k in range(len(words) - 4)} for words in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_words_ignore_case_and_punctuation_and_cjk_characters_stand_alone():
    words = find_words(["Hello, world! (hello)", "", "日本 abc日", "  ", "CAFÉ café", "日"])
    rows = [words.hashes[words.rows == row].tolist() for row in range(6)]
    assert [len(row) for row in rows] == [3, 0, 4, 0, 2, 1]
    assert rows[0][0] == rows[0][2] != rows[0][1]
    assert rows[2][0] == rows[2][3] == rows[5][0]
    assert rows[4][0] == rows[4][1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab é日.", max_size=20), max_size=6), st.integers(1, 4))
def test_ngrams_of_many_texts_are_those_of_each_alone(texts, size):
    grams, rows = ngrams(find_words(texts), size, keep_short=True)
    for row, text in enumerate(texts):
        alone, _ = ngrams(find_words([text]), size, keep_short=True)
        assert grams[rows == row].tolist() == alone.tolist()
        num_words = len(find_words([text]).hashes)
        assert len(alone) == (max(num_words - size + 1, 1) if num_words else 0)


def test_word_hashes_never_change():
    assert find_words(["abc"]).hashes.tolist() == [7656036035725422873]
    assert mix(np.array([1], np.uint64)).tolist() == [0x5692161D100B05E5]


def test_signatures_estimate_the_jaccard_similarity_without_bias():
    draw = random.Random(1)
    pairs = []
    for _ in range(400):
        one = text_of(draw, draw.choice([8, 30, 200]))
        pairs.append((one, changed(one, draw, draw.choice([0.01, 0.03, 0.1]))))
    truth = np.array([jaccard(*pair) for pair in pairs])
    found = [signatures([" ".join(pair[side]) for pair in pairs]) for side in (0, 1)]
    estimate = (found[0] == found[1]).mean(axis=1)
    deviation = estimate - truth
    expected = np.sqrt(np.mean(truth * (1 - truth)) / NUM_BINS)
    assert abs(deviation.mean()) < 3 * expected / np.sqrt(len(pairs))
    assert np.sqrt((deviation**2).mean()) < 1.2 * expected


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    size = rows_per_band(threshold)
    assert 1 - (1 - threshold**size) ** (NUM_BINS // size) >= 0.99
    assert rows_per_band(1.0) == NUM_BINS


@pytest.mark.parametrize(
    ("similarity", "share"), [(0.70, 0.005), (0.75, 0.1), (0.8, 0.51), (0.85, 0.94), (0.88, 0.995)]
)
def test_pairs_are_found_as_often_as_the_documentation_says(similarity, share):
    draw = np.random.default_rng(0)
    same = draw.random((20_000, NUM_BINS)) < similarity
    size = rows_per_band(0.8)
    bands = same[:, : NUM_BINS // size * size].reshape(len(same), -1, size)
    is_compared = bands.all(axis=2).any(axis=1)
    agree = (same | (draw.random(same.shape) < 1 / 256)).sum(axis=1)
    found = is_compared & (agree >= min_agreeing_bins(0.8))
    assert found.mean() == pytest.approx(share, abs=0.01)


def near_world(seed: int) -> tuple[list[dict[str, str]], list[tuple[str, str, float]]]:
    """Rows in random order, and planted pairs (first prompt, second prompt, similarity)."""
    draw = random.Random(seed)
    rows, pairs = [], []
    for k in range(150):
        prompt = f"start{k} " + " ".join(text_of(draw))
        rows.append({"prompt": prompt, "completion": f"end{k}"})
        if k % 2:
            other = " ".join([prompt.split()[0], *changed(prompt.split()[1:], draw, 0.012)])
            words = [f"{text} end{k}".split() for text in (prompt, other)]
            rows.append({"prompt": other, "completion": f"end{k}"})
            pairs.append((prompt, other, jaccard(*words)))
    draw.shuffle(rows)
    return rows, pairs


def test_near_duplicates_go_and_everything_else_stays(tmp_path):
    rows, pairs = near_world(0)
    write_lines(tmp_path / "rows.jsonl", rows)
    done = ingest(tmp_path, deduplicate="near", near_threshold=0.8)
    kept = {turns[0][1]: row["split"] for turns, row in zip(done.turns(), done.rows(), strict=True)}
    clear = [pair for pair in pairs if pair[2] > 0.9]
    assert len(clear) > 15
    for one, two, _ in clear:
        assert len({one, two} & set(kept)) == 1
    apart = [pair for pair in pairs if pair[2] < 0.65]
    for one, two, _ in apart:
        assert {one, two} <= set(kept)
    near_rows = [row for row in done.duplicates() if row["kind"] == "near"]
    assert done.manifest.details["duplicates"].get("near") == len(near_rows)
    assert done.manifest.read == done.manifest.kept + done.manifest.duplicates
    by_prompt = {pair[side]: pair for pair in pairs for side in (0, 1)}
    ids = {row["id"] for row in done.rows()}
    for row in near_rows:
        assert rows[row["row"]]["prompt"] in by_prompt
        assert row["id"] in ids


def test_near_duplicates_of_heldout_rows_never_train(tmp_path):
    rows, pairs = near_world(3)
    write_lines(tmp_path / "rows.jsonl", rows)
    shares = {"estimate_share": 0.3, "test_share": 0.3}
    exact = ingest(tmp_path, **shares)
    split = {
        turns[0][1]: row["split"] for turns, row in zip(exact.turns(), exact.rows(), strict=True)
    }
    done = ingest(tmp_path, deduplicate="near", **shares)
    kept = {turns[0][1] for turns in done.turns()}
    rank = {"test": 0, "estimate": 1, "train": 2}
    across = 0
    for one, two, similarity in pairs:
        if similarity > 0.9 and split[one] != split[two]:
            first, second = sorted((one, two), key=lambda prompt: rank[split[prompt]])
            assert first in kept and second not in kept
            across += 1
    assert across > 5


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("shards/")}


def test_near_deduplication_does_not_depend_on_the_cut(tmp_path, monkeypatch):
    rows, _ = near_world(5)
    write_lines(tmp_path / "rows.jsonl", rows)
    whole = ingest(tmp_path, deduplicate="near").files()
    assert whole == ingest(tmp_path, deduplicate="near", chunk_bytes=9000).files()
    kept = [row["id"] for row in ingest(tmp_path, deduplicate="near").rows()]
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 20_000)
    many = ingest(tmp_path, deduplicate="near", chunk_bytes=9000)
    assert plan_ingest(run_config(tmp_path), "").num_buckets > 3
    assert [row["id"] for row in many.rows()] == kept
    assert shards(many.files()) == shards(whole)


def test_texts_without_a_word_are_never_near_duplicates(tmp_path):
    rows = [{"prompt": mark * k, "completion": "!"} for mark in "?!." for k in range(1, 6)]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert ingest(tmp_path, deduplicate="near").manifest.kept == 15


def test_train_rows_that_share_words_with_a_benchmark_are_rejected(tmp_path):
    draw = random.Random(0)
    secret = text_of(draw, 40)
    (tmp_path / "bench.txt").write_text("intro\n" + " ".join(secret) + "\n")
    write_lines(tmp_path / "bench.jsonl", [{"deep": [{"x": " ".join(text_of(draw, 30))}]}])
    rows = numbered(60)
    for k in range(0, 60, 2):
        part = secret[k % 20 : k % 20 + 13]
        rows[k] = {"prompt": f"{k} so: {', '.join(part).upper()}?", "completion": "yes"}
    rows[1] = {"prompt": "short " + " ".join(secret[:12]), "completion": "kept"}
    write_lines(tmp_path / "rows.jsonl", rows)
    heldout = [row for row in ingest(tmp_path).rows() if row["split"] != "train"]
    done = ingest(tmp_path, benchmarks=("bench.txt", "bench.jsonl"))
    rejected = done.rejected()
    assert {row["reason"] for row in rejected} == {"benchmark-overlap"}
    assert all(row["row"] % 2 == 0 for row in rejected)
    assert all("bench.txt" in row["detail"] for row in rejected)
    assert {row["id"] for row in heldout} <= {row["id"] for row in done.rows()}
    overlapping_heldout = sum(" so: " in row["messages"][0]["content"] for row in heldout)
    assert len(rejected) == 30 - overlapping_heldout
    assert overlapping_heldout > 0


def test_benchmarks_are_looked_for_in_many_rows_at_once(tmp_path, monkeypatch):
    draw = random.Random(0)
    secret = text_of(draw, 60)
    (tmp_path / "bench.txt").write_text(" ".join(secret))
    index = BenchmarkIndex((str(tmp_path / "bench.txt"),), 5)
    rows = [[" ".join(text_of(draw, 30)), "short"] for _ in range(300)]
    for row in range(0, 300, 7):
        start = draw.randrange(50)
        rows[row][row % 2] += " " + " ".join(secret[start : start + draw.randrange(5, 10)])
    alone = {k: found for k, row in enumerate(rows) for found in index.find([row]).values()}
    calls = []
    monkeypatch.setattr(
        "system.data.rows.benchmarks.find_words", lambda texts: calls.append(0) or find_words(texts)
    )
    assert index.find(rows) == alone
    assert list(alone) == list(range(0, 300, 7))
    assert len(calls) == 1
    monkeypatch.setattr("system.data.rows.benchmarks._SEARCHED_CHARS", 3000)
    assert index.find(rows) == alone
    assert len(calls) > 20


def test_rows_are_grouped_by_split_and_category_in_their_order():
    table = pa.table(
        {
            "id": list("abcdef"),
            "category": ["y", "x", None, "y", "x", "y"],
            "split": pa.array([0, 0, 0, 2, 0, 0], pa.int8()),
        }
    )
    found = [(s, c, rows["id"].to_pylist()) for s, c, rows in split_by_category(table)]
    assert found == [
        ("train", "x", ["b", "e"]),
        ("train", "y", ["a", "f"]),
        ("train", None, ["c"]),
        ("test", "y", ["d"]),
    ]


def test_sources_are_deduplicated_against_each_other(tmp_path):
    rows, _ = near_world(8)
    write_lines(tmp_path / "a.jsonl", rows)
    lower = [{key: value.upper() for key, value in row.items()} for row in rows]
    write_lines(tmp_path / "b.jsonl", lower)
    sources = [SourceConfig(path=f"{name}.jsonl", category=name) for name in "ab"]
    shares = {"estimate_share": 0.0, "test_share": 0.0, "min_heldout_rows": 1}
    done = ingest(
        tmp_path, *[s.model_copy(update={"category": None}) for s in sources],
        deduplicate="near", **shares,
    )  # fmt: skip
    assert {row["source"] for row in done.rows()} == {"a"}
