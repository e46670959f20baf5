"""Reads and writes files by URI: local paths and fsspec URIs (`s3://`, `gs://`, ...) alike.

All other modules read and write files through this one.  Every write is atomic: a reader sees
either the old bytes or the new ones.  The bytes go to a temporary name in the same directory, and
get their name when all of them are there.  On a local disk file and directory are flushed, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.ipc
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from system import disk
from system.errors import DataError, StageError
from system.foreign_tables import checked_table

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers that mean: no room left."""
_END_MARKS = {"parquet": b"PAR1", "arrow": b"ARROW1", "npz": b""}
"""Ending of a name -> the last bytes of a whole file (an `npz` has a directory there)."""
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def local_path(uri: str) -> Path | None:
    """The local path of a URI, or None if it is remote."""
    if uri.startswith("file://"):
        return Path(uri[len("file://") :])
    return None if "://" in uri else Path(uri)


def absolute(uri: str) -> str:
    """Makes a local path absolute, because Ray workers run in other directories."""
    path = local_path(uri)
    return uri if path is None else str(path.absolute())


def join(uri: str, *parts: str) -> str:
    """Appends path parts to a URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        urlsplit(uri)  # libraries raise later, and in their own ways, what it refuses
        # Without a cache: other processes write there too, so a cached listing would be wrong.
        return fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{uri!r}: expected a kind of storage that can be opened: {error}. Install its package "
            "(s3fs for s3://, gcsfs for gs://) or use a local path."
        ) from error


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """A pyarrow file system (None: the local one) and the path on it, for other libraries.

    It opens every kind of storage that this module can open, with the same package and credentials.
    """
    path = local_path(uri)
    if path is not None:
        return None, str(path)
    filesystem, key = _filesystem(uri)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), key


def exists(uri: str) -> bool:
    """Whether the file or directory exists."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    filesystem, key = _filesystem(uri)
    filesystem.invalidate_cache()
    return filesystem.exists(key)


def stat(uri: str) -> tuple[int, str]:
    """Size in bytes of a file or directory, and a stamp that changes when the content does.

    Nothing is read.  On a local disk the stamp is size and modification time; elsewhere size and
    entity tag, checksum or time.  A directory has those of all files below it.

    Raises:
        DataError: there is nothing of that name.
    """
    path = local_path(uri)
    if path is not None:
        if path.is_dir():
            stats = [file.stat() for file in path.rglob("*") if file.is_file()]
            total, newest = (
                sum(s.st_size for s in stats),
                max((s.st_mtime_ns for s in stats), default=0),
            )
            return total, f"{total}-{newest}-{len(stats)}"
        if not path.is_file():
            raise DataError(f"{uri}: expected a file or directory, found nothing there")
        status = path.stat()
        return status.st_size, f"{status.st_size}-{status.st_mtime_ns}"
    filesystem, key = _filesystem(uri)
    filesystem.invalidate_cache()
    try:
        info = filesystem.info(key)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: expected a file or directory, found nothing there") from error
    if info.get("type") != "directory":
        return int(info["size"]), _version(info)
    infos = filesystem.find(key, detail=True)
    text = "\n".join(f"{name} {_version(infos[name])}" for name in sorted(infos))
    total = sum(int(item["size"]) for item in infos.values())
    return total, f"{total}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _version(info: dict[str, Any]) -> str:
    marks = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
    return f"{info['size']}-{next((str(info[name]) for name in marks if info.get(name)), '')}"


def list_names(uri: str) -> list[str]:
    """Names directly below a directory, sorted; empty if there is no such directory.

    Files that are being written are left out.
    """
    path = local_path(uri)
    if path is not None:
        names = os.listdir(path) if path.is_dir() else []
    else:
        filesystem, key = _filesystem(uri)
        filesystem.invalidate_cache()
        found = filesystem.ls(key, detail=False) if filesystem.exists(key) else []
        names = [name.rstrip("/").rsplit("/", 1)[-1] for name in found]
    return sorted(name for name in names if not disk.is_unfinished(name))


