"""Arrow data of others is checked before a value of it is looked at, and runs no code."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from ingest_builders import ingest, numbered, run_config

from system import storage
from system.config import SourceConfig
from system.data.read import blocks, tables
from system.data.read.readers import FileRange, read_rows
from system.errors import DataError
from system.foreign_tables import checked, expanded_bytes, python_rows
from system.solve.tables import _read_parquet

RAN: list[str] = []


def run() -> None:
    RAN.append("ran")


class Attack:
    """Code that runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return run, ()


class PickledScalar(pa.ExtensionScalar):
    def as_py(self, **_: object) -> object:
        return None if self.value is None else pickle.loads(self.value.as_py())


class PickledType(pa.ExtensionType):
    """Does what the type of Ray's data package does, and is registered in its place."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "ray.data.arrow_pickled_object")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> PickledType:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type:
        return PickledScalar


@pytest.fixture
def pickled():
    """A column of objects whose type is registered, as an import of Ray's data package does."""
    try:
        pa.register_extension_type(PickledType())
        is_ours = True
    except pa.ArrowKeyError:
        is_ours = False
    column = pa.ExtensionArray.from_storage(
        PickledType(), pa.array([pickle.dumps(Attack())] * 60, pa.large_binary())
    )
    RAN.clear()
    yield column
    if is_ours:
        pa.unregister_extension_type("ray.data.arrow_pickled_object")


def nested(column: pa.Array) -> dict[str, pa.Array]:
    ends = pa.array(range(len(column) + 1), pa.int32())
    sizes = pa.array([1] * len(column), pa.int32())
    places = pa.array(range(len(column)), pa.int32())
    return {
        "flat": column,
        "struct": pa.StructArray.from_arrays([column], names=["x"]),
        "list": pa.ListArray.from_arrays(ends, column),
        "large": pa.LargeListArray.from_arrays(ends.cast(pa.int64()), column),
        "fixed": pa.FixedSizeListArray.from_arrays(column, 1),
        "map": pa.MapArray.from_arrays(ends, pa.array(["k"] * len(column)), column),
        "view": pa.ListViewArray.from_arrays(places, sizes, column),
        "dictionary": pa.DictionaryArray.from_arrays(places, column),
    }


@pytest.mark.parametrize("name", list(nested(pa.array([1]))))
def test_an_extension_type_becomes_what_it_stores_and_runs_nothing(pickled, name):
    pickled.slice(0, 1).to_pylist()
    assert RAN == ["ran"], "the type is not registered, so the test says nothing"
    RAN.clear()
    batch = pa.record_batch({"x": nested(pickled)[name]})
    for part in (batch, batch.slice(7, 9), batch.slice(60)):
        rows = python_rows(checked(part), {})
        assert len(rows) == part.num_rows
        assert all("test_foreign_tables" in str(row) for row in rows)
    assert RAN == []


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("place", ["flat", "list", "struct"])
def test_no_file_of_rows_runs_code(tmp_path, pickled, ending, place):
    rows = numbered(60)
    table = pa.table(
        {
            "prompt": [row["prompt"] for row in rows],
            "completion": [row["completion"] for row in rows],
            "x": nested(pickled)[place],
        }
    )
    storage.write_table(str(tmp_path / f"rows.{ending}"), table)
    done = ingest(tmp_path, SourceConfig(path=f"rows.{ending}"))
    assert (done.manifest.kept, RAN) == (60, [])
    # As the text of a row, as a label, and as a column of a saved table.
    with pytest.raises(DataError):
        ingest(tmp_path, SourceConfig(path=f"rows.{ending}", category_column="x"))
    with pytest.raises(DataError):
        ingest(
            tmp_path,
            SourceConfig(
                path=f"rows.{ending}", format="columns", columns={"prompt": "x", "response": "x"}
            ),
        )
    storage.read_table(str(tmp_path / f"rows.{ending}")).to_pylist()
    assert RAN == []


def test_no_table_of_the_solver_runs_code(tmp_path, pickled):
    storage.write_table(str(tmp_path / "gamma.parquet"), pa.table({"x": pickled}))
    _read_parquet(str(tmp_path / "gamma.parquet"))
    assert RAN == []


def test_no_target_of_a_user_runs_code(tmp_path, pickled):
    from system.influence.design.external_targets import read_target

    config = run_config(tmp_path)
    table = pa.table({"prompt": ["q"] * 60, "completion": ["a"] * 60, "x": pickled})
    storage.write_table(str(tmp_path / "t.parquet"), table)
    source = SourceConfig(path="t.parquet", name="t", answer_column="x")
    rows, left_out = read_target(source, data_dir=str(tmp_path), ingest=config.ingest, exclude=())
    assert (rows.num_rows, left_out, RAN) == (0, {"missing-field": 60}, [])


