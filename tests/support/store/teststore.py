"""`teststore://`: an object store in a local directory, for tests of runs that have no local disk.

With this folder on PYTHONPATH every process finds the protocol.  As in a real store a file appears
whole, when it is closed, there are no directories but those that files are in, and nothing has a
local path.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec

ROOT = "INSTRUCTMIX_TESTSTORE"
"""Environment variable with the directory."""


class _Upload(io.FileIO):
    """A file that is there once it is closed."""

    def __init__(self, target: Path) -> None:
        self._target = target
        descriptor, self._part = tempfile.mkstemp(dir=os.environ[ROOT])
        super().__init__(descriptor, "wb")

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._part, self._target)


class Store(fsspec.AbstractFileSystem):
    """Buckets are directories below the root."""

    protocol = "teststore"
    root_marker = ""

    def _local(self, path: str) -> Path:
        return Path(os.environ[ROOT], "buckets", str(self._strip_protocol(path)))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        local = self._local(path)
        name = self._strip_protocol(path)
        if local.is_file():
            stat = local.stat()
            mark = f"{stat.st_mtime_ns}-{stat.st_size}"
            return {"name": name, "size": stat.st_size, "type": "file", "ETag": mark}
        if any(found.is_file() for found in local.rglob("*")):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = self.info(path)
        if found["type"] == "directory":
            base = found["name"]
            names = [f"{base}/{child.name}" for child in sorted(self._local(path).iterdir())]
            listed = [self.info(name) for name in names if self.exists(name)]
        else:
            listed = [found]
        return listed if detail else [item["name"] for item in listed]

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return self._local(path).open("rb")
        if mode == "wb":
            return _Upload(self._local(path))
        raise NotImplementedError(f"an object store has no mode {mode!r}")

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        with self.open(path1) as source, self.open(path2, "wb") as target:
            shutil.copyfileobj(source, target)

    def rm_file(self, path: str) -> None:
        self._local(path).unlink()

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        files = self.find(path)
        if len(files) > 1 and not recursive:
            raise ValueError("several files")
        for name in files:
            self.rm_file(name)
