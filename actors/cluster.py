"""Starts or joins Ray, and owns the actor pools.  No other module calls `ray.init`.

A pool lives until the driver closes it: vLLM scorers take long to start, so the same engines serve
tagging, influence and evaluation.  `close_pools` frees their CPUs and GPUs before Ray Train needs
them.  `actors.pipeline` makes the one Cluster of a run; stages reach it through their context.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._raylet import Config as RayletConfig  # pyright: ignore[reportAttributeAccessIssue]

from actors.pool import ActorPool, ActorSpec
from system import disk
from system.config import ClusterConfig
from system.devices import idle_gpus_remark
from system.errors import ClusterError, ConfigError

_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_START_ATTEMPTS = 3
"""On a busy machine the first start takes longest; the next one finds compiled modules and files in
memory."""
_RAY = "ray"
_RAYLET_START = "RAY_raylet_start_wait_time_s"
_RAY_ERROR = re.compile(r"^\[.* [ECF] \d+ \d+\] .*", re.MULTILINE)
"""A line of a log of Ray with an error."""
MAX_DIRECTORY_BYTES = 107 - len(
    f"/{_RAY}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Longest directory in which Ray can create its sockets: Linux limits socket paths to 107 bytes."""


class Cluster:
    """A connection to Ray, which is made on first use.

    Args:
        config: address of Ray, and resources of the actors.
        say: writes a log line for the user.
    """

    def __init__(
        self, config: ClusterConfig, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._config = config
        self._say = say
        self._pools: dict[str, ActorPool] = {}
        self._is_connected = False
        self._is_own = False

    def connect(self) -> None:
        """Joins the cluster that the configuration names, or starts a local one.

        Raises:
            ClusterError: there is no Ray at the address, or a local one does not start.
            ConfigError: RAY_TMPDIR is no directory in which Ray can write.
        """
        if self._is_connected:
            return
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        address = self._config.ray_address
        # The caller has started Ray (tests do): it is used, and neither owned nor checked.
        if ray.is_initialized():
            self._is_connected = True
            return
        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "configure_logging": True,
            "runtime_env": {"env_vars": dict(_ENVIRONMENT)},
        }
        if address == "local":
            options |= {"include_dashboard": False, "_temp_dir": _short_temporary_directory()}
            _allow_seconds(self._config.start_seconds)
            if self._config.num_cpus is not None:
                options["num_cpus"] = self._config.num_cpus
            self._is_own = True
        self._start(address, options)
        self._is_connected = True
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        remark = idle_gpus_remark(self._config, num_gpus, "the cluster")
        if remark is not None:
            self._say(f"  note: {remark}")

    def _start(self, address: str, options: dict[str, Any]) -> None:
        """Calls `ray.init`, several times where a local Ray does not come up."""
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                with _own_sigterm_handler():
                    ray.init(address=address, **options)
                return
            except Exception as error:  # a slow start of Ray's processes is a bare Exception
                is_slow = "timed out during startup" in str(error)
                is_known = isinstance(
                    error, (ConnectionError, ValueError, RuntimeError, TimeoutError)
                )
                if not is_slow and not is_known:
                    raise
                if not self._is_own:
                    raise ClusterError(
                        f"cluster.address {self._config.address!r}: expected a Ray cluster, found "
                        f"none ({error}). Start one (`ray start --head`), or use `--set "
                        "cluster.address=local`."
                    ) from error
                ray.shutdown()
                reason = _last_error(Path(options["_temp_dir"])) or str(error)
                if attempt == _START_ATTEMPTS or isinstance(error, ValueError):
                    raise ClusterError(
                        f"a local Ray did not start in {attempt} attempts of up to "
                        f"{self._config.start_seconds:g} s each: {reason}. If the machine is "
                        "overloaded, raise cluster.start_seconds; otherwise it is short of memory "
                        f"or of open files. Ray's logs are in {options['_temp_dir']}. Finished "
                        "work is kept; run the same command again to continue."
                    ) from error
                self._say(f"  a local Ray did not start ({reason}); trying again")

    def pool(self, spec: ActorSpec) -> ActorPool:
        """The pool with the name of the spec, which is created on first use.

        Raises:
            ClusterError: a local Ray has too few CPUs or GPUs for the actors of all open pools.
        """
        self.connect()
        if spec.name not in self._pools:
            self._check_room(spec)
            self._pools[spec.name] = ActorPool(spec, self._pools, self._say)
        return self._pools[spec.name]

    def close_pool(self, name: str) -> None:
        """Ends the actors of one pool."""
        pool = self._pools.pop(name, None)
        if pool is not None:
            pool.close()

    def close_pools(self) -> None:
        """Ends all actors."""
        for name in list(self._pools):
            self.close_pool(name)

    def shutdown(self) -> None:
        """Ends all actors and disconnects; a Ray that was started here ends too."""
        if self._is_connected:
            self.close_pools()
            ray.shutdown()
            self._is_connected = False

    @property
    def is_own(self) -> bool:
        """Whether this process started the Ray to which it is connected."""
        return self._is_own

    def _check_room(self, spec: ActorSpec) -> None:
        """Checks that a local Ray can hold all actors.

        A joined cluster may grow, so it is not checked.  A local Ray cannot grow: actors without
        room would wait for ever.
        """
        if not self._is_own:
            return
        available = {kind: ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
        specs = [*(pool.spec for pool in self._pools.values()), spec]
        required = {
            "CPU": sum(other.num_cpus * other.num_actors for other in specs),
            "GPU": sum(other.num_gpus * other.num_actors for other in specs),
        }
        if any(required[kind] > available[kind] for kind in available):
            names = ", ".join(f"{other.num_actors} {other.name}" for other in specs)
            raise ClusterError(
                f"the actors {names} need {required} together, but this local Ray has "
                f"{available}. Lower cluster.num_tuners, cluster.num_scorers or "
                "cluster.actor_cpus, raise cluster.num_cpus, or use a larger machine."
            )


def _allow_seconds(seconds: float) -> None:
    """Sets the limits of a local Ray on the start of its processes; the user's own ones stay."""
    values = {
        "RAY_gcs_server_port_wait_time_s": round(seconds),
        _RAYLET_START: round(seconds),
        "RAY_agent_register_timeout_ms": round(1000 * seconds),
    }
    for name, value in values.items():
        os.environ.setdefault(name, str(value))
    # This process has read its environment when Ray was imported.
    wait = {"raylet_start_wait_time_s": int(os.environ[_RAYLET_START])}
    RayletConfig.initialize(json.dumps(wait))


def _last_error(directory: Path) -> str | None:
    """The last error in the logs of the processes that Ray started last."""
    for name in ("raylet.out", "gcs_server.out", "raylet.err", "gcs_server.err"):
        with contextlib.suppress(OSError):
            log = directory / "session_latest" / "logs" / name
            lines = _RAY_ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
            if lines:
                return f"{name} says {lines[-1][:500]!r}"
    return None


def _short_temporary_directory() -> str:
    """A directory for Ray's files that only this user can enter, with a path short enough.

    Ray opens its own directory to all users, so it lies in another one.

    Raises:
        ConfigError: RAY_TMPDIR is no directory in which this user can write.
        ClusterError: the directory belongs to another user, who could have prepared its files.
    """
    configured = os.environ.get("RAY_TMPDIR")
    path = _directory_in(configured or tempfile.gettempdir())
    if not configured and len(os.fsencode(path)) > MAX_DIRECTORY_BYTES:
        path = _directory_in("/tmp")
    try:
        disk.own_directory(path)
    except FileExistsError as error:
        raise ClusterError(
            f"{path}: expected a directory of this user for Ray's files, but {error.strerror}. Set "
            "RAY_TMPDIR to another directory with a short path."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: expected a directory for Ray's files in which this user can write, "
            f"found none ({error.strerror}). Set RAY_TMPDIR to an existing directory with a short "
            "path, or unset it."
        ) from error
    return str(path / _RAY)


def _directory_in(root: str) -> Path:
    return Path(root).absolute() / f"instructmix-ray-{os.getuid()}"


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keeps the process' own handler of SIGTERM.

    `ray.init` replaces it by one that ends the driver with another exit code.  Ray's processes do
    not need that one: `Cluster.shutdown` ends them, or the exit of the driver.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
