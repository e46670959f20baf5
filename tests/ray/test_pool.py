"""The actor pool on a real local Ray: results, dead actors, errors that keep their type."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import actors.pool
from actors.cluster import Cluster
from actors.pool import ActorPool, ActorSpec, wait_any
from system.config import ClusterConfig
from system.errors import ClusterError, DataError

pytestmark = pytest.mark.ray

# Workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Squares numbers; dies, once or always, on request."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def square(self, number: int) -> int:
        return number * number

    def die_once(self, number: int) -> int:
        marker = self.folder / f"died-{number}"
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return number

    def die(self) -> None:
        os._exit(1)

    def refuse(self) -> None:
        raise DataError("row 7 is bad")

    def threads(self) -> str:
        return os.environ["OMP_NUM_THREADS"]


class Unbuildable:
    def __init__(self) -> None:
        raise DataError("no model there")

    def call(self) -> None:
        raise AssertionError("never reached")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(ClusterConfig(address="local", num_cpus=2))
    yield cluster
    cluster.shutdown()
    assert not ray.is_initialized()


@pytest.fixture
def spec(tmp_path: Path, cluster: Cluster) -> Iterator[ActorSpec]:
    yield ActorSpec(name="worker", actor_class=Worker, args=(str(tmp_path),), num_actors=2)
    cluster.close_pools()


def test_ray_leaves_the_command_its_answer_to_signals(cluster: Cluster) -> None:
    cluster.shutdown()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    cluster.connect()
    assert {number: signal.getsignal(number) for number in before} == before


def test_every_unit_comes_back_once(cluster: Cluster, spec: ActorSpec) -> None:
    found = sorted(cluster.pool(spec).map({n: (n,) for n in range(20)}, "square"))
    assert found == [(n, n * n) for n in range(20)]


def test_units_of_dead_actors_are_given_out_again(cluster: Cluster, spec: ActorSpec) -> None:
    found = sorted(cluster.pool(spec).map({n: (n,) for n in range(4)}, "die_once"))
    assert found == [(n, n) for n in range(4)]


def test_a_unit_that_kills_every_actor_is_named(cluster: Cluster, spec: ActorSpec) -> None:
    with pytest.raises(ClusterError, match=r"worker poison: .* died 3 times"):
        list(cluster.pool(spec).map({"poison": ()}, "die"))


def test_errors_keep_their_type_and_the_pool_goes_on(cluster: Cluster, spec: ActorSpec) -> None:
    pool = cluster.pool(spec)
    with pytest.raises(DataError, match="row 7"):
        list(pool.map({"x": ()}, "refuse"))
    assert list(pool.map({"y": (3,)}, "square")) == [("y", 9)]


def test_errors_of_constructors_keep_their_type(cluster: Cluster) -> None:
    pool = cluster.pool(ActorSpec(name="unbuildable", actor_class=Unbuildable))
    with pytest.raises(DataError, match="no model there"):
        list(pool.map({"x": ()}, "call"))
    cluster.close_pools()


def test_actors_use_as_many_threads_as_cpus(cluster: Cluster, tmp_path: Path) -> None:
    spec = ActorSpec(name="wide", actor_class=Worker, args=(str(tmp_path),), num_cpus=2)
    assert list(cluster.pool(spec).map({"x": ()}, "threads")) == [("x", "2")]
    cluster.close_pools()


def test_an_actor_that_finds_no_room_holds_no_unit_back(cluster: Cluster, tmp_path: Path) -> None:
    """Four actors of one CPU on two: as on a cluster that is smaller than the pool asks for."""
    cluster.connect()
    spec = ActorSpec(name="crowd", actor_class=Worker, args=(str(tmp_path),), num_actors=4)
    pool = ActorPool(spec)
    try:
        found = sorted(pool.map({n: (n,) for n in range(12)}, "square"))
    finally:
        pool.close()
    assert found == [(n, n * n) for n in range(12)]


def test_idle_actors_make_room_for_another_pool(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pools of two CPUs each on a cluster of two: as on a joined one that is too small."""
    cluster.connect()
    monkeypatch.setattr(actors.pool, "PATIENCE_SECONDS", 2.0)
    said: list[str] = []
    pools: dict[str, ActorPool] = {}
    for name in ("tuner", "scorer"):
        spec = ActorSpec(name=name, actor_class=Worker, args=(str(tmp_path),), num_actors=2)
        pools[name] = ActorPool(spec, pools, said.append)
    try:
        for name in ("tuner", "scorer", "tuner"):
            found = sorted(pools[name].map({n: (n,) for n in range(6)}, "square"))
            assert found == [(n, n * n) for n in range(6)]
    finally:
        for pool in pools.values():
            pool.close()
    (line,) = [line for line in said if "no scorer has started after 2 s" in line]
    assert "2 idle actors of other kinds were ended to make room" in line


def test_pools_that_can_never_fit_are_refused(cluster: Cluster, spec: ActorSpec) -> None:
    cluster.pool(spec)
    with pytest.raises(ClusterError, match=r"2 worker, 1 more .*num_cpus"):
        cluster.pool(ActorSpec(name="more", actor_class=Worker, args=("",)))


def test_references_arrive_as_the_values_behind_them(cluster: Cluster, spec: ActorSpec) -> None:
    number = ray.put(7)
    assert list(cluster.pool(spec).map({"x": (number,)}, "square")) == [("x", 49)]


def test_wait_any_serves_two_pools(cluster: Cluster, tmp_path: Path) -> None:
    pools = [
        cluster.pool(ActorSpec(name=name, actor_class=Worker, args=(str(tmp_path),)))
        for name in ("left", "right")
    ]
    for pool in pools:
        assert pool.has_room
        pool.submit(pool.spec.name, "square", 3)
        assert not pool.has_room
    found = []
    while done := wait_any(pools):
        found += [(item.key, item.value) for item in done]
    assert sorted(found) == [("left", 9), ("right", 9)]
    cluster.close_pools()
