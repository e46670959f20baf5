"""A node is lost while the influence stage runs on two raylets: the matrix is the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from influence_corpus import TASKS, influence_config
from influencer_world import World, matrix
from ray.cluster_utils import Cluster as Raylets

from system.config import RunConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUNS = 2 * (1 + len(TASKS))
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    """Room for the scorer and one tuner on the first, for the other tuner on the second."""
    health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {**NODE, "num_cpus": 2, "include_dashboard": False, "_system_config": health}
    cluster = Raylets(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def world(raylets: Raylets, tmp_path_factory: pytest.TempPathFactory) -> World:
    def config(root: Path, **influence: object) -> RunConfig:
        made = influence_config(root, **influence)
        cluster = made.cluster.model_copy(update={"address": raylets.address})
        return made.model_copy(update={"cluster": cluster})

    return World(tmp_path_factory.mktemp("raylets"), config=config)


def busy_actors(raylet: psutil.Process) -> list[str]:
    """Titles of the raylet's workers that are in a call of one of our actors."""
    titles = []
    for process in raylet.children(recursive=True):
        try:
            titles += process.cmdline()[:1]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return [title for title in titles if title in ("ray::Tuner.call", "ray::Scorer.call")]


def test_a_lost_node_changes_nothing(world: World, raylets: Raylets) -> None:
    """It goes with a unit in its hands; another node takes its place."""
    world.run("whole", num_tuners=2)
    world.cluster.close_pool("tuner")
    world.cluster.close_pool("scorer")
    node = next(iter(raylets.worker_nodes))
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    lost: list[str] = []

    def kill_the_node() -> None:
        deadline = time.monotonic() + 300
        while not lost and time.monotonic() < deadline:
            begun = list(world.path("lost", "units").glob("*.json"))
            if begun and (found := busy_actors(raylet)):
                os.kill(raylet.pid, signal.SIGKILL)
                lost.extend(found)
            time.sleep(0.005)

    with ThreadPoolExecutor(2) as pool:  # nodes leave and join in the main thread
        killer = pool.submit(kill_the_node)
        stage = pool.submit(world.run, "lost", num_tuners=2)
        killer.result()
        assert lost, "no actor worked on the node"
        raylets.remove_node(node, allow_graceful=False)
        raylets.add_node(**NODE)
        stage.result()
    assert len(list(world.path("lost", "units").glob("*.json"))) == RUNS
    for grid in ("effect_TS", "effect_se_TS"):
        one, other = (getattr(matrix(world, name), grid) for name in ("whole", "lost"))
        np.testing.assert_array_equal(one, other)
