"""Where Ray is, and what follows from it, without starting one."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.train.v2.api.exceptions import ControllerError

from actors import cluster as cluster_module
from actors import fit
from actors.cluster import MAX_DIRECTORY_BYTES, Cluster
from actors.stage import StageContext
from system.config import ClusterConfig, TrainConfig
from system.errors import ClusterError, ConfigError
from system.progress import Progress
from system.training.records import TrainJob


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray is asked to start or to join."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    return calls


@pytest.mark.parametrize(
    ("address", "environment", "expected"),
    [
        ("auto", None, "local"),
        ("auto", "", "local"),
        ("auto", "10.0.0.7:6379", "10.0.0.7:6379"),
        ("local", "10.0.0.7:6379", "local"),
        ("10.0.0.8:6379", "10.0.0.7:6379", "10.0.0.8:6379"),
    ],
)
def test_one_address_decides_whether_ray_is_our_own(
    address: str,
    environment: str | None,
    expected: str,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if environment is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    config = ClusterConfig(address=address)
    assert config.ray_address == expected
    cluster = Cluster(config)
    cluster.connect()
    assert [options["address"] for options in started] == [expected]
    assert cluster.is_own is (expected == "local")


@pytest.mark.parametrize(("num_gpus", "num_notes"), [(4.0, 1), (0.0, 0)])
@pytest.mark.usefixtures("started")
def test_gpus_that_the_configuration_leaves_idle_are_noted(
    num_gpus: float, num_notes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": num_gpus})
    lines: list[str] = []
    Cluster(ClusterConfig(address="10.0.0.7:6379"), lines.append).connect()
    assert len(lines) == num_notes
    assert all("note: the cluster has 4 GPUs" in line for line in lines)


def test_every_user_has_a_short_directory_of_their_own(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    Cluster(ClusterConfig(address="local")).connect()
    monkeypatch.setattr(os, "getuid", lambda: 4_294_967_294)
    with pytest.raises(ClusterError, match=r"expected a directory of this user .*RAY_TMPDIR"):
        Cluster(ClusterConfig(address="local")).connect()
    ((mine, others), (options,)) = sorted(tmp_path.iterdir()), started
    # Ray opens its directory to all users, so the one around it must be closed.
    assert Path(options["_temp_dir"]).parent == mine != others
    assert mine.stat().st_mode & 0o777 == 0o700
    assert len(f"/tmp/{others.name}") <= MAX_DIRECTORY_BYTES


def test_a_temporary_directory_that_is_too_deep_for_sockets_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    deep = tmp_path / ("x" * MAX_DIRECTORY_BYTES)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(deep))
    assert not cluster_module._short_temporary_directory().startswith(str(deep))


def context(*, is_own: bool, **train: Any) -> StageContext:
    """The little of a stage's context that `fit` looks at before it trains."""
    cluster = SimpleNamespace(is_own=is_own, close_pools=lambda: None, connect=lambda: None)
    config = SimpleNamespace(cluster=ClusterConfig(), train=TrainConfig(**train))
    given = SimpleNamespace(
        cluster=cluster, config=config, attempt="/nonexistent", progress=Progress()
    )
    return cast(StageContext, given)


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, float]:
    have = {"CPU": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    return have


@pytest.mark.usefixtures("small_cluster")
def test_only_a_ray_of_our_own_refuses_what_it_cannot_hold() -> None:
    fit._check_room(context(is_own=False, num_workers=2))
    with pytest.raises(ClusterError, match="do not fit into this local Ray"):
        fit._check_room(context(is_own=True, num_workers=2))


@pytest.mark.parametrize(
    ("given", "num_workers", "expected"),
    [("1800", 2, "1800"), (None, 2, "60"), (None, (1, 2), "20")],
    ids=["set-on-the-cluster", "fixed", "elastic"],
)
@pytest.mark.usefixtures("small_cluster")
def test_workers_that_never_start_name_the_time_that_was_waited(
    given: str | None, num_workers: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    if given is not None:
        monkeypatch.setenv(fit.START_TIMEOUT_VARIABLE, given)

    def give_up(*_: Any) -> None:
        raise ControllerError(TimeoutError("no room"))

    monkeypatch.setattr(fit, "_run_with_restarts", give_up)
    no_jobs: list[TrainJob] = []
    with pytest.raises(ClusterError, match=f"attempts of up to {expected} s: no room"):
        fit._fit(no_jobs, context(is_own=False, num_workers=num_workers))


@pytest.mark.parametrize("failures", [1, 3])
def test_a_slow_start_of_a_local_ray_is_tried_again(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, lines = [], []

    def init(**options: Any) -> None:
        starts.append(options["address"])
        if len(starts) <= failures:
            raise Exception("The current node timed out during startup. This could happen ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    cluster = Cluster(ClusterConfig(address="local"), lines.append)
    if failures == 1:
        cluster.connect()
        assert starts == ["local"] * 2
    else:
        with pytest.raises(ClusterError, match="did not start in 3 attempts of up to 120 s"):
            cluster.connect()
        assert starts == ["local"] * 3
    assert all("trying again" in line for line in lines)
    assert len(lines) == min(failures, 2)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of Ray's limits on its start, all unset."""
    names = ["RAY_gcs_server_port_wait_time_s", "RAY_raylet_start_wait_time_s"]
    names.append("RAY_agent_register_timeout_ms")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return names


def test_a_local_ray_gets_the_time_to_start_that_is_configured(
    started: list[dict[str, Any]],
    limits: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[str] = []
    monkeypatch.setattr(cluster_module, "RayletConfig", SimpleNamespace(initialize=given.append))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "7")
    Cluster(ClusterConfig(address="local", start_seconds=300)).connect()
    assert [os.environ[name] for name in limits] == ["7", "300", "300000"]
    assert given == ['{"raylet_start_wait_time_s": 300}']
    assert len(started) == 1


def test_the_reason_why_ray_did_not_start_is_in_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def init(**options: Any) -> None:
        logs = Path(options["_temp_dir"], "session_latest", "logs")
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "raylet.out").write_text(
            "[2026-01-01 00:00:00,000 I 1 1] (raylet) main.cc:1: starts\n"
            "[2026-01-01 00:00:09,000 E 1 1] (raylet) agent.cc:2: no agent registered\n"
        )
        raise Exception("The current node timed out during startup. This could happen ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=r"raylet.out says.*no agent registered.*start_seconds"):
        Cluster(ClusterConfig(address="local")).connect()


@pytest.mark.parametrize("kind", ["missing", "file", "closed"])
def test_a_directory_for_ray_that_cannot_be_used_is_one_clear_error(
    kind: str, started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    if kind == "file":
        folder.touch()
    if kind == "closed":

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with pytest.raises(ConfigError, match=rf"{folder}: expected a directory.*RAY_TMPDIR"):
        Cluster(ClusterConfig(address="local")).connect()
    assert not started


def test_a_directory_that_ray_has_opened_to_all_is_closed(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (mine := tmp_path / f"instructmix-ray-{os.getuid()}").mkdir()
    mine.chmod(0o777)
    Cluster(ClusterConfig(address="local")).connect()
    assert mine.stat().st_mode & 0o777 == 0o700
    assert len(started) == 1
