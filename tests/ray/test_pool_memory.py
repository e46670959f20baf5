"""Actors that Ray ends on a node without memory: a Ray that takes any use of it for too much."""

import sys
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster as Raylets

from actors.cluster import Cluster
from actors.pool import ActorSpec
from system.config import ClusterConfig
from system.errors import ClusterError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Sleeper:
    """Waits to be ended."""

    def sleep(self) -> None:
        time.sleep(600)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    settings = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": settings}
    raylets = Raylets(initialize_head=True, head_node_args=head)
    cluster = Cluster(ClusterConfig(address=raylets.address))
    yield cluster
    cluster.shutdown()
    raylets.shutdown()


def test_actors_ended_for_memory_are_replaced_and_then_named_with_the_cause(
    cluster: Cluster,
) -> None:
    pool = cluster.pool(ActorSpec(name="sleeper", actor_class=Sleeper, max_attempts=2))
    # Ray may end an actor before its first call: that is a start that failed.
    with pytest.raises(ClusterError, match=r"(died 2 times|2 of them in a row died) .*memory"):
        list(pool.map({"unit": ()}, "sleep"))
