"""Controller, raylet and disk fail under real training workers; the cluster shrinks and grows.

One cluster of two raylets, one CPU each: the driver and the controller live on the first.  Every
training repeats at most one checkpoint interval and ends in the bits of the undisturbed one, or,
where the number of workers changed, so near to them that no step can be missing.
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
from ray.cluster_utils import Cluster as Raylets
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from trainer_world import (
    LONG,
    LONG_STEPS,
    SAME_LOSS,
    SAME_WAY,
    build_context,
    newest_commit,
    records,
    resumed_steps,
    steps_logged,
    strayed,
    wait_for_checkpoint,
)

from actors.cluster import Cluster
from actors.stage import StageContext
from actors.trainer import run
from system.errors import ClusterError, StageError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INTERVAL = LONG["checkpoint_every"]
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


@pytest.fixture
def context(long_world: Path, raylets: Raylets) -> Callable[..., StageContext]:
    """Builds the context of a training on the two raylets."""
    raylets.wait_for_nodes()
    cluster = Cluster(build_context(long_world, "none", address=raylets.address).config.cluster)
    cluster.connect()

    def build(attempt: str, **train) -> StageContext:
        return build_context(
            long_world, attempt, cluster, address=raylets.address, **(LONG | train)
        )

    return build


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


def test_killed_controller_and_torn_snapshots_change_nothing(long_world, context, undisturbed):
    attempt = long_world / "train/controller"
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
    (resumed,) = resumed_steps(long_world, "train/controller")
    assert resumed % INTERVAL == 0 and resumed >= committed
    assert steps_logged(long_world, "train/controller") == list(range(LONG_STEPS))
    assert strayed(long_world, "train/controller", undisturbed) == 0.0


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


def test_controller_that_keeps_dying_is_an_error_that_says_so(long_world, context):
    attempt = long_world / "train/dying"
    build = context("train/dying", max_failures=0)
    before = set(processes_called("ray::TrainController"))

    with pytest.raises(ClusterError, match=r"max_failures = 0 .*run again"), training(build):
        deadline = time.monotonic() + 300
        while not (found := set(processes_called("ray::TrainController")) - before):
            assert time.monotonic() < deadline, "no controller was started"
            time.sleep(0.05)
        for controller in found:
            controller.kill()
    assert not (attempt / "done.json").exists()


def test_killed_raylet_changes_nothing(long_world, raylets, context, undisturbed):
    attempt = long_world / "train/raylet"
    with training(context("train/raylet")):
        wait_for_checkpoint(attempt, 20)
        node = next(iter(raylets.worker_nodes))
        committed = newest_commit(attempt)
        kill_raylet(node)
        raylets.remove_node(node, allow_graceful=False)
        raylets.add_node(**NODE)
    resumed = resumed_steps(long_world, "train/raylet")
    assert resumed and resumed[0] >= committed
    assert all(step % INTERVAL == 0 for step in resumed)
    assert steps_logged(long_world, "train/raylet") == list(range(LONG_STEPS))
    assert strayed(long_world, "train/raylet", undisturbed) == 0.0


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
def test_full_disk_is_told_and_a_rerun_ends_in_the_same_bits(long_world, context, undisturbed):
    attempt = long_world / "train/full"
    size = sum(
        file.stat().st_size for file in next((undisturbed / "checkpoints").glob("step-*")).iterdir()
    )
    with small_disk(attempt, round(1.7 * size / 2**20) + 1):  # room for one checkpoint, not two
        with pytest.raises(StageError, match=r"room for the checkpoint before step 20.*run again"):
            run(context("train/full"))
        left = sorted(path.name for path in attempt.glob("checkpoints/step-*"))
        assert len(left) == 1 and left[0].startswith("step-00000010-"), "the half-written one stays"
        grow = ["mount", "-o", f"remount,size={round(20 * size / 2**20)}m", str(attempt)]
        subprocess.run(grow, check=True)
        run(context("train/full"))
        assert resumed_steps(long_world, "train/full") == [INTERVAL]
        assert steps_logged(long_world, "train/full") == list(range(LONG_STEPS))
        assert strayed(long_world, "train/full", undisturbed) == 0.0


def hold_back(pid: int, seconds: float = 400.0) -> None:
    """Lets a process run a hundredth of the time until somebody ends it.

    So a training lasts as long as what is waited for, on a machine of any speed.
    """
    deadline = time.monotonic() + seconds
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"nobody ended process {pid} in {seconds} s"
            process.suspend()
            time.sleep(2.0)
            process.resume()
            time.sleep(0.02)


def sizes_committed(attempt: Path) -> set[int]:
    """Numbers of workers that wrote the checkpoints that are there."""
    found = set()
    for commit in attempt.glob("checkpoints/*/COMMIT.json"):
        with suppress(FileNotFoundError):  # deleted as we look
            found.add(json.loads(commit.read_text())["world_size"])
    return found


def test_elastic_group_shrinks_and_grows_with_its_cluster(
    long_world, raylets, context, undisturbed, monkeypatch
):
    """World size 2 -> 1 -> 2 within one run: a raylet is lost, later another one joins.

    Ray looks for new nodes every 20 seconds: until then the one worker that is left is held back.
    """
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    name, attempt = "train/elastic", long_world / "train/elastic"
    with training(context(name, num_workers=[1, 2], resize_seconds=2)):
        wait_for_checkpoint(attempt, 20)
        node = next(iter(raylets.worker_nodes))
        kill_raylet(node)
        raylets.remove_node(node, allow_graceful=False)
        deadline = time.monotonic() + 300
        while 1 not in sizes_committed(attempt):
            assert time.monotonic() < deadline, "the group did not go on with one worker"
            time.sleep(0.02)
        raylets.add_node(**NODE)
        hold_back(json.loads((attempt / "progress.json").read_text())["pid"])
    lines, expected = records(long_world, name), records(long_world, "train/undisturbed")
    assert [line["step"] for line in lines] == list(range(LONG_STEPS))
    changes = [size for size, _ in itertools.groupby(line["world_size"] for line in lines)]
    assert changes == [2, 1, 2]
    assert all(step % INTERVAL == 0 for step in resumed_steps(long_world, name))
    apart = [abs(line["loss"] - other["loss"]) for line, other in zip(lines, expected, strict=True)]
    assert max(apart) < SAME_LOSS
    assert strayed(long_world, name, undisturbed) < SAME_WAY
