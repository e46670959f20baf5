from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from case_counts import CaseCount
from hypothesis import given, settings
from hypothesis import strategies as st

from system.config import SourceConfig
from system.data.read import blocks, hub, sources
from system.data.read.readers import Defect, FileRange, file_kind, read_rows
from system.errors import DataError

ROWS = [{"prompt": f"q{k}\u2028\n", "completion": f'a "{k}" \\ {{[', "n": k} for k in range(57)]


def rows_of(path: Path | str, start: int = 0, end: int | None = None) -> list:
    file_range = FileRange(file=0, uri=str(path), stamp="", start=start, end=end)
    return list(read_rows(file_range))


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion", "n"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_arrow(path: Path, stream: bool) -> Path:
    table = pa.Table.from_pylist(ROWS)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10)
    return path


def compressed(kind: str, data: bytes) -> bytes:
    if kind == "zst":
        return zstandard.ZstdCompressor().compress(data)
    if kind == "xz":
        return lzma.compress(data)
    return gzip.compress(data) if kind == "gz" else bz2.compress(data)


@pytest.mark.parametrize(
    "name",
    [
        "lines.jsonl", "lines.json", "array.json", "array.jsonl", "pretty.json", "values.json",
        "table.csv", "table.tsv", "table.parquet", "file.arrow", "stream.arrow",
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    match name.split(".")[0]:
        case "lines":
            write_jsonl(path)
        case "array":
            path.write_text(json.dumps(ROWS))
        case "pretty":
            path.write_text(json.dumps(ROWS, indent=2))
        case "values":
            path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
        case "table" if name.endswith("parquet"):
            write_parquet(path)
        case "table":
            write_csv(path, "\t" if name.endswith("tsv") else ",")
        case kind:
            write_arrow(path, kind == "stream")
    found = rows_of(path)
    assert [number for number, _ in found] == list(range(len(ROWS)))
    assert [{**row, "n": int(row["n"])} for _, row in found] == ROWS


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json"])
def test_archives_are_read_whatever_their_name_and_in_several_members(tmp_path, ending, name):
    text = (
        json.dumps(ROWS).encode()
        if name.startswith("array")
        else write_jsonl(tmp_path / "plain.jsonl").read_bytes()
    )
    for path in (tmp_path / f"{name}.{ending}", tmp_path / name):
        half = len(text) // 2
        path.write_bytes(compressed(ending, text[:half]) + compressed(ending, text[half:]))
        assert [row for _, row in rows_of(path)] == ROWS


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_a_cut_off_archive_is_an_error_and_not_a_short_read(tmp_path, ending):
    path = tmp_path / f"rows.jsonl.{ending}"
    noise = [{"prompt": os.urandom(40).hex(), "completion": "a"} for _ in range(500)]
    data = compressed(ending, write_jsonl(tmp_path / "plain.jsonl", noise).read_bytes())
    for keep in (len(data) - 3, len(data) // 2):
        path.write_bytes(data[:keep])
        with pytest.raises(DataError, match=r"rows\.jsonl.*cut off"):
            rows_of(path)


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["x.jsonl.zip", "x.zip", "x"])
def test_a_zip_file_with_one_file_is_read(tmp_path, name):
    lines = write_jsonl(tmp_path / "plain.jsonl").read_bytes()
    path = zipped(tmp_path / name, {"d/": b"", "d/x.jsonl": lines, "__MACOSX/d/._x.jsonl": b"x"})
    assert [row for _, row in rows_of(path)] == ROWS
    table = zipped(tmp_path / name, {"table.csv": write_csv(tmp_path / "t.csv").read_bytes()})
    assert [row["prompt"] for _, row in rows_of(table)] == [row["prompt"] for row in ROWS]
    assert sources.resolve(name, str(tmp_path)) == [str(path)]
    data = path.read_bytes()
    for broken in (data[:-5], data[:40] + b"????" + data[44:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged or cut off"):
            rows_of(path)


def test_other_zip_files_are_named(tmp_path):
    for files, found in (
        ({"a.jsonl": b"{}", "b.jsonl": b"{}"}, "found 2: 'a.jsonl', 'b.jsonl'"),
        ({"x.parquet": b"PAR1" * 30}, "inside of a zip file"),
        ({}, "zip without files"),
    ):
        with pytest.raises(DataError, match=found):
            rows_of(zipped(tmp_path / "x.zip", files))
    path = zipped(tmp_path / "x.zip", {"x.jsonl": b"{}"})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # encrypted, says the local header, and the directory at the end
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot: .*encrypted"):
        rows_of(path)


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\x04\x22\x4d\x18", "lz4"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a", "rar"),
     (b"x" * 257 + b"ustar", "tar"), (b"Obj\x01", "Avro")],
)  # fmt: skip
def test_files_of_kinds_that_nothing_reads_are_named(tmp_path, head, kind):
    (tmp_path / "x.jsonl").write_bytes(head + b"\0" * 600)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(head + b"\0" * 600))
    for name in ("x.jsonl", "x.jsonl.gz"):
        with pytest.raises(DataError, match=f"of the kind {kind}"):
            rows_of(tmp_path / name)


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}', '[{"a": 1}, {"a": "2', '[{"a": "x"y"}]'])
def test_an_array_that_does_not_close_is_an_error(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json.*(cut off|after the end)"):
        rows_of(path)


def test_text_after_an_array_is_an_error(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}] {"b": 2}')
    with pytest.raises(DataError, match="after the end"):
        rows_of(path)


