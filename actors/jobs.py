"""`instructmix submit`: the same job on a Ray cluster, through the Ray Jobs API.

The resolved configuration travels with the job; the package itself must be installed on the
cluster's nodes (deploy/Dockerfile).  The job's driver is `instructmix run`, so a job that failed or
was stopped is continued by submitting the same configuration again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from system import storage
from system.config import RunConfig
from system.errors import ClusterError
from system.rundir import fingerprint

AGENT_SECONDS = 90.0
"""How long a new cluster may take to accept its first job."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def submit_job(config: RunConfig, address: str, *, wait: bool) -> int:
    """Submits the job; with `wait`, shows its log and returns its exit code.

    Raises:
        ClusterError: there is no Ray dashboard at the address, or it lost the job.
    """
    _use_token_where_there_is_one()
    # Ray's client configures progress bars and log lines of its own, which nobody asked for.
    os.environ.setdefault("RAY_RUNTIME_ENV_LOG_TO_DRIVER_ENABLED", "0")
    from ray.job_submission import JobStatus, JobSubmissionClient

    resolved = resolve_paths(config)
    value = resolved.model_dump(mode="json")
    job = f"instructmix-{fingerprint(value)}-{int(time.time())}"
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(value, indent=2), encoding="utf-8")
            _submit(
                client,
                entrypoint=f"{interpreter(address)} -m system.cli run config.json",
                submission_id=job,
                runtime_env={"working_dir": folder},
                metadata={"run_dir": resolved.run_dir},
            )
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"--address {address}: expected the dashboard of a Ray cluster, but {error}. It "
            "usually listens on http://HEAD:8265; `ray start --head --include-dashboard=true` "
            "starts one."
        ) from error
    print(f"submitted {job}; results go to {resolved.run_dir}", file=sys.stderr, flush=True)
    if not wait:
        print(job)
        return 0
    asyncio.run(_follow(client, job))
    info = _finished(client, job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    code = getattr(info, "driver_exit_code", None)
    print(f"instructmix: job {job} {info.status.value.lower()}: {info.message}", file=sys.stderr)
    return code if code else 1


def _submit(client: Any, **job: Any) -> None:
    """Submits; a head that has just started has a dashboard before it can take jobs."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def interpreter(address: str) -> str:
    """The Python of the job's driver: on this machine this one, elsewhere the image's."""
    return sys.executable if urlsplit(address).hostname in LOOPBACK else "python"


def _use_token_where_there_is_one() -> None:
    """Ray protects new clusters with a token, but its job client sends one only when told to."""
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def resolve_paths(config: RunConfig) -> RunConfig:
    """The configuration with local paths made absolute: the job runs in another directory."""
    model = config.model
    if Path(model.path).exists():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    return config.model_copy(
        update={
            "run_dir": storage.absolute(config.run_dir),
            "data_dir": storage.absolute(config.data_dir),
            "model": model,
        }
    )


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _finished(client: Any, job: str) -> Any:
    """The job's last state; the log may end a moment before the state changes."""
    deadline = time.monotonic() + 60
    while True:
        info = client.get_job_info(job)
        if info.status.is_terminal():
            return info
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the log of job {job} ended, but after a minute the job is still "
                f"{info.status.value}; ask `ray job status {job}`"
            )
        time.sleep(0.5)
