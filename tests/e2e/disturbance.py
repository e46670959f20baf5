"""Runs in the background, kills at chosen moments, and the numbers that must not depend on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
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


def wait_until(condition, process: subprocess.Popen[str], log: Path, seconds: float = 300) -> bool:
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
        over = f"{stage}: done" in log.read_text()
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


def results(run_dir: Path) -> dict[str, object]:
    """What must not depend on accidents: bytes of data and weights, numbers of scores."""
    mix = json.loads((run_dir / "mix/mix.json").read_text())
    del mix["solver"]["seconds"]
    found: dict[str, object] = {
        "mix": mix,
        "matrix": pq.read_table(run_dir / "influence/matrix.parquet").to_pylist(),
        "curriculum": json.loads((run_dir / "curriculum/curriculum.json").read_text()),
    }
    if (run_dir / "train/record.json").exists():
        found["weights"] = (run_dir / "train/model/model.safetensors").read_bytes()
        found["selection"] = [
            file.read_bytes() for file in sorted((run_dir / "selection/parts").glob("*"))
        ]
        found["losses"] = pq.read_table(run_dir / "eval/losses.parquet").to_pylist()
    return found
