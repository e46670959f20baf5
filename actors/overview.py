"""What `check` and `status` print: what would run and why, what is finished, what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.pipeline import STAGES, Stage, stage_inputs
from system import storage
from system.config import RunConfig
from system.data.corpus import Corpus
from system.devices import idle_gpus_remark, visible_gpus
from system.errors import ConfigError
from system.forecast import Forecast, Found, describe, make_forecast
from system.influence.append.earlier import APPENDS_TO
from system.models.base import kind_of
from system.rundir import RunDir, StageRecord, describe_change, fingerprint
from system.solve import Mix
from system.stages import STAGE_FOLDERS

_SPEED_FIELDS = (
    "after.model", "influence.batch_size", "influence.metric", "influence.max_new_tokens",
)  # fmt: skip
"""Inputs of the influence stage that decide how fast it is on a given machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """What `check` found out."""

    text: str
    forecast: Forecast


def describe_plan(config: RunConfig, *, probe: bool = False) -> PlanView:
    """The plan of a run, stage by stage, and what it takes; starts nothing, changes nothing.

    Args:
        config: of the run.
        probe: measure the proxy's speed for some seconds where no finished run tells it.

    Raises:
        InstructMixError: the same input errors that `run` would report before it starts.
    """
    run_dir = RunDir(config.run_dir)
    lines = [f"run directory {run_dir.uri}", ""]
    records: dict[str, StageRecord] = {}
    for stage in STAGES:
        state = _state(stage, config, records, run_dir)
        lines.append(f"  {stage.name:<11} {state}")
    found = _found(config, records, run_dir)
    remarks = _remarks(config, _train_rows(found))
    forecast = make_forecast(config, found, probe=probe)
    text = "\n".join([*lines, "", *describe(forecast), *remarks]).rstrip()
    return PlanView(text=text, forecast=forecast)


def _state(
    stage: Stage, config: RunConfig, records: dict[str, StageRecord], run_dir: RunDir
) -> str:
    stage.identity(config)
    if any(name not in records for name in stage.after):
        return "to do"
    inputs = stage_inputs(stage, config, records)
    attempt = fingerprint(inputs)
    committed = run_dir.read_record(stage.folder)
    if committed is not None and committed.fingerprint == attempt:
        records[stage.name] = committed
        return f"done ({committed.seconds:.0f} s)"
    earlier = run_dir.read_attempt_record(stage.folder, attempt)
    if earlier is not None:
        records[stage.name] = earlier
        return "done in an earlier attempt with these settings"
    if committed is not None:
        return f"again: {describe_change(committed.inputs, inputs)}"
    if storage.exists(run_dir.attempt_uri(stage.folder, attempt)):
        return "to continue"
    return "to do"


def _found(config: RunConfig, records: Mapping[str, StageRecord], run_dir: RunDir) -> Found:
    """What the forecast is made from."""

    def output(stage: str, name: str) -> str | None:
        return run_dir.output_uri(records[stage], name) if stage in records else None

    model_uri = output("model", "model")
    model_dir = None if model_uri is None else storage.local_path(model_uri)
    if model_uri is None and kind_of(config.model.path) == "directory":
        model_dir = Path(config.model.path)
    mix_uri = output("solve", "mix")
    mix = None
    if mix_uri is not None:
        mix = Mix.from_json(storage.read_bytes(mix_uri).decode()).counts()
    return Found(
        tagged_uri=output("tag", "manifest"),
        ingested_uri=output("ingest", "manifest"),
        model_dir=model_dir,
        mix=mix,
        done=frozenset(records),
        attempts=tuple(_measured_attempts(config, records, run_dir)),
        earlier_uri=_earlier_attempt(config, records, run_dir),
    )


def _earlier_attempt(
    config: RunConfig, records: Mapping[str, StageRecord], run_dir: RunDir
) -> str | None:
    """The influence attempt that this configuration appends to."""
    stage = next(item for item in STAGES if item.name == "influence")
    if any(name not in records for name in stage.after):
        return None
    name = stage_inputs(stage, config, records).get(APPENDS_TO)
    return None if name is None else run_dir.attempt_uri(stage.folder, name)


def _measured_attempts(
    config: RunConfig, records: Mapping[str, StageRecord], run_dir: RunDir
) -> Iterator[str]:
    """Influence attempts that tell the speed of this one: same model, batches and adapters."""
    stage = next(item for item in STAGES if item.name == "influence")
    if any(name not in records for name in stage.after):
        return
    inputs = stage_inputs(stage, config, records)
    yield run_dir.attempt_uri(stage.folder, fingerprint(inputs))
    committed = run_dir.read_record(stage.folder)
    if committed is not None and _speed_inputs(committed.inputs) == _speed_inputs(inputs):
        yield run_dir.attempt_uri(stage.folder, committed.fingerprint)


def _speed_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stage's inputs, those that decide how fast it is on a given machine."""
    return {
        name: value
        for name, value in inputs.items()
        if name in _SPEED_FIELDS or name.startswith("influence.lora")
    }


def _train_rows(found: Found) -> int | None:
    """Train rows of all categories, as far as the stages that are done say."""
    uri = found.tagged_uri or found.ingested_uri
    return None if uri is None else sum(Corpus.open(uri).counts("train").values())


def _remarks(config: RunConfig, supply: int | None) -> list[str]:
    """What is allowed but will disappoint.

    Args:
        config: of the run.
        supply: train rows of all categories; None while nothing is read.

    Raises:
        ConfigError: the budget is more than the train rows that there are.
    """
    remarks = []
    if config.influence.replications == 1:
        remarks.append(
            "influence.replications is 1: errors will be held-out only, nothing will count as "
            "identifiable, and the mix will stay at the base"
        )
    solve = config.solve
    if supply is not None and solve.unit == "examples" and solve.max_epochs == 1.0:
        if solve.budget > supply:
            raise ConfigError(
                f"solve.budget {solve.budget:,} is more than the {supply:,} train rows there are "
                "at solve.max_epochs 1: lower the budget or allow more epochs"
            )
        if solve.budget == supply:
            remarks.append(
                "solve.budget equals all train rows at solve.max_epochs 1: nothing can move; "
                "lower the budget or allow more epochs"
            )
    idle = idle_gpus_remark(config.cluster, visible_gpus(), "this machine")
    if idle is not None:
        remarks.append(idle)
    return [f"note: {remark}" for remark in remarks]


def describe_status(run_dir_uri: str) -> str:
    """What is finished in a run directory.

    Raises:
        ConfigError: there is no run directory.
    """
    run_dir = RunDir(run_dir_uri)
    if not storage.exists(storage.join(run_dir.uri, "config.json")):
        raise ConfigError(
            f"{run_dir_uri}: expected a run directory, found no config.json in it; "
            "`instructmix run CONFIG` makes one"
        )
    lines = []
    for name, folder in STAGE_FOLDERS.items():
        record = run_dir.read_record(folder)
        if record is None:
            begun = bool(storage.list_names(run_dir.stage_uri(folder)))
            lines.append(f"{name:<11} {'begun' if begun else '-'}")
            continue
        lines.append(f"{name:<11} done {record.finished}, {record.seconds:.0f} s")
        lines += [f"            {line}" for line in record.lines]
    lease = storage.join(run_dir.uri, "lease.json")
    if storage.exists(lease):
        holder = storage.read_json(lease)
        lines.append(f"in use by process {holder['pid']} on {holder['host']}")
    return "\n".join(lines)