def test_broken_elements_of_an_array_are_rows_of_their_own(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[ {"a": 1}, null, {"b": 1,}, "x, y", 7 ,{"a": [{}]}, ]')
    found = rows_of(path)
    assert [type(row) for _, row in found] == [dict, Defect, Defect, Defect, Defect, dict]
    assert [row.reason for _, row in found if isinstance(row, Defect)] == ["bad-json"] * 4


def test_lines_that_are_no_objects_are_defects_with_their_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": NaN}\r\n   \n' + b"[" * 100_000 + b"\n{}"
    )
    found = rows_of(path)
    kinds = [(n, row.reason if isinstance(row, Defect) else "row") for n, row in found]
    assert kinds == [
        (0, "row"), (2, "bad-json"), (3, "bad-json"), (4, "bad-utf8"), (5, "row"), (7, "bad-json"),
        (8, "row"),
    ]  # fmt: skip


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    for name, text in (("a.jsonl", '{"a": 1}\n'), ("b.json", '[{"a": 1}]'), ("c.csv", "a\n1\n")):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [list(row) for _, row in rows_of(path)] == [["a"]]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv.gz", "x.jsonl.xz"])
def test_text_with_a_byte_order_mark_is_read(tmp_path, encoding, name):
    rows = [{"a": f"é 日本 \U0001f600 {k}", "b": "x"} for k in range(500)]
    if "sv" in name:
        delimiter = "\t" if "tsv" in name else ","
        lines = [delimiter.join(values) for values in (["a", "b"], *map(dict.values, rows))]
        text = "\n".join(lines)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text = f"[{text}]".replace("\n", ",") if name == "x.json" else text
    data = ("\ufeff" * encoding.endswith("-be") + text).encode(encoding)
    ending = name.rsplit(".", 1)[1]
    (tmp_path / name).write_bytes(compressed(ending, data) if ending in ("gz", "xz") else data)
    assert [row for _, row in rows_of(tmp_path / name)] == rows
    (tmp_path / "cut.jsonl").write_bytes('\ufeff{"a": 1}\n'.encode("utf-16-le")[:-1])
    with pytest.raises(DataError, match="end of the file inside of a character"):
        rows_of(tmp_path / "cut.jsonl")


def test_a_big_file_with_a_byte_order_mark_stays_whole(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "x.jsonl").write_bytes(text.encode("utf-16"))
    config = [SourceConfig(path="x.jsonl")]
    chunks = sources.plan_chunks(sources.list_files(config, str(tmp_path)), config, 100)
    assert [row for _, row in read_rows(chunks[0].ranges[0])] == ROWS
    assert len(chunks) == 1


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_named_and_refused(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"a": 1}'.encode(encoding))
    with pytest.raises(DataError, match=f"-f UTF-16{encoding[-2:].upper()} "):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_latin_1_costs_its_rows_and_is_named(tmp_path, name):
    words = ["plain", "caf\xe9", "na\xefve"]
    path = tmp_path / name
    if name == "x.csv":
        path.write_bytes("\n".join(["a", *words]).encode("latin-1"))
    elif name == "x.parquet":
        column = pa.array([word.encode("latin-1") for word in words]).cast(pa.binary())
        pq.write_table(pa.table({"a": column.view(pa.string())}), path)
    else:
        text = "\n".join(f'{{"a": "{word}"}}' for word in words)
        text = f"[{text}]".replace("\n", ",") if name == "x.json" else text
        path.write_bytes(text.encode("latin-1"))
    good, *bad = [row for _, row in rows_of(path)]
    assert good == {"a": "plain"}
    assert [row.reason for row in bad] == ["bad-utf8"] * 2
    assert all("WINDOWS-1252" in row.detail for row in bad)


def test_a_header_in_latin_1_is_named(tmp_path):
    (tmp_path / "x.csv").write_bytes("caf\xe9,b\n1,2\n".encode("latin-1"))
    with pytest.raises(DataError, match="header in UTF-8: byte 0xe9"):
        rows_of(tmp_path / "x.csv")


def test_bad_utf8_in_parquet_costs_one_row_and_not_its_batch(tmp_path):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
    found = [row for _, row in rows_of(tmp_path / "x.parquet")]
    assert found[0] == {"x": "a"}
    assert found[1].reason == "bad-utf8"
    assert found[2] == {"x": "b"}


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_damaged_tables_and_pointer_files_are_errors(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=name):
        rows_of(path)
    whole = write_parquet(path) if name == "x.parquet" else write_arrow(path, stream=False)
    path.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(DataError, match=name):
        rows_of(path)


def test_a_row_longer_than_the_limit_is_dropped_unread_and_the_next_ones_are_kept(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 3000)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 100)
    long = {"a": 'x\\"{[' * 1500}
    rows = [{"a": 1}, long, {"a": "]}"}, {"b": 2}]
    lines = write_jsonl(tmp_path / "rows.jsonl", rows)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    for path in (lines, array):
        found = [row for _, row in rows_of(path)]
        assert found[1].reason == "too-long"
        assert [found[0], *found[2:]] == [rows[0], *rows[2:]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4), max_size=8),
    indent=st.sampled_from([None, 1]),
    block=st.integers(1, 23),
)
def test_arrays_are_cut_into_their_elements_wherever_the_blocks_end(rows, indent, block):
    data = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    pieces = (data[k : k + block] for k in range(0, len(data), block))
    found = [json.loads(value) for value in blocks.split_values(pieces, True, "x")]
    assert found == rows


