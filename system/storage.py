"""Files under one name space: local paths and fsspec URIs (`s3://`, `gs://`, ...) alike.

Every write is atomic: a reader sees the old bytes or the new ones.  On a local disk that is a
temporary file in the same directory, flushed to disk and renamed; object stores give it themselves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.ipc
import pyarrow.parquet as pq

from system.errors import DataError, StageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFINISHED = ".unfinished"
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def local_path(uri: str) -> Path | None:
    """The local path that the URI names, or None where it names something remote."""
    if uri.startswith("file://"):
        return Path(uri[len("file://") :])
    return None if "://" in uri else Path(uri)


def absolute(uri: str) -> str:
    """The URI with a local path made absolute: Ray workers run in directories of their own."""
    path = local_path(uri)
    return uri if path is None else str(path.absolute())


def join(uri: str, *parts: str) -> str:
    """The URI extended by path parts."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        # Other processes write there too: a listing that is kept would soon be wrong.
        return fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{uri!r} cannot be opened: {error}. Install the package for this kind of storage "
            "(s3fs for s3://, gcsfs for gs://) or use a local path."
        ) from error


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """File system (None: the local one) and path on it, for libraries that ask for pyarrow's.

    Every kind of storage that this module can open, by the same package and the same credentials.
    """
    path = local_path(uri)
    if path is not None:
        return None, str(path)
    filesystem, key = _filesystem(uri)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), key


def exists(uri: str) -> bool:
    """Whether a file or directory is there."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    filesystem, key = _filesystem(uri)
    filesystem.invalidate_cache()
    return filesystem.exists(key)


def stamp(uri: str) -> str:
    """What tells one content of a file from another without reading it.

    Size and modification time on a local disk; size and entity tag, checksum or time elsewhere.

    Raises:
        DataError: there is no such file.
    """
    path = local_path(uri)
    if path is not None:
        if not path.is_file():
            raise DataError(f"{uri}: expected a file, found nothing there")
        stat = path.stat()
        return f"{stat.st_size} bytes, {stat.st_mtime_ns}"
    filesystem, key = _filesystem(uri)
    try:
        info = filesystem.info(key)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: expected a file, found nothing there") from error
    marks = [info[name] for name in ("ETag", "etag", "md5Hash", "mtime", "created") if name in info]
    return f"{info['size']} bytes, {marks[0] if marks else 'no time'}"


def list_names(uri: str) -> list[str]:
    """Names directly below a directory, sorted; empty where there is no such directory."""
    path = local_path(uri)
    if path is not None:
        return sorted(os.listdir(path)) if path.is_dir() else []
    filesystem, key = _filesystem(uri)
    filesystem.invalidate_cache()
    if not filesystem.exists(key):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(key, detail=False))


def delete(uri: str) -> None:
    """Removes a file or a directory with all below it; nothing there is no error."""
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
    """A readable binary file."""
    path = local_path(uri)
    if path is not None:
        return path.open("rb")
    filesystem, key = _filesystem(uri)
    return filesystem.open(key, "rb")


@contextlib.contextmanager
def atomic_output(uri: str) -> Iterator[IO[bytes]]:
    """A writable binary file that appears under its name only when the block ends well."""
    path = local_path(uri)
    if path is None:
        with tempfile.TemporaryFile() as buffer:
            yield buffer
            buffer.seek(0)
            filesystem, key = _filesystem(uri)
            with filesystem.open(key, "wb") as remote:
                shutil.copyfileobj(buffer, remote, 2**20)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_unfinished(uri: str) -> int:
    """Removes what killed processes have half written below a local directory.

    A file that a living process still writes is locked, and stays.

    Returns:
        The number of files.
    """
    root = local_path(uri)
    if root is None or not root.is_dir():
        return 0
    found = [
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.startswith(".") and name.endswith(_UNFINISHED)
    ]
    count = 0
    for path in found:
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            count += 1
    return count


class Writers:
    """Writes files beside the work that makes them, some at a time.

    Waiting for a disk to have the bytes, or for an object store's answer, costs no processor time,
    and several such waits at once take little longer than one.  When the block ends well, all files
    are there; the first error is raised, at the latest then.
    """

    def __init__(self, num_threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(num_threads)
        self._limit = 2 * num_threads
        self._under_way: deque[Future[None]] = deque()

    def write(self, uri: str, data: Any) -> None:
        """Writes the bytes (any buffer), atomically; may wait for files before it."""
        while len(self._under_way) >= self._limit:
            self._under_way.popleft().result()
        self._under_way.append(self._threads.submit(write_bytes, uri, data))

    def __enter__(self) -> Writers:
        """Nothing is under way."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for all files; after an error, only for those that are being written."""
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for file in self._under_way:
                file.result()


