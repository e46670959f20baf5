"""Whatever the bytes of a container are, they give rows or one paragraph, in little memory."""

from __future__ import annotations

import gzip
import io
import lzma
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from system.config import SourceConfig
from system.data.read import container_limits, sources
from system.data.read.readers import FileRange, read_batches, read_rows
from system.errors import DataError


def table() -> pa.Table:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{k}", "name": None},
                {"role": "assistant", "content": "a" * k},
            ],
            "score": k / 3,
            "vector": [1.0, 2.0],
            "tags": {"a": None, "b": k},
        }
        for k in range(30)
    ]
    columns = {
        "topic": pa.array([f"c{k % 3}" for k in range(30)]).dictionary_encode(),
        "time": pa.array(range(30), pa.timestamp("us", tz="Europe/Berlin")),
        "map": pa.array([[("a", k)] for k in range(30)], pa.map_(pa.string(), pa.int32())),
        "flag": pa.array([k % 2 == 0 for k in range(30)]),
    }
    built = pa.Table.from_pylist(rows)
    for name, column in columns.items():
        built = built.append_column(name, column)
    return built


def arrow(compression: str | None, is_stream: bool) -> bytes:
    sink = io.BytesIO()
    views = pa.array([f"a view of some length {k}" for k in range(30)], pa.string_view())
    whole = table().append_column("view", views)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(sink, whole.schema, options=options) as writer:
        writer.write_table(whole, max_chunksize=10)
    return sink.getvalue()


def parquet(**options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=10, **options)
    return sink.getvalue()


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl", data)
    return sink.getvalue()


LINES = "".join(f'{{"prompt": "q{k}", "completion": null}}\n' for k in range(40)).encode()
CONTAINERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "file": ("x.arrow", lambda: arrow(None, False)),
    "stream": ("x.arrow", lambda: arrow(None, True)),
    "compressed file": ("x.arrow", lambda: arrow("zstd", False)),
    "compressed stream": ("x.arrow", lambda: arrow("lz4", True)),
    "parquet": ("x.parquet", parquet),
    "parquet 2": ("x.parquet", lambda: parquet(compression="zstd", data_page_version="2.0")),
    "gzip": ("x.jsonl.gz", lambda: gzip.compress(LINES, mtime=0)),
    "xz": ("x.jsonl.xz", lambda: lzma.compress(LINES)),
    "zstd": ("x.jsonl.zst", lambda: zstandard.ZstdCompressor(write_checksum=True).compress(LINES)),
    "zip": ("x.zip", lambda: zipped(LINES)),
    "utf-16": ("x.jsonl", lambda: LINES.decode().encode("utf-16")),
    "csv": ("x.csv", lambda: b'a,b\n1,"x\ny"\n' * 30),
    "array": ("x.json", lambda: b"[" + LINES.strip().replace(b"\n", b",") + b"]"),
}


def damaged(whole: bytes, draw: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(data))
        match draw.randrange(5):
            case 0 | 1:
                data[place] = draw.randrange(256)
            case 2:
                data[place : place + 4] = draw.choice([b"\xff\xff\xff\x7f", bytes(4), b"\xff" * 4])
            case 3:
                del data[place : place + draw.randrange(64)]
            case _:
                data[place] ^= 1 << draw.randrange(8)
        if not data:
            return b"x"
    return bytes(data)


