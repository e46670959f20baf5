from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_builders import Ingested, chained_rows, ingest, run_config, write_lines

from system.data.duplicates import near_compare
from system.data.duplicates.near import leaving_rows
from system.data.duplicates.shingles import NUM_BINS
from system.data.ingest.ingest import ingest_local

ALL_TRAIN: dict[str, Any] = {"deduplicate": "near", "estimate_share": 0.0, "test_share": 0.0}


def kept_prompts(done: Ingested) -> list[str]:
    return [turns[0][1] for turns in done.turns()]


def outcome_of(done: Ingested) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return done.rows(), sorted(done.duplicates(), key=lambda row: (row["file"], row["row"]))


def test_a_row_leaves_only_for_a_row_that_stays(tmp_path):
    rows = chained_rows(12, 3)
    write_lines(tmp_path / "rows.jsonl", [*rows, *rows[1::3]])
    done = ingest(tmp_path, **ALL_TRAIN)
    stays = {row["id"]: turns[0][1] for row, turns in zip(done.rows(), done.turns(), strict=True)}
    near_rows = [row for row in done.duplicates() if row["kind"] == "near"]
    chains_cut = 0
    for row in done.duplicates():
        assert row["id"] in stays
        kept = rows.index({"prompt": stays[row["id"]], "completion": "ok"})
        row_number = row["row"] if row["row"] < 36 else 3 * (row["row"] - 36) + 1
        assert kept == row_number - (row["kind"] == "near")
        chains_cut += row["row"] % 3 == 1 and row["row"] < 36
    assert chains_cut > 3
    assert len(near_rows) > chains_cut
    total, near = len(done.duplicates()), len(near_rows)
    exact = f"{total - near} exact, " if total > near else ""
    assert done.manifest.duplicates_in_words == f"{total} duplicates ({exact}{near} near)"
    for chain in range(12):
        first, middle, last = (row["prompt"] in stays.values() for row in rows[3 * chain :][:3])
        assert first
        assert middle or last, "C is near to nothing that stays where B left"


@pytest.mark.parametrize("bucket_bytes", [3000, 20_000])
def test_chains_do_not_depend_on_the_cut(tmp_path, monkeypatch, bucket_bytes):
    rows = chained_rows(6, 6)
    random.Random(0).shuffle(rows)
    write_lines(tmp_path / "rows.jsonl", [*rows, *rows[::4]])
    whole = outcome_of(ingest(tmp_path, **ALL_TRAIN))
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", bucket_bytes)
    cut = ingest(tmp_path, chunk_bytes=9000, **ALL_TRAIN)
    assert len(list((tmp_path / "attempt" / "duplicates").iterdir())) > 1
    assert outcome_of(cut) == whole


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=30), st.randoms())
def test_leaving_rows_are_those_of_the_plain_walk(pairs, draw):
    pairs = sorted({(max(pair), min(pair)) for pair in pairs if pair[0] != pair[1]})
    earlier = defaultdict(list)
    for later, first in pairs:
        earlier[later].append(first)
    expected = set()
    for row in range(15):
        if any(first not in expected for first in earlier[row]):
            expected.add(row)
    draw.shuffle(pairs)
    number = np.array(draw.sample(range(100), 15), np.uint64)
    found = leaving_rows(
        np.sort(number[sorted(earlier)]),
        number[[later for later, _ in pairs]],
        number[[first for _, first in pairs]],
    )
    assert set(found.tolist()) == {int(number[row]) for row in expected}


def template_signatures(num_rows: int, seed: int = 0) -> np.ndarray:
    """Rows of one template: a bin comes from it with 0.86, so two rows agree in three quarters."""
    draw = np.random.default_rng(seed)
    template = draw.integers(0, 256, NUM_BINS, np.uint8)
    own = draw.integers(0, 256, (num_rows, NUM_BINS), np.uint8)
    return np.where(draw.random(own.shape) < 0.86, template, own)


def pairs_and_comparisons(
    monkeypatch: pytest.MonkeyPatch, signatures_RK: np.ndarray
) -> tuple[set[tuple[int, int]], int]:
    counted = []
    agreement = near_compare._agreement

    def count(signatures_RK, one, two):
        counted.append(len(one))
        return agreement(signatures_RK, one, two)

    with monkeypatch.context() as patch:
        patch.setattr(near_compare, "_agreement", count)
        everything = np.ones(len(signatures_RK), bool)
        found = near_compare.near_pairs(
            signatures_RK, np.full(len(everything), 5, np.uint64), everything, 103
        )
    return set(zip(*(places.tolist() for places in found), strict=True)), sum(counted)


def test_comparisons_grow_with_the_rows_of_a_template_and_not_with_their_square(monkeypatch):
    counts = {
        rows: pairs_and_comparisons(monkeypatch, template_signatures(rows))[1]
        for rows in (512, 1024, 2048, 4096)
    }
    assert counts[512] == 512 * 511 // 2
    most = near_compare.NUM_LEADERS + near_compare.NUM_NEIGHBOURS
    assert all(count <= most * rows for rows, count in counts.items())
    assert counts[4096] < 2.2 * counts[2048]


def test_near_rows_are_found_among_those_of_a_template(monkeypatch):
    rows = template_signatures(3000)
    draw = np.random.default_rng(1)
    later = draw.permutation(3000)[:200]
    earlier = draw.permutation(np.setdiff1d(np.arange(3000), later))[:200]
    keeps = draw.random((200, NUM_BINS)) < 0.95
    rows[later] = np.where(keeps, rows[earlier], rows[later])
    found, _ = pairs_and_comparisons(monkeypatch, rows)
    planted = {
        (max(pair), min(pair)) for pair in zip(later.tolist(), earlier.tolist(), strict=True)
    }
    assert len(planted & found) > 120, "in one band; a pair has many"


def test_all_copies_of_a_text_find_its_first_row(monkeypatch):
    draw = np.random.default_rng(2)
    centres = draw.integers(0, 256, (4, NUM_BINS), np.uint8)
    rows = centres[draw.integers(0, 4, 2000)]
    rows[draw.random(rows.shape) < 0.02] += 1
    found, count = pairs_and_comparisons(monkeypatch, rows)
    assert len({later for later, _ in found}) == 1996
    assert count < 100 * 2000


def test_rows_without_a_neighbour_hand_out_their_keys_alone(tmp_path, monkeypatch):
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(10**9)) for _ in range(60)) for _ in range(1000)]
    write_lines(tmp_path / "rows.jsonl", [{"prompt": t, "completion": "ok"} for t in texts])
    monkeypatch.setattr("system.data.ingest.ingest.finish_ingest", lambda plan, *outcomes: None)
    ingest_local(run_config(tmp_path, **ALL_TRAIN), str(tmp_path / "attempt"))
    work = tmp_path / "attempt" / "work"
    size = {
        step: sum(path.stat().st_size for path in (work / step).iterdir())
        for step in ("keys", "shared", "bands", "near")
    }
    assert size["keys"] < 1000 * (21 * 16 + NUM_BINS + 80)
    assert max(size["shared"], size["bands"], size["near"]) < 4000
