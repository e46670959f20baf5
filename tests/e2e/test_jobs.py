"""The same job through Ray Jobs, on a cluster of its own with a dashboard."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_job import ROOT, environment, job_config, run_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
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
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def wait_for_dashboard(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
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


def test_a_submitted_job_ends_like_a_local_one(address: str, tmp_path: Path) -> None:
    config = job_config(tmp_path)
    result = run_job("submit", str(config), "--address", address, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "evaluate: done" in result.stdout, "the job's log must be followed"
    assert (tmp_path / "run/report.html").exists()


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
        cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run/corpus/manifest.json").exists()


def test_no_dashboard_is_a_clear_error(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = run_job("submit", str(job_config(tmp_path)), "--address", url)
    assert result.returncode == 1
    assert url in result.stderr
    assert "Traceback" not in result.stderr