def delete(uri: str) -> None:
    """Removes a file, or a directory with its content; a missing one is not an error."""
    path = local_path(uri)
    if path is None:
        filesystem, key = _filesystem(uri)
        if filesystem.exists(key):
            filesystem.rm(key, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_input(uri: str) -> IO[bytes]:
    """Opens a file for reading bytes."""
    path = local_path(uri)
    if path is not None:
        return path.open("rb")
    filesystem, key = _filesystem(uri)
    return filesystem.open(key, "rb")


@contextlib.contextmanager
def atomic_output(uri: str) -> Iterator[IO[bytes]]:
    """A file for writing that gets its name only when the `with` block ends without an error."""
    path = local_path(uri)
    if path is not None:
        with disk.whole_file(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as buffer:
        yield buffer
        buffer.seek(0)
        _upload(buffer, uri)


def _upload(buffer: IO[bytes], uri: str) -> None:
    """Uploads under a temporary name, then moves.

    A file of fsspec publishes what it has when it is closed, after an error, too.
    """
    filesystem, key = _filesystem(uri)
    temporary = disk.temporary_name(key)
    try:
        with filesystem.open(temporary, "wb") as remote:
            shutil.copyfileobj(buffer, remote, 2**20)
        found, size = int(filesystem.info(temporary)["size"]), buffer.tell()
        if found != size:
            raise OSError(errno.EIO, f"expected {size} bytes after the upload, found {found}", uri)
        if type(filesystem).mv is AbstractFileSystem.mv:
            # An object store: a copy within it appears whole.  `mv` would read the key as a glob.
            filesystem.cp_file(temporary, key)
            filesystem.rm_file(temporary)
        else:
            filesystem.mv(temporary, key)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to show
            filesystem.rm_file(temporary)
        raise


def create(uri: str, data: bytes) -> bool:
    """Writes a file unless there is one of that name; of several callers at once, one succeeds.

    That holds on local disks and on stores that can compare and swap (S3 and Google storage can).
    On others, callers within the same moment may all succeed, and the last write stays.

    Returns:
        Whether the file was written.
    """
    path = local_path(uri)
    try:
        if path is not None:
            disk.create(path, data)
        else:
            filesystem, key = _filesystem(uri)
            filesystem.pipe_file(key, data, mode="create")
    except FileExistsError:
        return False
    return True


def flush_directory(uri: str) -> None:
    """Flushes a directory that other code wrote to disk, if it is local."""
    path = local_path(uri)
    if path is not None:
        disk.flush_all(path)


def is_whole(uri: str) -> bool:
    """Whether there is a file with its end: JSON that parses, a table or array not cut short.

    A work unit is finished if its file is whole.  A name alone proves nothing: a store, or a copy
    of a run directory, may hold the first half of a file.  Other kinds of files need only exist.
    """
    ending = uri.rsplit(".", 1)[-1]
    if ending not in ("json", *_END_MARKS):
        return exists(uri)
    try:
        with open_input(uri) as file:
            if ending == "json":
                json.loads(file.read())
                return True
            if ending == "npz":
                return zipfile.is_zipfile(file)
            mark = _END_MARKS[ending]
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(mark)))
            return file.read() == mark
    except (FileNotFoundError, ValueError):  # nothing there, or not JSON
        return False


def whole_names(uri: str) -> list[str]:
    """As `list_names`, but only the files that are whole."""
    return [name for name in list_names(uri) if is_whole(join(uri, name))]


def remove_unfinished(uri: str) -> int:
    """Removes the temporary files that killed processes left below a directory.

    A living process locks the local file that it writes, so its file stays.  An object store has no
    locks: there, a living writer fails, and its work unit is repeated.

    Returns:
        The number of files removed.
    """
    path = local_path(uri)
    if path is not None:
        return disk.remove_unfinished(path)
    filesystem, key = _filesystem(uri)
    filesystem.invalidate_cache()
    unfinished = [
        name for name in filesystem.find(key) if disk.is_unfinished(name.rsplit("/", 1)[-1])
    ]
    for name in unfinished:
        filesystem.rm_file(name)
    return len(unfinished)


