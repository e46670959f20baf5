"""Trains models on the cluster: `fit`.  The stages `train` and `evaluate` call it.

    driver ── fit(jobs) ──> TorchTrainer ──> controller ──> workers (actors.train_worker)
       │                                                       │
       └── reads progress.json ◄── checkpoints/, metrics/, model/ ── storage

Ray Train is used only to start the workers and to restart them after a failure.  The driver
restarts a controller that died.  Workers find the checkpoint to resume from by our own commit
files, not by Ray Train: it learns of a checkpoint only when its controller polls, and keeps the
list in a file that a crash can damage; then it refuses the name of the run.  So every controller
has a new name, and workers report metrics, but no checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray._raylet import PlacementGroupID
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from actors.stage import StageContext
from actors.train_worker import Outcome, train_jobs
from system import storage
from system.errors import ClusterError, ConfigError, DataError, StageError
from system.progress import Progress
from system.training.job import read_finished
from system.training.records import TrainedModel, TrainJob
from system.training.trackers import check_trackers

START_TIMEOUT_SECONDS = 60
"""How long a worker group may wait for its resources before the attempt fails."""
ELASTIC_START_SECONDS = 20
"""The same for an elastic group.  It requests only resources that it believes to exist.  If they do
not arrive, a node was just lost, and the next attempt requests less."""
START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Environment variable from which Ray Train reads the timeout; an existing value is kept."""
_STARTS_THAT_MAY_FAIL = 2
_POLL_SECONDS = 2.0


def fit(jobs: Sequence[TrainJob], context: StageContext) -> list[TrainedModel]:
    """Trains the jobs one after the other with one group of workers; skips finished jobs.

    Args:
        jobs: each with its own name and output directory.
        context: of the calling stage; all actor pools are closed to free their resources.

    Returns:
        The models, in the order of the jobs.

    Raises:
        ConfigError: a tracker cannot be used.
        ClusterError: the workers do not fit into the cluster, or died more often than allowed.
        StageError: a training diverged.
        DataError, ModelError: a plan, a model or a checkpoint cannot be used.
    """
    for job in jobs:
        check_trackers(job.log_to, job.output_uri)
    finished = {job.name: read_finished(job) for job in jobs}
    if len(finished) != len(jobs):
        raise ConfigError(f"expected jobs with different names, found {[job.name for job in jobs]}")
    waiting = [job for job in jobs if finished[job.name] is None]
    if waiting:
        finished |= {model.name: model for model in _fit(waiting, context)}
    return [model for job in jobs if (model := finished[job.name]) is not None]


def _fit(jobs: Sequence[TrainJob], context: StageContext) -> Sequence[TrainedModel]:
    context.cluster.close_pools()  # idle actors would hold the CPUs and GPUs of the workers
    context.cluster.connect()
    _check_room(context)
    for variable, value in _train_environment(context).items():
        os.environ.setdefault(variable, value)
    scratch = storage.join(context.attempt, "ray-train")
    try:
        with _shown_progress(jobs, context.progress):
            outcome = _run_with_restarts(jobs, context, scratch)
    except ControllerError as error:
        raise ClusterError(
            f"{_request(context)} could not be started in several attempts of up to "
            f"{os.environ[START_TIMEOUT_VARIABLE]} s: {error.controller_failure}. Free resources "
            "or request less (train.num_workers, cluster.actor_cpus, cluster.train_gpus); run "
            "again to continue from the newest checkpoint."
        ) from error
    except (TrainingFailedError, ray.exceptions.RayActorError) as error:
        raise ClusterError(
            f"training failed more than train.max_failures = {context.config.train.max_failures} "
            f"times; the last time with: {_last_line(error)}. Checkpoints are kept; run again to "
            "continue from the newest one."
        ) from error
    finally:
        storage.delete(scratch)
    if not isinstance(outcome, Outcome):
        raise StageError("the training workers ended without a result; run again to continue")
    if outcome.error is not None:
        raise outcome.error
    return outcome.models


def _run_with_restarts(jobs: Sequence[TrainJob], context: StageContext, scratch: str) -> Any:
    """Runs the training and restarts its controller if that dies; returns what the workers return.

    Ray Train restarts dead workers, but nothing restarts its controller.  When a controller dies,
    Ray ends its workers, because their owner is gone.  A worker that lives on for a moment finds
    the name of another attempt in `attempt.json` and commits nothing more.
    """
    for deaths in itertools.count(1):
        trainer = _trainer(jobs, context, scratch)
        try:
            return trainer.fit().return_value
        except ray.exceptions.RayActorError:
            if deaths > context.config.train.max_failures:
                raise
            context.progress.say("train: the controller of Ray Train died; starting it again")
            _free_reservations()


