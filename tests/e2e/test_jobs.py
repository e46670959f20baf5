"""The whole job through Ray Jobs, on a cluster of its own with a dashboard, and what follows.

The submitted run is the calm one here: a local run with other numbers of everything gives its
numbers, and an ablation starts from the stages that it has finished.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from small_job import ROOT, WholeRun, environment, job_config, run_job

from system.evaluation.ablation import ARMS as ABLATION_ARMS
from system.stages import STAGE_FOLDERS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node with a dashboard, ended by its own process group."""
    dashboard = free_port()
    log = tmp_path_factory.mktemp("head") / "log.txt"
    arguments = [
        RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={free_port()}",
        "--include-dashboard=true", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}", "--disable-usage-stats",
        # Its default port may be another Ray's, and without an agent no job is taken.
        f"--dashboard-agent-listen-port={free_port()}",
        "--temp-dir=/tmp/instructmix-test-head",
    ]  # fmt: skip
    with log.open("w") as file:
        head = subprocess.Popen(
            arguments, stdout=file, stderr=file, env=environment(), start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_dashboard(url, head, log)
        yield url
    finally:
        if head.poll() is None:
            started = psutil.Process(head.pid).children(recursive=True)
            os.killpg(head.pid, signal.SIGTERM)
            psutil.wait_procs(started, timeout=30)
            os.killpg(head.pid, signal.SIGKILL)  # it goes on when what it started is told to end
            head.wait()


def wait_for_dashboard(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            assert error.code == 401, "a dashboard that asks for a token is up"
            return
        except (urllib.error.URLError, OSError):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


@pytest.fixture(scope="module")
def submitted(address: str, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    config = job_config(tmp_path_factory.mktemp("submitted"))
    return WholeRun.of(config, run_job("submit", str(config), "--address", address))


def test_a_submitted_job_ends_like_a_local_one(submitted: WholeRun) -> None:
    assert "evaluate: finished" in submitted.output.stdout, "the job's log must be followed"
    assert (submitted.run_dir / "report.html").exists()
    assert submitted.results.keys() >= {"matrix", "mix", "curriculum", "selection", "weights"}


def test_the_exit_code_of_a_refused_job_comes_back(address: str, tmp_path: Path) -> None:
    config = job_config(tmp_path)
    value = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(value | {"sources": [{"path": "none.jsonl"}]}))
    result = run_job("submit", str(config), "--address", address)
    assert result.returncode == 2
    assert "none.jsonl" in result.stdout


def test_plain_ray_job_submit_works(address: str, tmp_path: Path) -> None:
    config = job_config(tmp_path)
    has_token = (Path.home() / ".ray/auth_token").exists()
    mode = {"RAY_AUTH_MODE": "token"} if has_token else {}
    result = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--", sys.executable, "-m", "system.cli",
         "run", str(config), "--until", "ingest"],
        capture_output=True, text=True, env=environment() | mode,
        cwd=ROOT, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run/corpus/manifest.json").exists()


def test_no_dashboard_is_a_clear_error(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = run_job("submit", str(job_config(tmp_path)), "--address", url)
    assert result.returncode == 1
    assert url in result.stderr
    assert "Traceback" not in result.stderr


def test_neither_numbers_of_anything_nor_an_object_store_change_a_result(
    submitted: WholeRun, tmp_path: Path
) -> None:
    """Other shards, chunks and actors; data and run directory in a store, nothing on a local disk:
    the same matrix, mix, curriculum, selection and weights, and the other commands work there too.
    """
    config = job_config(
        tmp_path,
        cluster={"num_tuners": 1, "num_ingestors": 1, "num_cpus": 2},
        ingest={"chunk_bytes": 3000, "shard_rows": 50},
        evaluate={"seeds": 1, "arms": ["natural", "solved"]},
    )
    shutil.move(tmp_path / "data", tmp_path / "buckets" / "bucket" / "data")
    places = {"run_dir": "teststore://bucket/run", "data_dir": "teststore://bucket/data"}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | places))
    done = run_job("run", str(config), store=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = tmp_path / "buckets" / "bucket" / "run"
    for folder in STAGE_FOLDERS.values():
        assert (kept / folder / "record.json").exists(), folder
    again = run_job("run", str(config), store=tmp_path)
    assert again.returncode == 0, again.stderr
    for name in STAGE_FOLDERS:
        assert f"{name}: already finished" in again.stderr
    for command in (("status",), ("verify",), ("report",), ("export", "--format", "trl")):
        out = ("--out", str(tmp_path / "out")) if command[0] == "export" else ()
        asked = run_job(command[0], places["run_dir"], *command[1:], *out, store=tmp_path)
        assert asked.returncode == 0, asked.stderr
    submitted.assert_same(_as_on_a_disk(kept), but="losses")


def _as_on_a_disk(kept: Path) -> Path:
    """The store's run directory with links from a stage's folder to its outputs, as disks have."""
    for folder in STAGE_FOLDERS.values():
        record = json.loads((kept / folder / "record.json").read_text())
        for path in record["outputs"].values():
            link = kept / folder / Path(path).name
            if not link.exists():
                link.symlink_to(kept / path)
    return kept


def test_an_ablation_trains_only_its_arms_and_prints_paired_differences(
    submitted: WholeRun,
) -> None:
    """Two mixes in three orders over two seeds, on the finished stages of the run."""
    result = run_job(
        "ablate", str(submitted.config), "--seeds", "2", "--set", "evaluate.accuracy_rows=0"
    )
    assert result.returncode == 0, result.stderr
    for stage in ("influence", "solve", "select", "train"):
        assert f"{stage}: already finished" in result.stderr
    for arm in ABLATION_ARMS:
        assert arm in result.stdout
    assert "What made it" in result.stdout and "2 seeds" in result.stdout
    summary = json.loads((submitted.run_dir / "eval/summary.json").read_text())
    assert {arm["name"] for arm in summary["arms"]} >= set(ABLATION_ARMS)
    pairs = {(row["arm"], row["reference"]) for row in summary["comparisons"]}
    assert {(arm, "natural") for arm in ABLATION_ARMS if arm != "natural"} <= pairs
