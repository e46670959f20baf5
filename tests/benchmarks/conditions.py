"""Where and with what a benchmark ran, and contenders in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def commit() -> str:
    """The commit of the code that is measured; `+changes` where files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + (
        "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    )


def _git(*arguments: str) -> str:
    found = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return found.stdout.strip()


def hardware() -> dict[str, Any]:
    """The machine, and how busy it is at this moment."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def _cpu_model() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            continue
    return found


def run_contender(
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> str:
    """Runs a script in a fresh process and returns what it printed; its failure ends all.

    Args:
        name: for the message.
        arguments: script and its arguments.
        environment: added to this process's own.
        python: the interpreter.
    """
    done = subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def last_json(printed: str) -> dict[str, Any]:
    """The last line of what a contender printed: its measurement."""
    return json.loads(printed.strip().splitlines()[-1])


def memory_status(name: str) -> float:
    """A value of the kernel's about this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Memory:
    """The most memory that this process holds itself."""

    def __init__(self) -> None:
        self.anon_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.anon_mib = max(self.anon_mib, memory_status("RssAnon"))

    def __enter__(self) -> Memory:
        """Begins to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join()