def read_damaged(name: str, folder: Path, num_files: int, seed: int) -> None:
    file, make = CONTAINERS[name]
    path, whole, draw = folder / file, make(), random.Random(f"{name} {seed}")
    config = [SourceConfig(path=str(path))]
    for _ in range(num_files):
        path.write_bytes(damaged(whole, draw))
        try:
            files = sources.list_files(config, str(folder))
            for chunk in sources.plan_chunks(files, config, 1000):
                for file_range in chunk.ranges:
                    for _, row in read_rows(file_range):
                        assert row is not None
        except DataError as error:
            assert file in str(error)


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_containers_give_rows_or_one_paragraph(tmp_path, name):
    read_damaged(name, tmp_path, 60, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_containers_give_rows_or_one_paragraph(tmp_path, name, seed):
    read_damaged(name, tmp_path, 2000, seed)


def shared(rows: int, length: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(
        pa.array([0] * rows, pa.int32()), pa.array(["x" * length])
    )


def write_bomb(kind: str, path: Path) -> Path:
    """A small file that would take gigabytes."""
    zeros = pa.table({"p": np.zeros(150_000_000)})
    match kind:
        case "zst":
            compressor = zstandard.ZstdCompressor()
            with path.open("wb") as file, compressor.stream_writer(file) as writer:
                for _ in range(3000):
                    writer.write(b"x" * 2**20)
        case "xz":
            with lzma.open(path, "wb", preset=0) as file:
                for _ in range(1500):
                    file.write(b"x" * 2**20)
        case "arrow" | "stream":
            new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with new(path, zeros.schema, options=options) as writer:
                writer.write_table(zeros)
        case "page":
            text = pa.table({"p": ["x" * 2**20] * 1200})
            pq.write_table(
                text, path, compression="zstd", use_dictionary=False, data_page_size=2**31 - 1
            )
        case "rows" | "list":
            column = shared(400, 10 * 2**20)
            if kind == "list":
                column = pa.ListArray.from_arrays(pa.array([0, 400], pa.int32()), column)
            pq.write_table(
                pa.table({"p": column}), path, compression="zstd", dictionary_pagesize_limit=2**30
            )
        case "nothing":
            ends = pa.array([0, 2**31 - 2], pa.int32())
            column = pa.ListArray.from_arrays(ends, pa.nulls(2**31 - 2))
            with pyarrow.ipc.new_file(path, pa.schema({"p": column.type})) as writer:
                writer.write_table(pa.table({"p": column}))
    return path


COUNT = """
import re, sys
from system.data.read.readers import FileRange, read_batches
from system.errors import DataError
try:
    print(sum(map(len, read_batches(FileRange(file=0, uri=sys.argv[1], stamp="")))))
except DataError as error:
    print("refused", error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "found"),
    [("zst", "1"), ("xz", "1"), ("arrow", "refused"), ("stream", "refused"), ("page", "refused"),
     ("rows", "400"), ("list", "1"), ("nothing", "1")],
)  # fmt: skip
def test_bombs_take_little_memory(tmp_path, kind, found):
    names = {"zst": "x.jsonl.zst", "xz": "x.jsonl.xz", "stream": "x.arrow", "nothing": "x.arrow"}
    names |= {"arrow": "x.arrow"}
    path = write_bomb(kind, tmp_path / names.get(kind, "x.parquet"))
    assert path.stat().st_size < 1e6
    run = subprocess.run(
        [sys.executable, "-c", COUNT, str(path)], capture_output=True, text=True, check=True
    )
    *lines, megabytes = run.stdout.splitlines()
    assert lines[0].startswith(found)
    assert int(megabytes) < 700


@pytest.mark.parametrize("name", ["file", "compressed file", "compressed stream", "parquet"])
def test_a_part_that_is_larger_than_the_limit_is_named(tmp_path, monkeypatch, name):
    file, make = CONTAINERS[name]
    (tmp_path / file).write_bytes(make())
    whole = FileRange(file=0, uri=str(tmp_path / file), stamp="")
    assert sum(map(len, read_batches(whole))) == 30
    monkeypatch.setattr(container_limits, "MAX_BLOCK_BYTES", 100)
    if name == "file":
        # What is not compressed is as large as the file says.
        assert sum(map(len, read_batches(whole))) == 30
        return
    with pytest.raises(DataError, match=r"takes [\d,]+ bytes when it is decompressed, more than"):
        list(read_batches(whole))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_of_every_codec_are_found(tmp_path, monkeypatch, compression, version):
    column = pa.array([["x" * 100, None, "y"], [], None] * 40)
    path = tmp_path / "x.parquet"
    rows = pa.table({"p": column, "n": range(120)})
    pq.write_table(rows, path, compression=compression, data_page_version=version)
    expected = rows.to_pylist()
    whole = FileRange(file=0, uri=str(path), stamp="")
    assert [row for batch in read_batches(whole) for row in batch] == expected
    with path.open("rb") as file:
        (group,) = container_limits.read_row_groups(file)
        assert container_limits.check_parquet_sizes(file, group) == []
        monkeypatch.setattr(container_limits, "MAX_BLOCK_BYTES", 4000)
        found = container_limits.check_parquet_sizes(file, group)
    assert found == ["p.list.element"]
    assert [row for batch in read_batches(whole) for row in batch] == expected
