"""Kill the driver in every stage, kill actors at work: the same numbers as an undisturbed run."""

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
import pytest
from small_job import ROOT, command, environment, job_config, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

KILLED_STAGES = ("ingest", "model", "tag", "influence", "select", "train", "evaluate", "report")


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


def test_a_killed_driver_and_killed_actors_change_no_number(tmp_path: Path) -> None:
    """The short one: the influence stage alone, driver and both kinds of actors killed in it."""
    calm = job_config(tmp_path / "calm")
    result = run_job("run", str(calm), "--until", "curriculum")
    assert result.returncode == 0, result.stderr

    rough = job_config(tmp_path / "rough")
    units = tmp_path / "rough/run/influence"
    with started("run", str(rough), "--until", "curriculum") as (process, log):
        assert wait_until(lambda: any(units.glob("*/scores/*.parquet")), process, log)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(list(units.glob("*/scores/*.parquet")))
    assert 0 < done < 10, "the driver must die while there is work left"
    with started("run", str(rough), "--until", "curriculum") as (process, log):
        for name in ("Tuner", "Scorer"):
            assert wait_until(lambda name=name: actors_of(process, name), process, log), name
            for actor in actors_of(process, name)[:1]:
                actor.kill()
        assert process.wait(timeout=400) == 0, log.read_text()
    assert results(tmp_path / "rough/run") == results(tmp_path / "calm/run")


@pytest.mark.slow
@pytest.mark.long
def test_a_driver_killed_in_every_stage_ends_in_the_same_bytes(tmp_path: Path) -> None:
    calm = job_config(tmp_path / "calm")
    result = run_job("run", str(calm))
    assert result.returncode == 0, result.stderr
    rough = job_config(tmp_path / "rough")
    killed = [stage for stage in KILLED_STAGES if kill_driver_in(stage, rough, 1.5)]
    assert {"ingest", "tag", "influence", "train", "evaluate"} <= set(killed), killed
    result = run_job("run", str(rough))
    assert result.returncode == 0, result.stderr
    assert results(tmp_path / "rough/run") == results(tmp_path / "calm/run")
    assert not (tmp_path / "rough/run/lease.json").exists()


@pytest.mark.slow
@pytest.mark.long
def test_shards_actors_and_workers_change_no_number(tmp_path: Path) -> None:
    """Other numbers of everything: the same mix, selection and matrix."""
    one = job_config(tmp_path / "one")
    result = run_job("run", str(one), "--until", "select")
    assert result.returncode == 0, result.stderr
    other = job_config(
        tmp_path / "other", cluster={"num_tuners": 1, "num_ingestors": 1, "num_cpus": 2}
    )
    result = run_job(
        "run", str(other), "--until", "select",
        "--set", "ingest.chunk_bytes=3000", "--set", "ingest.shard_rows=50",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    left, right = results(tmp_path / "one/run"), results(tmp_path / "other/run")
    assert left == right
    for name in ("one", "other"):
        assert (tmp_path / name / "run/selection/record.json").exists()
    selections = [
        [
            row
            for file in sorted((tmp_path / name / "run/selection/parts").glob("*.parquet"))
            for row in pq.read_table(file).to_pylist()
        ]
        for name in ("one", "other")
    ]
    assert selections[0] == selections[1]
