"""Writes files on a local disk so that they are whole, or absent, after a crash.

Bytes go to a temporary file in the same directory, are flushed to disk, and then get their name;
the directory is flushed, too.  `system.storage` calls this for local paths.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_UNFINISHED = ".unfinished"


def temporary_name(path: str) -> str:
    """A new hidden name in the same directory."""
    folder, slash, name = path.rpartition("/")
    # Names of more than 255 bytes are refused, so only the start of a long one is kept.
    return f"{folder}{slash}.{name[:40]}.{uuid.uuid4().hex}{_UNFINISHED}"


def is_unfinished(name: str) -> bool:
    """Whether a file name is one of `temporary_name`."""
    return name.startswith(".") and name.endswith(_UNFINISHED)


def own_directory(path: Path) -> Path:
    """Makes a directory that only this user can enter, where all users may write beside it.

    Raises:
        FileExistsError: it belongs to another user, who could have prepared files in it.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    owner = path.lstat().st_uid
    if owner != os.getuid():
        raise FileExistsError(errno.EEXIST, f"it belongs to user {owner}", str(path))
    path.chmod(0o700)
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file for writing that replaces `path` when the `with` block ends without an error."""
    with _written(path) as (file, temporary):
        yield file
        _flush(file)
        os.replace(temporary, path)
    flush(path.parent)


def create(path: Path, data: bytes) -> None:
    """Writes a file that must not exist; of several processes at once, one succeeds.

    Raises:
        FileExistsError: there is a file of that name.
    """
    with _written(path) as (file, temporary):
        file.write(data)
        _flush(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("xb") as other:
                other.write(data)
                _flush(other)
    flush(path.parent)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside `path`, which is removed at the end unless it was renamed."""
    _make_directory(path.parent)
    temporary = Path(temporary_name(str(path)))
    # The mode is that of any new file: 0666 without the bits of the user's umask.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                # Tells `remove_unfinished` that the writer lives; ends with the process.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_directory(path: Path) -> None:
    """Makes a directory and those above it, so that they survive a loss of power."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Flushes a file, or the names in a directory, to disk."""
    with contextlib.suppress(OSError):  # some file systems cannot flush a directory
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_all(root: Path) -> None:
    """Flushes a directory to disk with everything below it, which other code wrote."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    flush(root.parent)


def remove_unfinished(root: Path) -> int:
    """Removes the temporary files below a directory that no living process has locked.

    Returns:
        The number of files removed.
    """
    unfinished = [
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if is_unfinished(name)
    ]
    count = 0
    for path in unfinished:
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            count += 1
    return count