def full_disk(error: BaseException) -> OSError | None:
    """The error of a full disk (or a spent quota, or a file limit) behind an error, if any.

    Looks at what the error came from, and at the errors of other ranks in a CheckpointException.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in _FULL:
            return found
        rust = _RUST_ERROR.search(str(found))  # safetensors raises an error of its own
        if rust and int(rust.group(1)) in _FULL:
            return OSError(int(rust.group(1)), os.strerror(int(rust.group(1))))
        failures: dict[int, Any] = getattr(found, "failures", {})
        waiting += [found.__cause__, found.__context__, *(pair[0] for pair in failures.values())]
    return None


@contextlib.contextmanager
def room_for(what: str, uri: str) -> Iterator[None]:
    """Within the block, a full disk is an error that says what to do.

    Args:
        what: is written there, for the message.
        uri: where it goes.

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
            f"{uri}: expected room for {what}, found the storage full ({full}). What was half "
            "written there does not count. Free some space, or raise the quota, then run again: "
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
    """Writes a value as JSON, keys in the order given, NaN refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(uri, (text + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """An Arrow table from a `.parquet` or `.arrow` (IPC file) file; local IPC is memory-mapped."""
    path = local_path(uri)
    if uri.endswith(".parquet"):
        with open_input(uri) as file:
            return pq.read_table(file, columns=columns)
    if path is not None:
        with pa.memory_map(str(path)) as mapped:
            table = pyarrow.ipc.open_file(mapped).read_all()
    else:
        table = pyarrow.ipc.open_file(pa.BufferReader(read_bytes(uri))).read_all()
    return table if columns is None else table.select(columns)


def write_table(uri: str, table: pa.Table) -> None:
    """Writes an Arrow table as `.parquet` or `.arrow`, by the name's ending."""
    with atomic_output(uri) as file:
        if uri.endswith(".parquet"):
            pq.write_table(table, file, compression="zstd")
        else:
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=65536)


def upload_directory(local: Path, uri: str) -> None:
    """Copies a local directory; a file that is already there is replaced."""
    for path in sorted(local.rglob("*")):
        if path.is_file():
            with (
                path.open("rb") as source,
                atomic_output(join(uri, path.relative_to(local).as_posix())) as target,
            ):
                shutil.copyfileobj(source, target, 2**20)


def download_directory(uri: str, cache: Path, without: str | None = None) -> Path:
    """A local directory with the content of the URI: itself where it is local, else a copy.

    Processes of one machine may share the cache: one fetches, the others wait for it, and a file
    that a killed process has half fetched is fetched again.

    Args:
        uri: the directory.
        cache: where a copy goes.
        without: files whose names end so are left out of a copy.
    """
    path = local_path(uri)
    if path is not None:
        return path
    filesystem, key = _filesystem(uri)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process that holds it
        for found, info in filesystem.find(key, detail=True).items():
            target = cache / found[len(key) :].lstrip("/")
            if without is not None and target.name.endswith(without):
                continue
            if not target.exists() or target.stat().st_size != info["size"]:
                target.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(found, str(target))
    return cache


class LocalCopy:
    """A directory on a local disk: the URI's own, or a copy that ends with this object.

    Args:
        uri: the directory.
        without: files whose names end so are left out of a copy.
    """

    def __init__(self, uri: str, without: str | None = None) -> None:
        self._folder = None
        if local_path(uri) is None:
            self._folder = tempfile.TemporaryDirectory(prefix="instructmix-copy-")
        cache = Path(uri if self._folder is None else self._folder.name)
        self.path = str(download_directory(uri, cache, without))
        """Of the directory."""