class Writers:
    """Writes several files at the same time, in threads, while the caller goes on working.

    Waiting for a disk or an object store costs no processor time, so several waits at once take
    little longer than one.  When the `with` block ends, all files are written; an error of a thread
    is raised there at the latest.
    """

    def __init__(self, num_threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(num_threads)
        self._limit = 2 * num_threads
        self._under_way: deque[Future[None]] = deque()

    def write(self, uri: str, data: Any) -> None:
        """Writes the bytes (any buffer) atomically; waits if too many writes are pending."""
        while len(self._under_way) >= self._limit:
            self._under_way.popleft().result()
        self._under_way.append(self._threads.submit(write_bytes, uri, data))

    def __enter__(self) -> Writers:
        """Starts without pending writes."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for all files; after an error only for the writes that have begun."""
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for file in self._under_way:
                file.result()


def full_disk(error: BaseException) -> OSError | None:
    """The error of a full disk (or a used-up quota or file limit) that caused this error, if any.

    Searches the causes of the error, and the errors of other ranks in a CheckpointException.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause
        # safetensors is written in Rust and raises its own class, with the number in the text.
        rust = _RUST_ERROR.search(str(cause))
        if rust and int(rust.group(1)) in _FULL:
            return OSError(int(rust.group(1)), os.strerror(int(rust.group(1))))
        failures: dict[int, Any] = getattr(cause, "failures", {})
        waiting += [cause.__cause__, cause.__context__, *(pair[0] for pair in failures.values())]
    return None


@contextlib.contextmanager
def room_for(what: str, uri: str) -> Iterator[None]:
    """Turns the error of a full disk inside the `with` block into one that says what to do.

    Args:
        what: name of what is written, for the message.
        uri: where it is written.

    Raises:
        StageError: the storage has no room left.
    """
    try:
        yield
    except BaseException as error:
        full = full_disk(error)
        if full is None:
            raise
        raise StageError(
            f"{uri}: expected room for {what}, found the storage full ({full}). Unfinished "
            "files do not count. Free some space, or raise the quota, then run again: "
            "finished work is kept and the results stay the same."
        ) from error


def read_bytes(uri: str) -> bytes:
    """The content of a file."""
    with open_input(uri) as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_output(uri) as file:
        file.write(data)


def read_json(uri: str) -> Any:
    """The value in a JSON file.

    Raises:
        DataError: the file is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri}: expected JSON, found something else ({error})") from error


def write_json(uri: str, value: Any) -> None:
    """Writes a value as JSON, in the order of its keys; NaN is an error."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(uri, (text + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Reads an Arrow table from a `.parquet` or `.arrow` (IPC) file; local IPC is memory-mapped.

    Raises:
        pa.ArrowException: the file is damaged.
    """
    path = local_path(uri)
    if uri.endswith(".parquet"):
        with open_input(uri) as file:
            return checked_table(pq.read_table(file, columns=columns))
    if path is not None:
        with pa.memory_map(str(path)) as mapped:
            table = pyarrow.ipc.open_file(mapped).read_all()
    else:
        table = pyarrow.ipc.open_file(pa.BufferReader(read_bytes(uri))).read_all()
    return checked_table(table if columns is None else table.select(columns))


def write_table(uri: str, table: pa.Table) -> None:
    """Writes an Arrow table as `.parquet` or `.arrow`, by the ending of the name."""
    with atomic_output(uri) as file:
        if uri.endswith(".parquet"):
            pq.write_table(table, file, compression="zstd")
        else:
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=65536)


def upload_directory(local: Path, uri: str) -> None:
    """Copies a local directory to a URI; existing files are replaced."""
    for path in sorted(local.rglob("*")):
        if path.is_file():
            with (
                path.open("rb") as source,
                atomic_output(join(uri, path.relative_to(local).as_posix())) as target,
            ):
                shutil.copyfileobj(source, target, 2**20)


def download_directory(uri: str, cache: Path, without: str | None = None) -> Path:
    """A local directory with the content of the URI: a copy, or the directory itself if local.

    Processes of one machine may share the cache: one downloads while the others wait.  The cache
    records the version of each file that it holds in whole; others are downloaded again.

    Args:
        uri: the directory.
        cache: where the copy goes.
        without: files whose names end like this are not copied.
    """
    path = local_path(uri)
    if path is not None:
        return path
    filesystem, key = _filesystem(uri)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends
        record = str(cache / ".versions.json")
        versions = read_json(record) if is_whole(record) else {}
        for source, info in filesystem.find(key, detail=True).items():
            name = source[len(key) :].lstrip("/")
            target = cache / name
            if without is not None and target.name.endswith(without):
                continue
            if not target.exists() or versions.get(name) != _version(info):
                target.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(source, str(target))
                versions[name] = _version(info)
                write_json(record, versions)
    return cache


class LocalCopy:
    """A local directory for a URI: a copy that is deleted with this object, or the URI itself.

    Args:
        uri: the directory.
        without: files whose names end like this are not copied.
    """

    def __init__(self, uri: str, without: str | None = None) -> None:
        self._folder = None
        if local_path(uri) is None:
            self._folder = tempfile.TemporaryDirectory(prefix="instructmix-copy-")
        cache = Path(uri if self._folder is None else self._folder.name)
        self.path = str(download_directory(uri, cache, without))
        """Path of the local directory."""