@pytest.mark.parametrize("name", ["fuzz.jsonl", "fuzz.json", "fuzz.csv", "fuzz.parquet"])
def test_no_bytes_crash_a_reader(tmp_path_factory, name):
    path = tmp_path_factory.getbasetemp() / name
    read = CaseCount()

    @settings(max_examples=150, deadline=None)
    @given(data=st.binary(max_size=300))
    def check(data):
        path.write_bytes(data)
        try:
            rows = list(rows_of(path))
        except DataError as error:
            assert name in str(error)
            read.add(False)
            return
        read.add(True)
        assert all(isinstance(row, dict | Defect) and number >= 0 for number, row in rows)

    check()
    # No random bytes are a Parquet file, and few are a header in UTF-8.
    read.require({"fuzz.parquet": 0.0, "fuzz.csv": 0.2}.get(name, 0.6), at_least=0)


@pytest.mark.parametrize("name", ["dataset", "dict"])
def test_saved_data_sets_are_read_with_the_real_library(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    if name == "dict":
        saved = datasets.DatasetDict({"train": saved, "test": datasets.Dataset.from_list(ROWS[:2])})
    saved.save_to_disk(tmp_path / "saved")
    assert sources.resolve("saved", str(tmp_path)) == [str(tmp_path / "saved")]
    assert [row for _, row in rows_of(tmp_path / "saved")] == ROWS


def test_hub_sources_go_through_load_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl")
    uri = f"hf://{tmp_path / 'set'}"
    assert sources.resolve(uri, "/nowhere") == [uri]
    assert [row for _, row in rows_of(uri)] == ROWS
    first = sources.stat(uri)
    assert first == sources.stat(uri)
    with pytest.raises(DataError, match="hf://"):
        sources.stat("hf://x?color=red")


def test_hub_addresses_name_revision_config_and_split():
    found = hub.parse_hub("hf://owner/name@v1?config=main&split=test")
    parts = (found.path, found.revision, found.config, found.split)
    assert parts == ("owner/name", "v1", "main", "test")


def test_globs_and_directories_are_sorted_and_skip_what_is_no_data(tmp_path):
    for name in ("b.jsonl", "a.json.gz", "sub/c.parquet", "README.md", ".hidden.json", "x.txt"):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    everything = sources.resolve("d", str(tmp_path))
    assert [os.path.relpath(p, tmp_path / "d") for p in everything] == [
        "a.json.gz", "b.jsonl", "sub/c.parquet",
    ]  # fmt: skip
    assert sources.resolve("d/*.jsonl", str(tmp_path)) == [str(tmp_path / "d" / "b.jsonl")]
    with pytest.raises(DataError, match="no data file matches"):
        sources.resolve("d/*.xml", str(tmp_path))
    with pytest.raises(DataError, match=r"nope\.jsonl"):
        sources.resolve("nope.jsonl", str(tmp_path))


def test_remote_files_are_listed_stamped_and_read_by_range(tmp_path):
    remote = fsspec.filesystem("memory")
    text = write_jsonl(tmp_path / "rows.jsonl").read_bytes()
    for name in ("a.jsonl", "b.jsonl"):
        remote.pipe_file(f"/bucket/{name}", text)
    uris = sources.resolve("memory://bucket/*.jsonl", "/data")
    assert [uri.rsplit("/", 1)[1] for uri in uris] == ["a.jsonl", "b.jsonl"]
    size, stamp = sources.stat(uris[0])
    assert size == len(text)
    half = size // 2
    found = rows_of(uris[0], 0, half) + rows_of(uris[0], half, size)
    assert [row for _, row in found] == ROWS
    remote.pipe_file("/bucket/a.jsonl", text[:-1])
    assert sources.stat(uris[0])[1] != stamp


def test_big_files_are_cut_and_small_ones_put_together(tmp_path):
    write_jsonl(tmp_path / "big.jsonl", ROWS * 20)
    write_parquet(tmp_path / "big.parquet")
    for name in ("s1.jsonl", "s2.jsonl"):
        write_jsonl(tmp_path / name, ROWS[:2])
    (tmp_path / "whole.jsonl.gz").write_bytes(
        gzip.compress((tmp_path / "big.jsonl").read_bytes(), 0)
    )
    configs = [SourceConfig(path=name) for name in ("big.jsonl", "big.parquet", "s*.jsonl", "*.gz")]
    files = sources.list_files(configs, str(tmp_path))
    chunks = sources.plan_chunks(files, configs, 1000)
    by_source = [[c for c in chunks if c.source == k] for k in range(4)]
    assert len(by_source[0]) == -(-files[0].size // 1000)
    assert len(by_source[1]) > 1
    assert len(by_source[2]) == 1 and len(by_source[2][0].ranges) == 2
    assert len(by_source[3]) == 1
    assert [c.index for c in chunks] == list(range(len(chunks)))
    for own, rows in ((by_source[0], ROWS * 20), (by_source[1], ROWS)):
        found = [row for c in own for part in c.ranges for _, row in read_rows(part)]
        assert found == rows


@pytest.mark.parametrize("kind", ["arrow", "stream", "dataset"])
def test_arrow_files_and_data_sets_are_cut_too(tmp_path, kind):
    """Record batches and rows; a stream has no list of its batches and stays whole."""
    table = pa.Table.from_pylist(ROWS * 30)
    path = tmp_path / ("saved" if kind == "dataset" else "big.arrow")
    if kind == "dataset":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(ROWS * 30).save_to_disk(path)
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    files = sources.list_files([SourceConfig(path=path.name)], str(tmp_path))
    chunks = sources.plan_chunks(files, [SourceConfig(path=path.name)], files[0].size // 5)
    assert len(chunks) == (1 if kind == "stream" else 6)
    found = [[row for _, row in read_rows(file_range)] for c in chunks for file_range in c.ranges]
    assert all(found) and [row for rows in found for row in rows] == ROWS * 30


def test_kinds_are_told_by_content(tmp_path):
    path = tmp_path / "x.json"
    for text, kind in (
        ('{"a": 1}', "lines"), ('{"a": 1}\n{"a": 2}', "lines"), ('{"a"\n{"a": 2}\n', "lines"),
        ("{\n", "values"), ('{\n "a": 1}', "values"), (" [1]", "array"), ("", "lines"),
    ):  # fmt: skip
        path.write_text(text)
        assert file_kind(str(path)).name == kind, text


def test_memory_stays_flat_over_a_large_array(tmp_path):
    import tracemalloc

    path = tmp_path / "big.json"
    row = json.dumps({"prompt": "q" * 500, "completion": "a" * 500})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 30_000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_rows(FileRange(file=0, uri=str(path), stamp="")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000
    assert path.stat().st_size > 30e6
    assert peak < 12e6


def test_csv_field_longer_than_the_libraries_limit_is_read(tmp_path):
    path = tmp_path / "x.csv"
    sink = io.StringIO()
    csv.writer(sink).writerows([["a"], ["x" * 300_000]])
    path.write_text(sink.getvalue())
    assert len(rows_of(path)[0][1]["a"]) == 300_000
