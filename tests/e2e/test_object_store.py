"""The whole job with its data and its run directory in an object store, nothing on a local disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from small_job import ROOT, command, environment, job_config

from system.stages import STAGE_FOLDERS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

STORE = Path(__file__).parent / "store"


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(STORE)])
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=1200,
        env={**environment(), "PYTHONPATH": path, "INSTRUCTMIX_TESTSTORE": str(root)},
        cwd=root,
        check=False,
    )


def test_a_run_needs_no_local_disk(tmp_path: Path) -> None:
    """Every stage, in every process, reads and writes the store; the second call finds all done."""
    config = job_config(
        tmp_path,
        evaluate={"seeds": 1, "arms": ["natural", "solved"]},
        train={"num_workers": 1},
        influence={"targets": {}},
    )
    shutil.move(tmp_path / "data", tmp_path / "buckets" / "bucket" / "data")
    value = yaml.safe_load(config.read_text())
    places = {"run_dir": "teststore://bucket/run", "data_dir": "teststore://bucket/data"}
    config.write_text(yaml.safe_dump(value | places))
    done = run(tmp_path, "run", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    kept = tmp_path / "buckets" / "bucket" / "run"
    for folder in STAGE_FOLDERS.values():
        assert (kept / folder / "record.json").exists(), folder
    assert (kept / "report.html").stat().st_size > 1e6
    assert list(kept.glob("train/*/model/*.safetensors"))
    assert not list(kept.glob("influence/*/checkpoints/*")), "scored checkpoints are deleted"

    again = run(tmp_path, "run", str(config))
    assert again.returncode == 0, again.stderr
    stages = [name for name in STAGE_FOLDERS if f"{name}: done before" in again.stderr]
    assert len(stages) == len(STAGE_FOLDERS), again.stderr
    for name in ("status", "verify"):
        asked = run(tmp_path, name, places["run_dir"])
        assert asked.returncode == 0, asked.stderr
    exported = run(
        tmp_path, "export", places["run_dir"], "--format", "trl", "--out", str(tmp_path / "out")
    )
    assert exported.returncode == 0, exported.stderr
