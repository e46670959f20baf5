"""Controller, raylet and disk fail under real training workers; the cluster shrinks and grows.

One cluster of two raylets, one CPU each: the driver and the controller live on the first.  Every
training repeats at most one checkpoint interval and ends in the bits of the undisturbed one, or,
where the number of workers changed, with the losses of one process.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
import ray.exceptions
import torch
from ray.cluster_utils import Cluster as Raylets
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from trainer_world import (
    LONG,
    LONG_STEPS,
    build_context,
    build_world,
    difference,
    newest_commit,
    records,
    resumed_steps,
    steps_logged,
    wait_for_checkpoint,
    weights,
)

from actors.cluster import Cluster
from actors.stage import StageContext
from actors.trainer import run
from system.errors import ClusterError, StageError
from system.models.base import load_model
from system.training.plan import read_plan
from system.training.settings import TrainSettings
from system.training.train import train_on_plan

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INTERVAL = LONG["checkpoint_every"]
TOLERANCE = 1e-3
"""Nats by which the loss of a step may differ where the number of workers changed: sums in another
order.  A step left out or made twice shows at once."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
SLOW_TO_START = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_METRICS_ENABLED")
"""Processes of Ray Train that no test here is about."""
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    head = NODE | {
        "include_dashboard": False,
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 5},
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable in SLOW_TO_START:
            patch.setenv(variable, "0")
        cluster = Raylets(initialize_head=True, head_node_args=head)
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("long")
    build_world(root, num_rows=4 * LONG_STEPS, hidden_size=192)
    return root


@pytest.fixture
def context(world: Path, raylets: Raylets) -> Callable[..., object]:
    """Builds the context of a training on the two raylets."""
    raylets.wait_for_nodes()
    cluster = Cluster(build_context(world, "none", address=raylets.address).config.cluster)
    cluster.connect()

    def build(attempt: str, **train):
        return build_context(world, attempt, cluster, address=raylets.address, **(LONG | train))

    return build


@pytest.fixture(scope="module")
def undisturbed(world: Path, raylets: Raylets) -> dict[str, torch.Tensor]:
    cluster = Cluster(build_context(world, "none", address=raylets.address).config.cluster)
    run(build_context(world, "train/undisturbed", cluster, address=raylets.address, **LONG))
    return weights(world, "train/undisturbed")


@contextmanager
def training(context: StageContext) -> Iterator[None]:
    """Runs the stage in a thread beside the block, and waits for it; its error is the block's.

    Not the other way round: nodes join a cluster, and signals are handled, in the main thread.
    """
    errors: list[BaseException] = []

    def train() -> None:
        try:
            run(context)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    yield
    thread.join()
    if errors:
        raise errors[0]


def processes_called(name: str) -> list[psutil.Process]:
    """Ray processes of this test's own raylets whose title holds the name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in part for part in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def kill_raylet(node) -> None:
    """SIGKILL; its workers notice that they are orphans and end."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def tear_snapshots(attempt: Path) -> int:
    """What a crash leaves of a file that Ray Train writes in place; returns how many."""
    folders = [path for path in (attempt / "ray-train").glob("*") if path.is_dir()]
    for folder in folders:
        (folder / SNAPSHOT).write_text('{"version": 1, "checkpoint_results": [{"chec')
    return len(folders)


def test_killed_controller_and_torn_snapshots_change_nothing(world, context, undisturbed):
    attempt = world / "train/controller"
    (attempt / "ray-train" / "fit-left-by-a-killed-driver").mkdir(parents=True)
    tear_snapshots(attempt)
    build = context("train/controller")
    others = set(processes_called("ray::TrainController"))  # of finished runs, on their way out
    with training(build):
        wait_for_checkpoint(attempt, 20)
        (controller,) = set(processes_called("ray::TrainController")) - others
        assert tear_snapshots(attempt) == 2
        controller.kill()
        committed = newest_commit(attempt)
    (resumed,) = resumed_steps(world, "train/controller")
    assert resumed % INTERVAL == 0 and resumed >= committed
    assert steps_logged(world, "train/controller") == list(range(LONG_STEPS))
    assert difference(weights(world, "train/controller"), undisturbed) == 0.0


def test_a_torn_snapshot_is_one_that_ray_train_itself_dies_of(tmp_path, context):
    """Else the test above would show nothing."""
    context("none")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / SNAPSHOT).write_text('{"version": 1, "checkpoint_results": [{"chec')
    trainer = TorchTrainer(
        lambda: None,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="torn", storage_path=str(tmp_path)),
    )
    with pytest.raises(ray.exceptions.RayActorError):
        trainer.fit()


