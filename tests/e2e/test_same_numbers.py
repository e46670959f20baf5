"""Disturbed in every stage, or run with other numbers of everything: what the calm run gave."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from disturbance import kill_driver_in, results
from small_job import job_config, run_job

from system.evaluation.ablation import ARMS as ABLATION_ARMS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

KILLED_STAGES = ("ingest", "model", "tag", "influence", "select", "train", "evaluate")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    result = run_job("run", str(job_config(folder)))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.long
def test_a_driver_killed_in_every_stage_ends_in_the_same_bytes(calm: Path, tmp_path: Path) -> None:
    rough = job_config(tmp_path)
    killed = [stage for stage in KILLED_STAGES if kill_driver_in(stage, rough, 1.5)]
    assert {"ingest", "tag", "influence", "train", "evaluate"} <= set(killed), killed
    result = run_job("run", str(rough))
    assert result.returncode == 0, result.stderr
    assert results(tmp_path / "run") == results(calm / "run")
    assert not (tmp_path / "run/lease.json").exists()


def selected(run_dir: Path) -> Iterator[dict]:
    for file in sorted((run_dir / "selection/parts").glob("*.parquet")):
        yield from pq.read_table(file).to_pylist()


def test_shards_actors_and_workers_change_no_number(calm: Path, tmp_path: Path) -> None:
    """Other numbers of everything: the same matrix, mix, curriculum and selection."""
    other = job_config(tmp_path, cluster={"num_tuners": 1, "num_ingestors": 1, "num_cpus": 2})
    result = run_job(
        "run", str(other), "--until", "select",
        "--set", "ingest.chunk_bytes=3000", "--set", "ingest.shard_rows=50",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    left, right = results(calm / "run"), results(tmp_path / "run")
    assert {name: left[name] for name in right} == right
    assert list(selected(calm / "run")) == list(selected(tmp_path / "run"))


def test_an_ablation_trains_only_its_arms_and_prints_paired_differences(calm: Path) -> None:
    """Two mixes in three orders over two seeds, on the finished stages of the run."""
    result = run_job("ablate", str(calm / "job.yaml"), "--seeds", "2")
    assert result.returncode == 0, result.stderr
    for stage in ("influence", "solve", "select", "train"):
        assert f"{stage}: done before" in result.stderr
    for arm in ABLATION_ARMS:
        assert arm in result.stdout
    assert "What made it" in result.stdout and "2 seeds" in result.stdout
    summary = json.loads((calm / "run/eval/summary.json").read_text())
    assert {arm["name"] for arm in summary["arms"]} >= set(ABLATION_ARMS)
    pairs = {(row["arm"], row["reference"]) for row in summary["comparisons"]}
    assert {(arm, "natural") for arm in ABLATION_ARMS if arm != "natural"} <= pairs
