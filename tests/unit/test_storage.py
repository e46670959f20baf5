import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from system import storage
from system.errors import DataError
from system.schema import SCORES, check_table

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return f"memory://{request.node.name.replace('[', '-').replace(']', '')}"


def test_bytes_and_json_come_back(root: str) -> None:
    uri = storage.join(root, "deep/er", "x.json")
    storage.write_json(uri, {"ä": [1, None]})
    assert storage.exists(uri)
    assert storage.read_json(uri) == {"ä": [1, None]}
    assert storage.list_names(storage.join(root, "deep/er")) == ["x.json"]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_tables_come_back(root: str, name: str) -> None:
    uri = storage.join(root, name)
    storage.write_table(uri, TABLE)
    assert storage.read_table(uri).equals(TABLE)
    assert storage.read_table(uri, columns=["b"]).column_names == ["b"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.txt")
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError), storage.atomic_output(uri) as file:
        file.write(b"half")
        raise RuntimeError
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(tmp_path)) == ["x.txt"]


def test_what_a_killed_process_has_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from system import storage\n"
        "with storage.atomic_output(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "parts" / "x.txt"
    subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    (litter,) = (tmp_path / "parts").iterdir()
    assert litter.name.startswith(".x.txt.")
    (tmp_path / "parts" / ".keep").touch()
    with storage.atomic_output(str(tmp_path / "parts" / "y.txt")) as file:
        file.write(b"whole")
        assert storage.remove_unfinished(str(tmp_path)) == 1
    assert storage.list_names(str(tmp_path / "parts")) == [".keep", "y.txt"]
    assert storage.remove_unfinished("memory://no/such") == 0


def test_a_failed_write_to_an_object_store_writes_nothing() -> None:
    uri = "memory://failed-write/x.txt"
    with pytest.raises(RuntimeError), storage.atomic_output(uri) as file:
        file.write(b"half")
        raise RuntimeError
    assert not storage.exists(uri)


def test_delete_takes_files_directories_and_nothing(root: str) -> None:
    storage.write_bytes(storage.join(root, "d/x"), b"1")
    storage.delete(storage.join(root, "d"))
    storage.delete(storage.join(root, "d"))
    assert not storage.exists(storage.join(root, "d/x"))


def test_delete_of_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_text("x")
    (tmp_path / "link").symlink_to("real")
    storage.delete(str(tmp_path / "link"))
    assert (tmp_path / "real/x").exists()