def test_controller_that_keeps_dying_is_an_error_that_says_so(world, context):
    attempt = world / "train/dying"
    build = context("train/dying", max_failures=0)
    before = set(processes_called("ray::TrainController"))

    with pytest.raises(ClusterError, match=r"max_failures = 0 .*run again"), training(build):
        deadline = time.monotonic() + 60
        while not (found := set(processes_called("ray::TrainController")) - before):
            assert time.monotonic() < deadline, "no controller was started"
            time.sleep(0.05)
        for controller in found:
            controller.kill()
    assert not (attempt / "done.json").exists()


def test_killed_raylet_changes_nothing(world, raylets, context, undisturbed):
    attempt = world / "train/raylet"
    with training(context("train/raylet")):
        wait_for_checkpoint(attempt, 20)
        node = next(iter(raylets.worker_nodes))
        committed = newest_commit(attempt)
        kill_raylet(node)
        raylets.remove_node(node, allow_graceful=False)
        raylets.add_node(**NODE)
    resumed = resumed_steps(world, "train/raylet")
    assert resumed and resumed[0] >= committed
    assert all(step % INTERVAL == 0 for step in resumed)
    assert steps_logged(world, "train/raylet") == list(range(LONG_STEPS))
    assert difference(weights(world, "train/raylet"), undisturbed) == 0.0


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A real file system of that size; only root may make one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a small file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_full_disk_is_told_and_a_rerun_ends_in_the_same_bits(world, context, undisturbed):
    attempt = world / "train/full"
    size = sum(
        file.stat().st_size
        for file in next((world / "train/undisturbed/checkpoints").glob("step-*")).iterdir()
    )
    with small_disk(attempt, round(1.7 * size / 2**20) + 1):  # room for one checkpoint, not two
        with pytest.raises(StageError, match=r"room for the checkpoint before step 20.*run again"):
            run(context("train/full"))
        left = sorted(path.name for path in attempt.glob("checkpoints/step-*"))
        assert len(left) == 1 and left[0].startswith("step-00000010-"), "the half-written one stays"
        grow = ["mount", "-o", f"remount,size={round(20 * size / 2**20)}m", str(attempt)]
        subprocess.run(grow, check=True)
        run(context("train/full"))
        assert resumed_steps(world, "train/full") == [INTERVAL]
        assert steps_logged(world, "train/full") == list(range(LONG_STEPS))
        assert difference(weights(world, "train/full"), undisturbed) == 0.0


@pytest.mark.timeout(400)
def test_elastic_group_shrinks_and_grows_with_its_cluster(tmp_path, raylets, context, monkeypatch):
    """World size 2 -> 1 -> 2 within one run: a raylet is lost, later another one joins.

    Ray looks for new nodes every 20 seconds, so the training must be a longer one.
    """
    build_world(tmp_path, num_rows=8 * 2 * LONG_STEPS, hidden_size=384)
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    attempt = tmp_path / "train/elastic"

    def sizes() -> set[int]:
        found = set()
        for commit in attempt.glob("checkpoints/*/COMMIT.json"):
            with suppress(FileNotFoundError):  # deleted as we look
                found.add(json.loads(commit.read_text())["world_size"])
        return found

    joined = context("none").cluster
    elastic = build_context(
        tmp_path,
        "train/elastic",
        joined,
        address=raylets.address,
        num_workers=[1, 2],
        resize_seconds=2,
        batch_size=8,
        packing=False,
        checkpoint_every=20,
        learning_rate=3e-4,
    )
    with training(elastic):
        wait_for_checkpoint(attempt, 20)
        node = next(iter(raylets.worker_nodes))
        kill_raylet(node)
        raylets.remove_node(node, allow_graceful=False)
        deadline = time.monotonic() + 120
        while sizes() != {1}:
            assert time.monotonic() < deadline, "the group did not go on with one worker"
            time.sleep(0.05)
        raylets.add_node(**NODE)
    lines = records(tmp_path, "train/elastic")
    assert [line["step"] for line in lines] == list(range(2 * LONG_STEPS))
    changes = [lines[0]["world_size"]] + [
        after["world_size"]
        for before, after in itertools.pairwise(lines)
        if after["world_size"] != before["world_size"]
    ]
    assert changes == [2, 1, 2]
    assert all(step % 20 == 0 for step in resumed_steps(tmp_path, "train/elastic"))
    alone = load_model(tmp_path / "model/m/model")
    settings = TrainSettings.from_train(elastic.config.train, elastic.config.model, seed=0)
    result = train_on_plan(alone, read_plan(str(attempt / "plan.arrow")), settings)
    differences = [
        abs(line["loss"] - loss) for line, loss in zip(lines, result.losses, strict=True)
    ]
    assert max(differences[:25]) < TOLERANCE  # the first change of size is among them
    # From there rounding grows by a third a step: this model starts from large random weights.
    tenth = LONG_STEPS // 5
    last = sum(line["loss"] for line in lines[-tenth:]) / tenth
    assert abs(last - result.losses[-tenth:].mean()) < 0.05
