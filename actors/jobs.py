"""`instructmix submit`: runs all stages as a job on a Ray cluster, through the Ray Jobs API.

The configuration is sent with the job.  The package must be installed on all nodes of the cluster
(deploy/Dockerfile), and data and results must be on storage that all nodes see.  The driver of the
job is `instructmix run`, so submitting the same configuration again continues a job that failed or
was stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from system import storage
from system.config import RunConfig
from system.errors import ClusterError, ConfigError
from system.rundir import fingerprint

AGENT_SECONDS = 90.0
"""Longest time that a new cluster may need to accept its first job."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MODEL = ("path", "chat_template")
"""Keys of the section `model` that may hold paths."""


def submit_job(config: RunConfig, address: str, *, wait: bool) -> int:
    """Submits the job; with `wait`, shows its log and returns its exit code.

    Raises:
        ConfigError: a path is relative, and the cluster is not this machine.
        ClusterError: there is no Ray dashboard at the address, or it lost the job.
    """
    resolved = resolve_paths(config, address)
    _enable_token()
    # Otherwise Ray's client prints progress bars and log lines of its own.
    os.environ.setdefault("RAY_RUNTIME_ENV_LOG_TO_DRIVER_ENABLED", "0")
    from ray.job_submission import JobStatus, JobSubmissionClient

    value, variables = resolved.to_send()
    # Ray refuses an id that was used before, so the time makes a second submission possible.
    job = f"instructmix-{fingerprint(value)}-{int(time.time())}"
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(value, indent=2), encoding="utf-8")
            _submit(
                client,
                entrypoint=entrypoint(address),
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": variables},
                metadata={"run_dir": resolved.without_secrets(resolved.run_dir)},
            )
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"--address {address}: expected the dashboard of a Ray cluster, but the request "
            f"failed: {error}. Its usual address is http://HEAD:8265; `ray start --head "
            "--include-dashboard=true` starts a cluster with one."
        ) from error
    place = resolved.without_secrets(resolved.run_dir)
    print(f"submitted {job}; results go to {place}", file=sys.stderr, flush=True)
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
    """Submits the job; waits if the head of the cluster has just started and takes no jobs yet."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def is_here(address: str) -> bool:
    """Whether the address is a loopback one: this machine, or a port forwarded from a cluster."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    return host in LOOPBACK


def entrypoint(address: str) -> str:
    """The shell command of the job's driver.

    On this machine it uses this Python.  On a cluster it uses the Python of the image; the test in
    the command finds out when a loopback address leads to a cluster.
    """
    command = "-m system.cli run config.json"
    if not is_here(address):
        return f"python {command}"
    python = shlex.quote(sys.executable)
    return f"if [ -x {python} ]; then exec {python} {command}; else exec python {command}; fi"


def _enable_token() -> None:
    """Makes Ray's job client send the token of the cluster, if this user has one.

    Ray protects new clusters with a token, but the client sends it only in this mode.
    """
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def resolve_paths(config: RunConfig, address: str) -> RunConfig:
    """The configuration for the job, which runs in another directory or on another machine.

    On this machine relative paths become absolute.  Absolute paths are kept, since the file system
    is shared.

    Raises:
        ConfigError: a path is relative, and the cluster is not this machine.
    """
    relative = _relative_paths(config)
    if relative and not is_here(address):
        listed = ", ".join(f"{key} {path!r}" for key, path in relative.items())
        example = " ".join(f"--set {key}={_shared(key, path)}" for key, path in relative.items())
        raise ConfigError(
            f"--address {address}: expected paths that all nodes of the cluster see, found "
            f"relative ones, which start from {os.getcwd()} on this machine: {listed}. Give "
            f"absolute paths on a shared file system, such as {example}, or s3:// or gs:// URIs."
        )
    paths = {key: storage.absolute(path) for key, path in relative.items()}
    of_model = {key: paths.pop(f"model.{key}") for key in _MODEL if f"model.{key}" in paths}
    return config.model_copy(update={**paths, "model": config.model.model_copy(update=of_model)})


def _relative_paths(config: RunConfig) -> dict[str, str]:
    """Relative local paths that the run would read or write: key -> path.

    Paths of sources, category maps, benchmarks and targets start from `data_dir`, so `data_dir` is
    listed instead of them.
    """
    model = config.model
    paths = {"run_dir": config.run_dir}
    inputs = [source.path for source in config.sources]
    inputs += [item.category_map for item in config.sources if isinstance(item.category_map, str)]
    inputs += [target.path for target in config.influence.targets.values()]
    inputs += config.ingest.benchmarks
    if any(_is_relative(path) for path in inputs):
        paths["data_dir"] = config.data_dir
    # Any other relative path is the id of a model on the hub.
    if Path(model.path).exists() or model.path.startswith(".") or model.path.endswith(".gguf"):
        paths["model.path"] = model.path
    if model.chat_template is not None:
        paths["model.chat_template"] = model.chat_template
    return {key: path for key, path in paths.items() if _is_relative(path)}


def _is_relative(uri: str) -> bool:
    path = storage.local_path(uri)
    return path is not None and not path.is_absolute()


def _shared(key: str, path: str) -> str:
    """An example of a path on the cluster, for the error message."""
    return f"/shared/{Path(path).name.lstrip('.') or key}"


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _finished(client: Any, job: str) -> Any:
    """The final state of the job; the log may end a moment before the state changes."""
    deadline = time.monotonic() + 60
    while True:
        info = client.get_job_info(job)
        if info.status.is_terminal():
            return info
        if time.monotonic() > deadline:
            raise ClusterError(
                f"expected job {job} to be finished, since its log ended a minute ago, found it "
                f"{info.status.value}; see `ray job status {job}`"
            )
        time.sleep(0.5)
