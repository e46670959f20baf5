"""One training from plan to exported model, as every rank runs it.

    OUTPUT/
      checkpoints/   metrics/part-*.jsonl   progress.json      while it runs
      model/         Hugging Face directory
      adapter/       the adapters alone, where they were trained
      metrics.jsonl
      done.json      written last: identity and summary; a job with it is finished

Killed at any moment and started again with any number of ranks it goes on from the newest whole
checkpoint.  Errors that are the input's are raised by all ranks together, so that none waits for
another that has given up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from system import storage
from system.errors import DataError, InstructMixError, ModelError, StageError
from system.models.base import load_model
from system.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_checkpoints,
    load_checkpoint,
)
from system.training.export import ModelCard, export_model, whole_state
from system.training.flops import peak_flops, step_flops
from system.training.log import TrainLog, TrainTotals
from system.training.lora import add_adapters, merge_adapters
from system.training.plan import TrainPlan, read_plan
from system.training.settings import TrainSettings
from system.training.train import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What to train and where to put it."""

    name: str
    plan_uri: str
    """A plan that `system.training.plan.write_plan` wrote."""
    output_uri: str
    """Directory of its own, on storage that all workers reach."""
    settings: TrainSettings
    model_dir: str
    """Directory (URI) of the base model."""
    base_model: str = ""
    """How the model card names the base model."""
    export_dtype: str = "float32"
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; 0 deletes them all once the job is done."""
    trust_remote_code: bool = False
    log_to: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """For the model card: fingerprints of what led to the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A finished job."""

    name: str
    model_uri: str
    metrics_uri: str
    num_steps: int
    num_tokens: int
    """Tokens trained on, prompts included."""
    num_labels: int
    """Response tokens trained on."""
    first_loss: float
    last_loss: float
    """Means of the first and the last tenth of the steps, nats per response token."""
    seconds: float
    """Spent in steps, over all attempts that count."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train together."""

    group: dist.ProcessGroup | None = None
    """Sums gradients; none: this process alone."""
    cpu_group: dist.ProcessGroup | None = None
    """Checkpoints and agreement, over gloo, apart from `group`."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.group is None or dist.get_rank(self.group) == 0

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.cpu_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, src=dist.get_global_rank(self.cpu_group, 0), group=self.cpu_group
        )
        return box[0]

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block whose input errors are raised by every rank as soon as one has met one."""
        error: InstructMixError | None = None
        try:
            yield
        except InstructMixError as met:
            error = met
        errors: list[Any] = [error]
        if self.cpu_group is not None:
            errors = [None] * dist.get_world_size(self.cpu_group)
            dist.all_gather_object(errors, error, group=self.cpu_group)
        for met in errors:
            if met is not None:
                raise met


def read_finished(job: TrainJob) -> TrainedModel | None:
    """The result of a job that is done already.

    Raises:
        DataError: another job was finished in this directory.
    """
    uri = storage.join(job.output_uri, "done.json")
    if not storage.exists(uri):
        return None
    done = storage.read_json(uri)
    if done["settings"] != job.settings.sha256() or done["plan"] != read_plan(job.plan_uri).sha256:
        raise DataError(
            f"{job.output_uri} holds the finished model of another plan or of other settings; "
            "train into another directory, or delete it"
        )
    return TrainedModel(**done["summary"])


def run_job(
    job: TrainJob,
    ranks: Ranks,
    device: torch.device,
    on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
) -> TrainedModel:
    """Trains and exports, or gives back what was finished before.

    Args:
        job: the job, the same on all ranks.
        ranks: who trains.
        device: of this rank.
        on_checkpoint: told the metrics of the last step at every checkpoint, on all ranks.

    Raises:
        StageError: a loss or gradient is not finite.
        DataError, ModelError: the plan, the model or a checkpoint cannot be used.
    """
    with ranks.agreeing():
        finished = read_finished(job)
    finished = ranks.from_first(finished)
    while finished is None:
        with contextlib.suppress(_UnreadableError):
            finished = _train(job, ranks, device, on_checkpoint)
    return finished


class _UnreadableError(Exception):
    """The newest checkpoint turned out damaged and was taken away: start over with the next."""