def test_times_of_unknown_zones_are_times():
    for zone in ("Foo/Bar", "Europe/Berlin", "+25:99", ""):
        kind = pa.timestamp("s", zone) if zone else pa.timestamp("s")
        times = pa.array([0, None], pa.int64()).view(kind)
        batch = pa.record_batch({"t": times, "s": pa.StructArray.from_arrays([times], names=["t"])})
        rows = python_rows(checked(batch), {})
        assert [str(row["t"]) for row in rows] == ["1970-01-01 00:00:00", "None"]
        assert rows[1]["s"] == {}


@pytest.mark.parametrize("index", [3, -1, 2**30])
def test_indices_out_of_range_are_an_error(index):
    indices = pa.array([0, index], pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a", "b"]), safe=False)
    with pytest.raises(pa.ArrowException):
        checked(pa.record_batch({"x": column}))


def test_offsets_out_of_range_are_an_error():
    offsets = pa.array([0, 10**6, 4], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abcd"))
    for column in (text, pa.StructArray.from_arrays([text], names=["x"])):
        with pytest.raises(pa.ArrowInvalid):
            checked(pa.record_batch({"x": column}))


def test_a_damaged_shard_is_an_error(tmp_path):
    path = tmp_path / "x.arrow"
    storage.write_table(str(path), pa.table({"x": ["abcd"] * 100}))
    data = bytearray(path.read_bytes())
    place = data.index(np.arange(0, 404, 4, np.int32).tobytes())
    data[place + 200 : place + 204] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(pa.ArrowInvalid):
        storage.read_table(str(path))


def test_types_that_nobody_uses_are_named():
    column = pa.RunEndEncodedArray.from_arrays(pa.array([1000], pa.int32()), pa.array(["a"]))
    with pytest.raises(pa.ArrowNotImplementedError, match=r"run_end_encoded.*not supported"):
        checked(pa.record_batch({"x": column}))


def shared_texts(length: int, rows: int) -> dict[str, pa.Array]:
    """Columns of many rows that all hold the same long text, or the same long list."""
    text = "x" * length
    zeros = pa.array([0] * rows, pa.int32())
    sizes = pa.array([length // 8] * rows, pa.int32())
    view = np.frombuffer(np.array([length, 0x78787878, 0, 0], np.int32).tobytes() * rows, np.uint8)
    views = pa.Array.from_buffers(
        pa.string_view(), rows, [None, pa.py_buffer(view), pa.py_buffer(text.encode())]
    )
    one = pa.StructArray.from_arrays([pa.array([text])], names=["x"])
    nothing = pa.nulls(length // 8)
    return {
        "dictionary": pa.DictionaryArray.from_arrays(zeros, pa.array([text])),
        "dictionary of objects": pa.DictionaryArray.from_arrays(zeros, one),
        "views": views,
        "list of views": pa.ListViewArray.from_arrays(zeros, sizes, nothing),
        "in an object": pa.StructArray.from_arrays([views], names=["x"]),
    }


@pytest.mark.parametrize("name", list(shared_texts(16, 1)))
def test_bytes_that_many_rows_share_count_for_each_of_them(name):
    batch = checked(pa.record_batch({"x": shared_texts(8000, 50)[name]}))
    assert expanded_bytes(batch, 10**9) >= 50 * 8000
    assert expanded_bytes(batch.slice(7, 2), 10**9) < 3 * 8000 + 200


def test_a_list_of_nothing_is_as_long_as_its_values():
    column = pa.ListArray.from_arrays(pa.array([0, 2**31 - 2], pa.int32()), pa.nulls(2**31 - 2))
    assert expanded_bytes(pa.record_batch({"x": column}), 10**9) > 10**9


@pytest.mark.parametrize("name", list(shared_texts(16, 1)))
def test_rows_that_share_a_text_that_is_too_long_are_rejected(tmp_path, monkeypatch, name):
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 3000)
    monkeypatch.setattr(tables, "BATCH_BYTES", 3000)
    table = pa.table({"x": shared_texts(8000, 5)[name]})
    with pyarrow.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = [row for _, row in read_rows(FileRange(file=0, uri=str(tmp_path / "x.arrow"), stamp=""))]
    assert [getattr(row, "reason", row) for row in rows] == ["too-long"] * 5