def _free_reservations() -> None:
    """Removes the placement groups that a dead controller had reserved for its workers.

    Ray removes them only when the whole job ends, and the cleaner of Ray Train needs the dashboard,
    which a local Ray does not have.  The id of a placement group ends in the id of its Ray job.
    All actor pools are closed here, so every group of this job belonged to the controller.
    """
    job = ray.get_runtime_context().get_job_id()
    for group_id, group in placement_group_table().items():
        if group_id.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def _train_environment(context: StageContext) -> dict[str, str]:
    """Settings of Ray Train that it reads from environment variables."""
    start_seconds = ELASTIC_START_SECONDS if _is_elastic(context) else START_TIMEOUT_SECONDS
    values = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        START_TIMEOUT_VARIABLE: str(start_seconds),
    }
    if context.cluster.is_own:  # saves two processes; a single machine needs no preemption watcher
        values |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}
    return values


class _Trainer(TorchTrainer):
    """A TorchTrainer without its handler of Ctrl-C; the command line handles Ctrl-C itself.

    The handler of Ray Train would end the process with exit code 0 in the middle of a training.  It
    would also stay after the training and call a controller that is gone.  Workers and controller
    need no handler: they are actors of the driver and end with it.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _trainer(jobs: Sequence[TrainJob], context: StageContext, scratch: str) -> TorchTrainer:
    config = context.config
    cluster = config.cluster
    use_gpu = cluster.train_gpus > 0
    failed_starts = _STARTS_THAT_MAY_FAIL
    if _is_elastic(context):  # every lost node may cause one failed start
        failed_starts += config.train.max_failures
    resources = {"CPU": cluster.actor_cpus}
    if use_gpu:
        resources["GPU"] = cluster.train_gpus
    threads = max(1, int(cluster.actor_cpus))
    filesystem, scratch_path = storage.arrow_filesystem(scratch)
    return _Trainer(
        train_jobs,
        train_loop_config={"jobs": list(jobs), "num_threads": threads},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers,
            elastic_resize_monitor_interval_s=config.train.resize_seconds,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"fit-{uuid.uuid4().hex[:12]}",
            storage_path=scratch_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=config.train.max_failures,
                controller_failure_limit=failed_starts,
            ),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        ),
    )


def _is_elastic(context: StageContext) -> bool:
    return not isinstance(context.config.train.num_workers, int)


def _fewest_workers(context: StageContext) -> int:
    num_workers = context.config.train.num_workers
    return num_workers if isinstance(num_workers, int) else num_workers[0]


def _request(context: StageContext) -> str:
    cluster = context.config.cluster
    return (
        f"{_fewest_workers(context)} training workers with {cluster.actor_cpus:g} CPUs and "
        f"{cluster.train_gpus:g} GPUs each (the cluster has {_resources()})"
    )


def _resources() -> str:
    total: Mapping[str, float] = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"


def _check_room(context: StageContext) -> None:
    """Refuses workers that do not fit into a local Ray; another cluster may still grow."""
    config = context.config.cluster
    if not context.cluster.is_own:
        return
    total: Mapping[str, float] = ray.cluster_resources()
    num_workers = _fewest_workers(context)
    cpus, gpus = num_workers * config.actor_cpus, num_workers * config.train_gpus
    if cpus > total.get("CPU", 0) or gpus > total.get("GPU", 0):
        raise ClusterError(
            f"{_request(context)} do not fit into this local Ray. Lower train.num_workers (to "
            f"{max(1, math.floor(total.get('CPU', 1) / config.actor_cpus))}) or "
            "cluster.actor_cpus, raise cluster.num_cpus, or use a larger machine."
        )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def _shown_progress(jobs: Sequence[TrainJob], progress: Progress) -> Iterator[None]:
    """Shows a progress bar of the jobs within the block, from the files that workers write."""
    stop = threading.Event()
    label = "train" if len(jobs) == 1 else f"train {len(jobs)} models"

    def percent() -> int:
        return int(100 * sum(_done_share(job) for job in jobs) / max(1, len(jobs)))

    def watch() -> None:
        with progress.bar(f"{label}, % of the steps", total=100) as bar:
            shown = percent()
            bar.skip(shown)
            while not stop.wait(_POLL_SECONDS):
                if (now := percent()) > shown:
                    bar.advance(now - shown)
                    shown = now

    thread = threading.Thread(target=watch, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _done_share(job: TrainJob) -> float:
    if storage.exists(storage.join(job.output_uri, "done.json")):
        return 1.0
    uri = storage.join(job.output_uri, "progress.json")
    if not storage.exists(uri):
        return 0.0
    # The worker deletes it at the end; a damaged one must not end the bar.
    with contextlib.suppress(FileNotFoundError, DataError, LookupError, TypeError):
        state = storage.read_json(uri)
        return state["step"] / state["of"]
    return 0.0