def _train(
    job: TrainJob,
    ranks: Ranks,
    device: torch.device,
    on_checkpoint: Callable[[dict[str, Any]], None] | None,
) -> TrainedModel:
    checkpoints_uri = storage.join(job.output_uri, "checkpoints")
    with ranks.agreeing():
        plan = read_plan(job.plan_uri)
        base_dir = _local_model(job.model_dir)
        identity = {
            "plan": plan.sha256,
            "settings": job.settings.sha256(),
            "model": model_fingerprint(base_dir),
        }
        model = load_model(base_dir, device=str(device), trust_remote_code=job.trust_remote_code)
        found = find_checkpoints(checkpoints_uri, identity)
    newest: Checkpoint | None = ranks.from_first(found[0] if found else None)
    with Training(model, plan, job.settings, group=ranks.group) as training:
        start = 0
        if newest is not None:
            start = newest.step
            try:
                load_checkpoint(newest, training, ranks.cpu_group)
            except StageError as error:
                raise _UnreadableError from error
        writer = CheckpointWriter(
            checkpoints_uri,
            identity,
            keep=max(1, job.keep_checkpoints),
            group=ranks.cpu_group,
            is_async=device.type == "cuda",
        )
        totals = TrainTotals(newest.counters if newest else None)
        log = _open_log(job, training, start, device) if ranks.is_first else None
        _make_steps(job, training, range(start, plan.num_steps), writer, totals, log, on_checkpoint)
        writer.finish()
        is_whole = job.settings.lora is None and job.settings.parallel == "ddp"
        state = None if is_whole else whole_state(training)
    first_loss, last_loss = totals.edges()
    summary = TrainedModel(
        name=job.name,
        model_uri=storage.join(job.output_uri, "model"),
        metrics_uri=storage.join(job.output_uri, "metrics.jsonl"),
        num_steps=plan.num_steps,
        num_tokens=totals.num_tokens,
        num_labels=totals.num_labels,
        first_loss=first_loss,
        last_loss=last_loss,
        seconds=round(totals.seconds, 3),
    )
    if ranks.is_first:
        _export(job, plan, base_dir, state, model, identity, summary)
        assert log is not None
        log.close()
        done = {"plan": plan.sha256, "settings": job.settings.sha256(), "summary": asdict(summary)}
        storage.write_json(storage.join(job.output_uri, "done.json"), done)
        if job.keep_checkpoints == 0:
            storage.delete(checkpoints_uri)
    return ranks.from_first(summary)


def _open_log(job: TrainJob, training: Training, start: int, device: torch.device) -> TrainLog:
    flops_S = step_flops(
        training.plan, training.model.config, is_lora=job.settings.lora is not None
    )
    peak = None if flops_S is None else peak_flops(device, training.compute_dtype)
    return TrainLog(
        job.output_uri,
        start_step=start,
        num_steps=training.plan.num_steps,
        world_size=training.world_size,
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
    writer: CheckpointWriter,
    totals: TrainTotals,
    log: TrainLog | None,
    on_checkpoint: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Trains, and saves a checkpoint after every `checkpoint_every` steps but the last."""
    for step in steps:
        stats = training.step(step)
        totals.add(stats)
        if log is not None:
            log.add(stats)
        writer.poll()
        if (step + 1) % job.checkpoint_every == 0 and step + 1 < steps.stop:
            if log is not None:
                log.flush()
            writer.save(training, step + 1, totals.state())
            if on_checkpoint is not None:
                on_checkpoint({"job": job.name, "step": step + 1, "loss": stats.loss})


def _export(
    job: TrainJob,
    plan: TrainPlan,
    base_dir: Path,
    state: dict[str, torch.Tensor] | None,
    model: PreTrainedModel,
    hashes: Mapping[str, str],
    summary: TrainedModel,
) -> None:
    """Writes the model; on rank 0 alone.  With a gathered state it goes into a fresh base model."""
    if state is not None:
        model = load_model(base_dir, trust_remote_code=job.trust_remote_code)
        lora = job.settings.lora
        adapted = None if lora is None else add_adapters(model, lora, job.settings.seed)
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, f"trained weights that the base model lacks: {unexpected}"
        if adapted is not None:
            with tempfile.TemporaryDirectory(prefix="instructmix-adapter-") as folder:
                adapted.save_pretrained(folder)
                storage.upload_directory(Path(folder), storage.join(job.output_uri, "adapter"))
            model = merge_adapters(adapted)
    stages = dict.fromkeys(plan.table.column("stage").to_pylist())
    categories = Counter(plan.table.column("category").to_pylist())
    lora = job.settings.lora
    card = ModelCard(
        base_model=job.base_model or base_dir.name,
        method=(
            f"{'All weights' if lora is None else f'Adapters of rank {lora.rank}, merged'}, AdamW "
            f"at {job.settings.learning_rate:g}, {job.settings.lr_schedule} schedule, "
            f"{plan.num_steps} steps"
        ),
        stages=tuple(stages),
        categories=dict(categories),
        hashes={**job.hashes, **{f"training {name}": value for name, value in hashes.items()}},
        results={
            "response tokens": f"{summary.num_labels:,}",
            "tokens": f"{summary.num_tokens:,}",
            "loss, first tenth of the steps": f"{summary.first_loss:.4f}",
            "loss, last tenth of the steps": f"{summary.last_loss:.4f}",
        },
    )
    export_model(
        model,
        str(base_dir),
        summary.model_uri,
        card,
        dtype=job.export_dtype,
        trust_remote_code=job.trust_remote_code,
    )


def model_fingerprint(folder: Path) -> str:
    """Hash of a model directory: names, sizes, and the first and last mebibyte of every file."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".jinja") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _local_model(uri: str) -> Path:
    """The model directory on this machine; a remote one is copied once per machine."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder = storage.download_directory(uri, Path(tempfile.gettempdir()) / f"instructmix-{key}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{uri}: expected a model directory, found no config.json in it")
    return folder
