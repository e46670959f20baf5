from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from ingest_builders import numbered, run_config, write_lines

from system.data.ingest.bucket import reduce_bucket
from system.data.ingest.ingest import bucket_inputs, ingest_chunk, plan_ingest
from system.data.ingest.spill import read_spill
from system.data.rows.bodies import take_rows, text_bytes
from system.schema import MESSAGES


def batches_of(sizes: list[int]) -> pa.Table:
    numbers = iter(range(sum(sizes)))
    return pa.Table.from_batches(
        [
            pa.record_batch({"n": (own := [next(numbers) for _ in range(size)]),
                             "t": [f"text {n}" for n in own]})
            for size in sizes
        ]
    )  # fmt: skip


@pytest.mark.parametrize("small_bytes", [0, 2**30])
def test_rows_are_taken_in_the_order_asked_for_from_any_batches(monkeypatch, small_bytes):
    monkeypatch.setattr("system.data.rows.bodies._SMALL_BYTES", small_bytes)
    table = batches_of([3, 1, 7, 2])
    places = np.array(random.Random(0).sample(range(13), 9))
    assert take_rows(table, places).equals(table.take(pa.array(places)))
    assert take_rows(table, places[:0]).num_rows == 0


def test_bytes_of_rows_include_reasoning_at_any_cut():
    turns = [
        [
            {"role": "user", "content": "é" * k},
            {"role": "assistant", "content": "b", "reasoning": r},
        ]
        for k, r in enumerate([None, "ab", "", "é"])
    ]
    table = pa.table({"messages": pa.array([*turns, []], MESSAGES)})
    whole = text_bytes(table).tolist()
    assert whole == [1, 5, 5, 9, 0]
    assert text_bytes(table.slice(2, 2)).tolist() == whole[2:4]
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1)])
    assert text_bytes(cut).tolist() == whole


def test_copies_of_more_bytes_than_arrow_can_count_are_no_error(tmp_path, monkeypatch):
    """2,200 copies of a row of 1 MiB: one record batch, read again and again."""
    row = {"prompt": "x" * 2**20, "completion": "y"}
    write_lines(tmp_path / "rows.jsonl", [row, *numbered(3)])
    plan = plan_ingest(run_config(tmp_path, max_chars=2**21), str(tmp_path / "attempt"))
    outcomes = [ingest_chunk(plan, 0)]

    def read_many_times(uri, numbers):
        batches = read_spill(uri, numbers)
        return batches * (2200 if "chunks" in uri and not uri.endswith("rejected.arrow") else 1)

    monkeypatch.setattr("system.data.ingest.bucket.read_spill", read_many_times)
    (bucket,) = [reduce_bucket(plan, given) for given in bucket_inputs(plan, outcomes)]
    assert bucket.duplicates == {"exact": 4 * 2199}
    assert sum(rows.rows for rows in bucket.kept) == 4
