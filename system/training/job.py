"""A training job from plan to exported model.  Every rank runs `run_job`.

    OUTPUT/
      checkpoints/   metrics/part-*.jsonl   progress.json      while the job runs
      model/         Hugging Face directory
      adapter/       adapters, if these were trained
      metrics.jsonl
      done.json      written last: hashes and summary; the job is finished if it exists

A job that is killed at any moment and started again, with any number of ranks, continues from the
newest complete checkpoint.  Errors of the input are raised by all ranks together; otherwise the
others would wait for the rank that stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from system import storage
from system.errors import DataError, InstructMixError, StageError
from system.models.base import load_model
from system.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_checkpoints,
    load_checkpoint,
    resumable,
)
from system.training.export import export_job, whole_state
from system.training.flops import peak_flops, step_flops
from system.training.heldout import held_out_loss
from system.training.identity import local_model, training_identity
from system.training.log import TrainLog, TrainTotals
from system.training.plan import TrainPlan, read_plan
from system.training.records import TrainedModel, TrainJob
from system.training.train import Training


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train together."""

    group: dist.ProcessGroup | None = None
    """Sums gradients; None: a single process."""
    cpu_group: dist.ProcessGroup | None = None
    """A gloo group for checkpoints and for exchanging errors; not the same as `group`."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.group is None or dist.get_rank(self.group) == 0

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        if self.cpu_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, src=dist.get_global_rank(self.cpu_group, 0), group=self.cpu_group
        )
        return box[0]

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """If any rank raises an input error within the block, every rank raises it at its end."""
        error: InstructMixError | None = None
        try:
            yield
        except InstructMixError as raised:
            error = raised
        errors: list[Any] = [error]
        if self.cpu_group is not None:
            errors = [None] * dist.get_world_size(self.cpu_group)
            dist.all_gather_object(errors, error, group=self.cpu_group)
        for other in errors:
            if other is not None:
                raise other


def read_finished(job: TrainJob) -> TrainedModel | None:
    """The result of a finished job; None if it is not finished.

    Raises:
        DataError: the directory holds the result of another job.
    """
    uri = storage.join(job.output_uri, "done.json")
    if not storage.is_whole(uri):
        return None
    done = storage.read_json(uri)
    if not isinstance(done, dict) or "summary" not in done:
        return None
    inputs = _input_hashes(job, read_plan(job.plan_uri))
    differing = sorted(name for name, value in inputs.items() if done.get(name) != value)
    if differing:
        raise DataError(
            f"{job.output_uri} holds the finished model of another training "
            f"({', '.join(differing)} differ); use another output directory, or delete this one"
        )
    return TrainedModel(**done["summary"])


def _input_hashes(job: TrainJob, plan: TrainPlan) -> dict[str, str]:
    """What decides the result of a job; `done.json` records it."""
    hashes = {"plan": plan.sha256, "settings": job.settings.sha256(), "export": job.export}
    if job.heldout_uri is not None:
        hashes["heldout"] = read_plan(job.heldout_uri).sha256
    return hashes


def run_job(
    job: TrainJob,
    ranks: Ranks,
    device: torch.device,
    on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
) -> TrainedModel:
    """Trains and exports a model, or returns the result of an earlier run of the same job.

    Args:
        job: the job, the same on all ranks.
        ranks: the processes that train together.
        device: of this rank.
        on_checkpoint: called on all ranks at every checkpoint, with metrics of the last step.

    Raises:
        StageError: a loss or gradient is not finite.
        DataError, ModelError: the plan, the model or a checkpoint cannot be used.
    """
    with ranks.agreeing():
        finished = read_finished(job)
    finished = ranks.from_first(finished)
    while finished is None:  # a damaged checkpoint is removed, then the next older one is tried
        with contextlib.suppress(_UnreadableCheckpointError):
            finished = _train(job, ranks, device, on_checkpoint)
    return finished


class _UnreadableCheckpointError(Exception):
    """The checkpoint is damaged and was removed; the caller tries the next older one."""


def _train(
    job: TrainJob,
    ranks: Ranks,
    device: torch.device,
    on_checkpoint: Callable[[dict[str, Any]], None] | None,
) -> TrainedModel:
    checkpoints_uri = storage.join(job.output_uri, "checkpoints")
    with ranks.agreeing():
        plan = read_plan(job.plan_uri)
        heldout = None if job.heldout_uri is None else read_plan(job.heldout_uri)
        base_dir = local_model(job.model_dir)
        model = load_model(base_dir, device=str(device), trust_remote_code=job.trust_remote_code)
        identity = training_identity(job, plan, heldout, base_dir, model, device)
        checkpoints = resumable(find_checkpoints(checkpoints_uri, identity))
    # Ranks may list the storage at different times: all use what rank 0 found.
    newest: Checkpoint | None = ranks.from_first(checkpoints[0] if checkpoints else None)
    with contextlib.ExitStack() as stack:
        with ranks.agreeing():
            training = Training(model, plan, job.settings, group=ranks.group)
            stack.enter_context(training)
        start = 0
        if newest is not None:
            start = newest.step
            _load(newest, training, ranks)
        writer = CheckpointWriter(
            checkpoints_uri,
            identity,
            keep=max(1, job.keep_checkpoints),
            group=ranks.cpu_group,
            is_async=device.type == "cuda",
        )
        totals = TrainTotals(newest.counters if newest else None)
        log = None
        with ranks.agreeing():
            if ranks.is_first:
                log = _open_log(job, training, start, writer.attempt, device)
        steps = range(start, plan.num_steps)
        try:
            _make_steps(job, training, steps, heldout, writer, totals, log, ranks, on_checkpoint)
        except InstructMixError:
            writer.poll()  # commit a completed save, even though the training failed
            raise
        writer.check_current()
        if job.export == "best" and totals.best_step != plan.num_steps:
            _load_best(checkpoints_uri, identity, totals.best_step, training, ranks)
        # Collected before the block ends, because leaving it merges the adapters.
        is_whole = job.settings.lora is None and job.settings.parallel == "ddp"
        state = None if is_whole else whole_state(training)
    summary = _summary(job, plan, totals)
    with ranks.agreeing(), storage.room_for("the trained model", job.output_uri):
        if ranks.is_first:
            export_job(job, plan, base_dir, state, model, identity, summary)
            assert log is not None
            log.close()
            done = {**_input_hashes(job, plan), "summary": asdict(summary)}
            storage.write_json(storage.join(job.output_uri, "done.json"), done)
            if job.keep_checkpoints == 0:
                storage.delete(checkpoints_uri)
    return ranks.from_first(summary)


def _load(checkpoint: Checkpoint, training: Training, ranks: Ranks) -> None:
    try:
        load_checkpoint(checkpoint, training, ranks.cpu_group)
    except StageError as error:
        raise _UnreadableCheckpointError from error


def _load_best(
    checkpoints_uri: str,
    identity: Mapping[str, str],
    step: int,
    training: Training,
    ranks: Ranks,
) -> None:
    """Loads the best checkpoint; if it does not exist, the training resumes from an older one."""
    matches = [c for c in find_checkpoints(checkpoints_uri, identity) if c.step == step]
    best: Checkpoint | None = ranks.from_first(matches[0] if matches else None)
    if best is None:
        raise _UnreadableCheckpointError
    _load(best, training, ranks)


def _summary(job: TrainJob, plan: TrainPlan, totals: TrainTotals) -> TrainedModel:
    first_loss, last_loss = totals.edges()
    is_best = job.export == "best"
    return TrainedModel(
        name=job.name,
        model_uri=storage.join(job.output_uri, "model"),
        metrics_uri=storage.join(job.output_uri, "metrics.jsonl"),
        num_steps=plan.num_steps,
        num_tokens=totals.num_tokens,
        num_labels=totals.num_labels,
        first_loss=first_loss,
        last_loss=last_loss,
        seconds=round(totals.seconds, 3),
        exported_step=totals.best_step if is_best else plan.num_steps,
        heldout_loss=totals.best_loss if is_best else totals.heldout_loss,
    )


def _open_log(
    job: TrainJob, training: Training, start: int, attempt: str, device: torch.device
) -> TrainLog:
    flops_S = step_flops(
        training.plan, training.model.config, is_lora=job.settings.lora is not None
    )
    peak = None if flops_S is None else peak_flops(device, training.compute_dtype)
    return TrainLog(
        job.output_uri,
        start_step=start,
        num_steps=training.plan.num_steps,
        world_size=training.world_size,
        attempt=attempt,
        device=device,
        flops_S=flops_S,
        peak_flops=None if peak is None else peak * training.world_size,
        trackers=job.log_to,
        name=job.name,
    )


def _make_steps(
    job: TrainJob,
    training: Training,
    steps: range,
    heldout: TrainPlan | None,
    writer: CheckpointWriter,
    totals: TrainTotals,
    log: TrainLog | None,
    ranks: Ranks,
    on_checkpoint: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Makes the steps; saves a checkpoint every `checkpoint_every` steps, except after the last."""
    for step in steps:
        stats = training.step(step)
        totals.add(stats)
        is_last = step + 1 == steps.stop
        is_checkpoint = is_last or (step + 1) % job.checkpoint_every == 0
        loss = None
        if heldout is not None and is_checkpoint:
            loss = held_out_loss(training, heldout)
            totals.add_heldout(step + 1, loss)
        if log is not None:
            log.add(stats, loss)
        writer.poll()
        if not is_checkpoint:
            continue
        writer.finish()
        # Metrics come before the checkpoint: a training that resumes from it never lacks them.
        with ranks.agreeing(), storage.room_for("the metrics", job.output_uri):
            if log is not None:
                log.flush()
        if is_last:
            continue
        best_step = None if heldout is None else totals.best_step
        writer.save(training, step + 1, totals.state(), best_step)
        if on_checkpoint is not None:
            on_checkpoint({"job": job.name, "step": step + 1, "loss": stats.loss})
