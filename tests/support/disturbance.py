"""Runs in the background, and kills at chosen moments."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from small_job import ROOT, command, environment


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run in the background and the file with what it says."""
    log = Path(arguments[1]).parent / f"log-{time.monotonic_ns()}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(*arguments), stderr=file, stdout=file, env=environment(), cwd=ROOT, text=True
        )
    try:
        yield process, log
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until(condition, process: subprocess.Popen[str], log: Path, seconds: float = 900) -> bool:
    """True once the condition holds; false when the run ended before it did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return True


def kill_driver_in(stage: str, config: Path, seconds_into: float) -> bool:
    """SIGKILLs the driver inside a stage; false when the stage was over before that."""
    with started("run", str(config)) as (process, log):
        if not wait_until(lambda: f"{stage} ..." in log.read_text(), process, log):
            return False
        time.sleep(seconds_into)
        over = f"{stage}: finished" in log.read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return not over


def actors_of(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(f"ray::{name}" in part for part in child.cmdline()):
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
