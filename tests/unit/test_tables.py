"""Rows of tables and long rows: bounded in memory, and whole files or none."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from system.data.read import blocks, readers, tables
from system.data.read.raw_rows import Defect
from system.data.read.readers import FileRange, read_batches
from system.errors import DataError


def batches_of(path: Path | str) -> list[list]:
    return list(read_batches(FileRange(file=0, uri=str(path), stamp="")))


def rows_of(path: Path | str) -> list:
    return [row for batch in batches_of(path) for row in batch]


def write(path: Path, table: pa.Table, max_chunksize: int = 1000) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=max_chunksize)
        return path
    make = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)
    return path


@pytest.mark.parametrize("coded", [False, True])
def test_a_stream_cut_at_a_batch_is_an_error_and_not_a_short_read(tmp_path, coded):
    table = pa.Table.from_pylist([{"a": -1, "b": k % 3 and "x"} for k in range(0, 90, 3)])
    table = table.set_column(0, "a", pa.array([-1, 0] * 15, pa.int32()))
    if coded:
        table = table.set_column(1, "b", pa.array(["x", "y", "z"] * 10).dictionary_encode())
    path = write(tmp_path / "stream.arrow", table, 10)
    whole = path.read_bytes()
    assert rows_of(path) == table.to_pylist()
    for start in range(0, len(whole), 8):
        path.write_bytes(whole[:start])
        with pytest.raises(DataError, match=r"stream\.arrow"):
            rows_of(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="cut off, or its writer was not closed"):
        rows_of(path)


def test_a_stream_without_rows_has_none(tmp_path):
    assert rows_of(write(tmp_path / "stream.arrow", pa.table({"a": pa.array([], "int8")}))) == []


@pytest.mark.parametrize("name", ["x.parquet", "file.arrow", "stream.arrow"])
def test_batches_of_tables_are_bounded_by_bytes_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "BATCH_BYTES", 20_000)
    lengths = [10] * 500 + [3000] * 500 + [50_000] * 3 + [10] * 500
    table = pa.table({"a": [f"{k}" + "x" * length for k, length in enumerate(lengths)]})
    found = batches_of(write(tmp_path / name, table))
    assert [row for batch in found for row in batch] == table.to_pylist()
    sizes = [(len(batch), sum(len(row["a"]) for row in batch)) for batch in found]
    assert all(rows == 1 or size <= 20_000 for rows, size in sizes)
    assert len(found) < 600


def test_big_rows_of_parquet_are_decoded_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_BYTES", 20_000)
    table = pa.table({"a": [f"{k:05d}" * 400 for k in range(200)]})
    path = write(tmp_path / "x.parquet", table)
    found = list(tables.parquet_batches(str(path), 0, None))
    assert max(batch.num_rows for batch in found) <= 10
    assert sum(batch.num_rows for batch in found) == 200


@pytest.mark.parametrize("name", ["x.parquet", "file.arrow", "stream.arrow", "saved"])
def test_a_row_of_a_table_that_is_too_long_is_rejected(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "BATCH_BYTES", 2000)
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 3000)
    rows = [{"m": [{"c": "x" * length}]} for length in (10, 2900, 3100, 10)]
    if name == "saved":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    else:
        write(tmp_path / name, pa.Table.from_pylist(rows))
    first, second, long, last = rows_of(tmp_path / name)
    assert [first, second, last] == [rows[0], rows[1], rows[3]]
    assert long.reason == "too-long"


def test_rows_that_share_a_large_dictionary_are_not_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_BYTES", 2000)
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 3000)
    table = pa.table({"a": pa.array([f"{k:099d}" for k in range(100)]).dictionary_encode()})
    assert rows_of(write(tmp_path / "file.arrow", table)) == table.to_pylist()


def test_a_value_that_python_cannot_hold_costs_one_row(tmp_path):
    times = pa.array([0, 2**62, 1], pa.int64()).view(pa.timestamp("us"))
    write(tmp_path / "x.parquet", pa.table({"a": ["p", "q", "r"], "t": times}))
    first, odd, last = rows_of(tmp_path / "x.parquet")
    assert (first["a"], last["a"]) == ("p", "r")
    assert first["t"] == datetime.datetime(1970, 1, 1)
    assert isinstance(odd, Defect) and odd.reason == "bad-value" and odd.detail


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_batches_of_text_are_bounded_by_bytes_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1000)
    rows = [{"a": f"{k}" + "x" * 3000} for k in range(50)]
    lines = "".join(f"{row['a']}\n" for row in rows)
    text = json.dumps(rows) if name == "rows.json" else f"a\n{lines}"
    (tmp_path / name).write_text(text)
    found = batches_of(tmp_path / name)
    assert [row for batch in found for row in batch] == rows
    assert max(map(len, found)) <= 8
