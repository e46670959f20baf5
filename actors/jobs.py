"""`instructmix submit`: the same job on a Ray cluster, through the Ray Jobs API.

The configuration travels with the job; the package itself must be installed on the cluster's nodes
(deploy/Dockerfile), and data and results must be where all nodes see them.  The job's driver is
`instructmix run`, so a job that failed or was stopped is continued by submitting the same
configuration again.
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
"""How long a new cluster may take to accept its first job."""
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
    _use_token_where_there_is_one()
    # Ray's client configures progress bars and log lines of its own, which nobody asked for.
    os.environ.setdefault("RAY_RUNTIME_ENV_LOG_TO_DRIVER_ENABLED", "0")
    from ray.job_submission import JobStatus, JobSubmissionClient

    value = resolved.model_dump(mode="json")
    job = f"instructmix-{fingerprint(value)}-{int(time.time())}"
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(value, indent=2), encoding="utf-8")
            _submit(
                client,
                entrypoint=entrypoint(address),
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


def is_here(address: str) -> bool:
    """Whether the address names this machine; a port that is forwarded from a cluster does too."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    return host in LOOPBACK


def entrypoint(address: str) -> str:
    """The shell command of the job's driver: on this machine it runs with this Python.

    Elsewhere, and where a loopback address leads elsewhere, it runs with the image's.
    """
    command = "-m system.cli run config.json"
    if not is_here(address):
        return f"python {command}"
    python = shlex.quote(sys.executable)
    return f"if [ -x {python} ]; then exec {python} {command}; else exec python {command}; fi"


def _use_token_where_there_is_one() -> None:
    """Ray protects new clusters with a token, but its job client sends one only when told to."""
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def resolve_paths(config: RunConfig, address: str) -> RunConfig:
    """The configuration as the job reads it: from another directory, perhaps on another machine.

    On this machine relative paths become absolute.  Absolute ones stay: file systems are shared.

    Raises:
        ConfigError: a path is relative, and the cluster is not this machine.
    """
    relative = _relative_paths(config)
    if relative and not is_here(address):
        found = ", ".join(f"{key} {path!r}" for key, path in relative.items())
        better = " ".join(f"--set {key}={_shared(key, path)}" for key, path in relative.items())
        raise ConfigError(
            f"--address {address}: expected paths that all nodes of the cluster see, found "
            f"relative ones, which start from {os.getcwd()} on this machine: {found}. Give "
            f"absolute paths on a shared file system, such as {better}, or s3:// or gs:// URIs."
        )
    found = {key: storage.absolute(path) for key, path in relative.items()}
    of_model = {key: found.pop(f"model.{key}") for key in _MODEL if f"model.{key}" in found}
    return config.model_copy(update={**found, "model": config.model.model_copy(update=of_model)})


def _relative_paths(config: RunConfig) -> dict[str, str]:
    """Relative local paths that the run would read or write: key -> path.

    Paths of sources, their maps, benchmarks and targets start from `data_dir`, which stands for
    them.
    """
    model = config.model
    paths = {"run_dir": config.run_dir}
    inputs = [source.path for source in config.sources]
    inputs += [item.category_map for item in config.sources if isinstance(item.category_map, str)]
    inputs += [target.path for target in config.influence.targets.values()]
    inputs += config.ingest.benchmarks
    if any(_is_relative(path) for path in inputs):
        paths["data_dir"] = config.data_dir
    # Anything else of that form is the id of a model on the hub.
    if Path(model.path).exists() or model.path.startswith(".") or model.path.endswith(".gguf"):
        paths["model.path"] = model.path
    if model.chat_template is not None:
        paths["model.chat_template"] = model.chat_template
    return {key: path for key, path in paths.items() if _is_relative(path)}


def _is_relative(uri: str) -> bool:
    path = storage.local_path(uri)
    return path is not None and not path.is_absolute()


def _shared(key: str, path: str) -> str:
    """An example of where the path could be on the cluster."""
    return f"/shared/{Path(path).name.lstrip('.') or key}"


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