def test_stamp_changes_with_the_content(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("1")
    before = storage.stat(str(file))
    file.write_text("12")
    assert storage.stat(str(file)) != before
    with pytest.raises(DataError, match="nothing there"):
        storage.stat(str(tmp_path / "y"))


@pytest.mark.parametrize("place", ["local", "memory"])
def test_stat_of_a_directory_is_that_of_its_files(tmp_path: Path, place: str) -> None:
    root = str(tmp_path / "d") if place == "local" else "memory://stat-of-directory"
    storage.write_bytes(storage.join(root, "a/x"), b"12")
    storage.write_bytes(storage.join(root, "y"), b"345")
    before = storage.stat(root)
    assert before[0] == 5
    assert storage.stat(root) == before
    storage.write_bytes(storage.join(root, "y"), b"3456")
    assert storage.stat(root) != before


def test_directories_travel_to_a_store_and_back(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").write_text("x")
    (tmp_path / "a/y").write_text("y")
    storage.upload_directory(tmp_path / "a", "memory://travel/model")
    back = storage.download_directory("memory://travel/model", tmp_path / "back")
    assert (back / "b/x").read_text() == "x"
    assert (back / "y").read_text() == "y"


def test_a_file_that_a_killed_process_has_half_fetched_is_fetched_again(tmp_path: Path) -> None:
    storage.write_bytes("memory://half-fetched/model/weights", b"0123456789")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/weights").write_bytes(b"01234")
    storage.download_directory("memory://half-fetched/model", tmp_path / "copy")
    assert (tmp_path / "copy/weights").read_bytes() == b"0123456789"


def test_readers_that_share_a_cache_wait_for_the_one_that_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workers of one machine do, which all start at once."""
    storage.write_bytes("memory://shared-cache/model/weights", b"0123456789")
    fetched = []

    def slowly(self: MemoryFileSystem, source: str, target: str) -> None:
        fetched.append(source)
        with open(target, "wb") as file:
            for byte in self.cat_file(source):
                file.write(bytes([byte]))
                file.flush()
                time.sleep(0.01)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slowly)

    def read(_: int) -> bytes:
        folder = storage.download_directory("memory://shared-cache/model", tmp_path / "copy")
        return (folder / "weights").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(4))) == {b"0123456789"}
    assert len(fetched) == 1


def test_unknown_protocol_says_what_to_install() -> None:
    with pytest.raises(DataError, match="Install"):
        storage.exists("nosuch://bucket/x")


def test_nan_is_refused_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        storage.write_json(str(tmp_path / "x.json"), float("nan"))


def test_check_table_names_what_is_wrong() -> None:
    good = {"id": ["a"], "category": ["c"], "nll": [1.0], "num_tokens": [3]}
    assert check_table(pa.table(good), SCORES, "here").schema.equals(SCORES)
    with pytest.raises(DataError, match="missing \\['nll'\\]"):
        check_table(pa.table({k: v for k, v in good.items() if k != "nll"}), SCORES, "here")
    with pytest.raises(DataError, match="'category' has 1 nulls"):
        check_table(pa.table(good | {"category": pa.array([None], pa.string())}), SCORES, "here")
    with pytest.raises(DataError, match="here"):
        check_table(pa.table(good | {"nll": ["x"]}), SCORES, "here")


@pytest.mark.parametrize("base", ["local", "memory://writers"])
def test_writers_leave_all_files_when_the_block_ends(tmp_path, base):
    base = str(tmp_path) if base == "local" else base
    with storage.Writers(num_threads=2) as writers:
        for k in range(30):
            writers.write(f"{base}/folder-{k % 3}/{k}", b"%d" % k)
    assert [storage.read_bytes(f"{base}/folder-{k % 3}/{k}") for k in range(30)] == [
        b"%d" % k for k in range(30)
    ]


def test_writers_raise_the_error_of_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError), storage.Writers() as writers:
        writers.write(str(tmp_path / "file" / "below"), b"")
    with pytest.raises(OSError), storage.Writers(num_threads=1) as writers:
        for k in range(20):
            writers.write(str(tmp_path / "file" / f"{k}"), b"")
        pytest.fail("the error was kept back although it was known")


def test_writers_do_not_hide_the_error_of_the_block(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ZeroDivisionError), storage.Writers() as writers:
        writers.write(str(tmp_path / "file" / "below"), b"")
        writers.write(str(tmp_path / "good"), b"")
        raise ZeroDivisionError


class BreakingStore(MemoryFileSystem):
    """An object store as fsspec shows it: closing a file publishes the bytes that it has."""

    protocol = "breaking"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    room = 10**9
    """Bytes after which the connection breaks."""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **options)
        return BreakingUpload(self, path, mode, block_size=2**16)

    def rm_file(self, path: str) -> None:
        """A broken connection deletes nothing either."""
        if self.room < 0:
            raise OSError("connection lost")
        super().rm_file(path)


class BreakingUpload(AbstractBufferedFile):
    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getvalue()
        BreakingStore.room -= len(data)
        if BreakingStore.room < 0 and not final:
            raise OSError("connection lost")
        self.parts.append(data)
        if final:
            self.publish(b"".join(self.parts))
        return True

    def publish(self, data: bytes) -> None:
        self.fs.store[self.path] = MemoryFile(self.fs, self.path, data)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("breaking", BreakingStore, clobber=True)
    monkeypatch.setattr(BreakingStore, "store", {})
    monkeypatch.setattr(BreakingStore, "room", 10**9)
    return "breaking://bucket"


@pytest.mark.parametrize("room", [0, 200_000])
def test_an_upload_that_breaks_leaves_the_old_object_under_the_name(
    breaking: str, room: int
) -> None:
    uri = f"{breaking}/x[1].parquet"
    storage.write_bytes(uri, b"old")
    BreakingStore.room = room
    with pytest.raises(OSError, match="connection lost"):
        storage.write_bytes(uri, bytes(10**6))
    BreakingStore.room = 10**9
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(breaking) == ["x[1].parquet"]
    assert storage.remove_unfinished(breaking) <= 1
    assert storage.remove_unfinished(breaking) == 0
    storage.write_bytes(uri, bytes(10**6))
    assert len(storage.read_bytes(uri)) == 10**6
    assert storage.list_names(breaking) == ["x[1].parquet"]


def test_an_upload_that_breaks_leaves_no_object_under_a_new_name(breaking: str) -> None:
    BreakingStore.room = 100_000
    with pytest.raises(OSError, match="connection lost"):
        storage.write_table(f"{breaking}/t.arrow", pa.table({"a": list(range(10**5))}))
    assert not storage.exists(f"{breaking}/t.arrow")


def test_an_upload_of_which_the_store_loses_a_part_is_an_error(
    breaking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BreakingUpload, "flush", lambda *_, **__: None)
    monkeypatch.setattr(BreakingUpload, "close", lambda self: self.publish(b"1"))
    with pytest.raises(OSError, match="expected 2 bytes"):
        storage.write_bytes(f"{breaking}/x", b"12")
    assert not storage.exists(f"{breaking}/x")


@pytest.mark.parametrize("name", ["x.json", "t.parquet", "t.arrow", "a.npz"])
def test_a_file_that_was_cut_is_not_whole(root: str, name: str) -> None:
    uri = storage.join(root, name)
    assert not storage.is_whole(uri)
    if name.endswith("json"):
        storage.write_json(uri, {"a": 1})
    elif name.endswith("npz"):
        with storage.atomic_output(uri) as file:
            np.savez(file, a=np.arange(100))
    else:
        storage.write_table(uri, TABLE)
    assert storage.is_whole(uri)
    assert storage.whole_names(root) == [name]
    data = storage.read_bytes(uri)
    for size in (0, 1, len(data) // 2, len(data) - 3):
        storage.write_bytes(uri, data[:size])
        assert not storage.is_whole(uri)
    assert storage.whole_names(root) == []


def test_create_writes_only_where_nothing_is(root: str) -> None:
    uri = storage.join(root, "deep", "x.json")
    assert storage.create(uri, b"1")
    assert not storage.create(uri, b"2")
    assert storage.read_bytes(uri) == b"1"
    assert storage.list_names(storage.join(root, "deep")) == ["x.json"]


def test_of_many_that_create_one_file_one_succeeds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda k: storage.create(str(tmp_path / "x"), b"%d" % k), range(64)))
    assert done.count(True) == 1
    assert (tmp_path / "x").read_bytes() == b"%d" % done.index(True)


def test_create_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.create(str(tmp_path / "x"), b"1")
    assert not storage.create(str(tmp_path / "x"), b"2")
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_files_have_the_mode_that_the_user_wants(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        storage.write_bytes(str(tmp_path / "d" / "x"), b"1")
        storage.create(str(tmp_path / "d" / "y"), b"1")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "d").iterdir()}
    assert modes == {mode}
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_directories_of_a_file_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a loss of power takes the name of a file whose bytes are on the disk."""
    flushed, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.write_bytes(str(tmp_path / "a" / "b" / "x"), b"1")
    file = flushed.pop(2)
    assert file.startswith(str(tmp_path / "a" / "b" / ".x."))
    assert flushed == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    flushed.clear()
    storage.flush_directory(str(tmp_path / "a"))
    names = ("a/b/x", "a/b", "a", "")
    assert flushed == [str(tmp_path / name) for name in names]


def test_a_file_with_a_long_name_can_be_written(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / ("x" * 255)), b"1")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"1"


def test_a_copy_follows_a_file_that_changed_without_changing_its_size(tmp_path: Path) -> None:
    for content in (b"0123456789", b"9876543210"):
        storage.write_bytes("memory://changed/model/weights", content)
        folder = storage.download_directory("memory://changed/model", tmp_path / "copy")
        assert (folder / "weights").read_bytes() == content
