"""Finds the files that the path of a source names.

Links are followed wherever they lead, out of `data_dir` too: caches and shared disks are built from
them.  But each directory is visited once, so links in a circle end.  What lies below a directory
whose name begins with `.` or `_` belongs to some program (`_temporary`, `_delta_log`), except where
the name is a value of a partition, as in `_year=2024`.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import fsspec

from system import storage
from system.data.read.blocks import COMPRESSION_ENDINGS
from system.errors import DataError

_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".csv", ".tsv", ".zip")
_UNREADABLE = (
    ".lz4", ".br", ".z", ".lzma", ".lzo", ".sz", ".snappy", ".7z", ".rar", ".tar", ".tgz", ".tbz2",
    ".txz",
)  # fmt: skip
"""Endings of archives that nothing here reads."""
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_SPLIT = re.compile(
    r"(?:^|(?<=[/._-]))(?:(train|training)|test|testing|eval|evaluation|validation|valid|val|dev)"
    r"(?=[/._-])"
)
_NUM_NAMED = 3


def locate(path: str, data_dir: str) -> str:
    """The absolute address of a path that may be relative to `data_dir`."""
    uri = path if "://" in path or path.startswith("/") else storage.join(data_dir, path)
    uri = storage.absolute(uri)
    local = storage.local_path(uri)
    return uri if local is None else os.path.normpath(str(local))


def resolve(path: str, data_dir: str) -> list[str]:
    """The files that a source's path names, sorted.

    Raises:
        DataError: there is none, or some lie in archives that cannot be read.
    """
    if path.startswith("hf://"):
        return [path]
    uri = locate(path, data_dir)
    # A file may be named `a[1].jsonl`: an existing path is never a pattern.
    if glob.has_magic(path) and not storage.exists(uri):
        parts = path.split("/")
        first = next(k for k, part in enumerate(parts) if glob.has_magic(part))
        fixed = "/".join(parts[:first]) or "/" * path.startswith("/")
        root = locate(fixed, data_dir) if fixed else storage.absolute(data_dir)
        names = _glob(root, parts[first:])
        return _data_files(names, root, f"{path!r}: no data file matches {uri}")
    if not storage.exists(uri):
        raise DataError(
            f"{path!r}: expected a file or directory, found nothing at {uri}. Correct `path` of "
            "this source, or `data_dir`, from which relative paths start."
        )
    if not _is_directory(uri):
        return [uri]
    # What `save_to_disk` writes is one data set, not a directory of files.
    if {"dataset_dict.json", "state.json"} & set(storage.list_names(uri)):
        return [uri]
    return _data_files(_files_below(uri), uri, f"{uri}: the directory holds no data file")


def _data_files(names: Sequence[str], root: str, nothing: str) -> list[str]:
    """The data files among the files below `root`, sorted; `nothing` begins the message."""
    log = storage.join(root, "_delta_log")
    _check_delta_log([*names, *(storage.join(log, name) for name in storage.list_names(log))], root)
    saved = {
        os.path.dirname(name) for name in names if name.rsplit("/", 1)[-1] == "dataset_info.json"
    }
    visible = [name for name in names if not _is_hidden(name, root)]
    unreadable = sorted(name for name in visible if _is_unreadable(name))
    if unreadable:
        raise DataError(
            f"{root}: expected data files, found {len(unreadable):,} archives that cannot be read: "
            f"{', '.join(unreadable[:_NUM_NAMED])}. Unpack them, compress their files with "
            f"{', '.join(COMPRESSION_ENDINGS)}, or leave them out with a narrower `path`."
        )
    files = sorted(name for name in visible if _is_data_file(name, saved))
    broken = [name for name in files if os.path.islink(name) and not os.path.exists(name)]
    if broken:
        raise DataError(
            f"{broken[0]}: expected a file, found a link that leads nowhere. Restore what it leads "
            "to, or remove it."
        )
    if not files:
        raise DataError(
            f"{nothing}; a data file ends in {', '.join(_ENDINGS)}, optionally followed by "
            f"{', '.join(COMPRESSION_ENDINGS)}. Correct `path` of this source."
        )
    return files


def _is_hidden(name: str, root: str) -> bool:
    parts = PurePosixPath(name.removeprefix(root)).parts
    return any(part.startswith((".", "_")) and "=" not in part for part in parts)


def _is_data_file(name: str, saved: set[str]) -> bool:
    """Whether the file holds rows; `saved` are the directories of the `datasets` library."""
    folder, _, name = name.rpartition("/")
    name = name.lower()
    is_internal = folder in saved and (
        name == "state.json" or name.startswith(("cache-", "tmp")) or name == "indices.arrow"
    )
    # The last one is the log of an Iceberg table.
    is_about = name in _ABOUT or name.endswith(".metadata.json")
    for ending in COMPRESSION_ENDINGS:
        name = name.removesuffix(ending) if ending != ".zip" else name
    return name.endswith(_ENDINGS) and not is_about and not is_internal


def _is_unreadable(name: str) -> bool:
    name = name.rsplit("/", 1)[-1].lower()
    for ending in COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    if not name.endswith(_UNREADABLE):
        return False
    # `rows.jsonl.lz4` holds rows; an archive may hold anything, so rows too.
    stem = name[: name.rindex(".")]
    return stem.endswith(_ENDINGS) or name.endswith(
        (".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")
    )


def _check_delta_log(names: Sequence[str], root: str) -> None:
    """A Delta table's log says which of its files are still valid; nothing here follows it.

    Raises:
        DataError: the log removes files, so reading all of them would give deleted rows.
    """
    for name in names:
        folder, _, file = name.rpartition("/")
        if not folder.endswith("/_delta_log") and folder != "_delta_log":
            continue
        is_commit = file.endswith(".json") and file[:-5].isdecimal()
        if ".checkpoint" in file or (is_commit and b'"remove"' in storage.read_bytes(name)):
            raise DataError(
                f"{root}: expected files of rows, found a Delta table from which files were "
                f"removed ({name}). Only its log knows which files are valid: write the table to "
                "Parquet or JSONL, and name that as the source's `path`."
            )


def mixed_splits(files: Sequence[str]) -> str | None:
    """A note about files of one data set that hold its train rows and its test rows.

    A user who names their directory may not know that rows of both can be trained on.
    """
    root = os.path.dirname(os.path.commonprefix(list(files)))  # noqa: RUF071 - cut at a slash
    by_set: dict[str, dict[bool, list[str]]] = {}
    for name in files:
        path = name.removeprefix(root).lstrip("/")
        if match := _SPLIT.search(path.lower()):
            is_train = match.group(1) is not None
            by_set.setdefault(path[: match.start()], {}).setdefault(is_train, []).append(path)
    for found in by_set.values():
        if len(found) == 2:
            train, test = (", ".join(found[is_train][:_NUM_NAMED]) for is_train in (True, False))
            return (
                f"{root} holds train files ({train}) and test files ({test}) of one data set, and "
                "rows of both can be trained on. To leave the test files out, narrow `path` of the "
                "source; to keep their text out of the train rows, name them in ingest.benchmarks."
            )
    return None


def _is_directory(uri: str) -> bool:
    path = storage.local_path(uri)
    if path is not None:
        return path.is_dir()
    filesystem, key = fsspec.core.url_to_fs(uri)
    return filesystem.isdir(key)


def _files_below(uri: str) -> list[str]:
    if storage.local_path(uri) is not None:
        return list(_walk(uri))
    filesystem, key = fsspec.core.url_to_fs(uri)
    return [filesystem.unstrip_protocol(name) for name in filesystem.find(key)]


def _walk(root: str) -> Iterator[str]:
    """All files below a local directory, and links that lead nowhere; each directory once.

    Links to directories come last, so a file has the name that it has without them.

    Raises:
        DataError: a directory cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise DataError(f"{folder}: expected a directory that can be read: {error}") from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            if os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(path)
            elif os.path.isfile(path) or not os.path.exists(path):
                yield path


def _glob(root: str, parts: Sequence[str]) -> list[str]:
    """The files below `root` whose path fits the parts of a pattern."""
    pattern = storage.join(glob.escape(root), *parts)
    if storage.local_path(root) is None:
        filesystem, key = fsspec.core.url_to_fs(pattern)
        found = [name for name in filesystem.glob(key) if not filesystem.isdir(name)]
        return [filesystem.unstrip_protocol(name) for name in found]
    if "**" not in parts:
        return [name for name in glob.glob(pattern) if not os.path.isdir(name)]
    # The library's own `**` follows links in a circle.
    found = _walk(root) if os.path.isdir(root) else []
    return [name for name in found if _fits(name[len(root) :].strip("/").split("/"), parts)]


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _fits(names, parts[1:]) or _fits(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
