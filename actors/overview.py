"""The text of `check` (what would run and why, and its cost) and `status` (what is finished).

Called by `system.cli`.  Starts no Ray and changes nothing in the run directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.pipeline import STAGES, Stage, hiding_secrets, stage_inputs
from system import storage
from system.config import RunConfig
from system.data.corpus import Corpus
from system.devices import idle_gpus_remark, visible_gpus
from system.errors import ConfigError
from system.forecast import Forecast, RunState, describe, make_forecast
from system.influence.append.earlier import APPENDS_TO
from system.models.base import check_model, kind_of
from system.rundir import RunDir, StageRecord, describe_change, fingerprint
from system.solve import Mix
from system.stages import STAGE_FOLDERS

_SPEED_FIELDS = (
    "after.model", "influence.batch_size", "influence.metric", "influence.max_new_tokens",
)  # fmt: skip
"""Inputs of the influence stage that decide its speed on a given machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """The result of `check`."""

    text: str
    forecast: Forecast


def describe_plan(config: RunConfig, *, probe: bool = False) -> PlanView:
    """The plan of a run, stage by stage, with its cost.  Starts nothing and changes nothing.

    Args:
        config: the configuration of the run.
        probe: measure for some seconds how fast the model is, unless finished work units show it.

    Raises:
        InstructMixError: the same input errors that `run` would report before it starts.
    """
    with hiding_secrets(config):
        return _describe_plan(config, probe)


def _describe_plan(config: RunConfig, probe: bool) -> PlanView:
    run_dir = RunDir(config.run_dir)
    lines = [f"run directory {run_dir.uri}", ""]
    records: dict[str, StageRecord] = {}
    for stage in STAGES:
        state = _state(stage, config, records, run_dir)
        lines.append(f"  {stage.name:<11} {state}")
    if "model" not in records:
        check_model(config.model)
    run_state = _run_state(config, records, run_dir)
    remarks = _remarks(config, _train_rows(run_state))
    forecast = make_forecast(config, run_state, probe=probe)
    text = "\n".join([*lines, "", *describe(forecast), *remarks]).rstrip()
    return PlanView(text=config.without_secrets(text), forecast=forecast)


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
        return "done (in an earlier attempt with these settings)"
    if committed is not None:
        return f"to do again: {describe_change(committed.inputs, inputs)}"
    if storage.exists(run_dir.attempt_uri(stage.folder, attempt)):
        return "to do (continues an interrupted attempt)"
    return "to do"


def _run_state(config: RunConfig, records: Mapping[str, StageRecord], run_dir: RunDir) -> RunState:
    """The files of the run directory from which the forecast is computed."""

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
    return RunState(
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
    """The influence attempt that this configuration appends to, if any."""
    stage = next(item for item in STAGES if item.name == "influence")
    if any(name not in records for name in stage.after):
        return None
    name = stage_inputs(stage, config, records).get(APPENDS_TO)
    return None if name is None else run_dir.attempt_uri(stage.folder, name)


def _measured_attempts(
    config: RunConfig, records: Mapping[str, StageRecord], run_dir: RunDir
) -> Iterator[str]:
    """Influence attempts with the speed of this one: same model, batches and adapters."""
    stage = next(item for item in STAGES if item.name == "influence")
    if any(name not in records for name in stage.after):
        return
    inputs = stage_inputs(stage, config, records)
    yield run_dir.attempt_uri(stage.folder, fingerprint(inputs))
    committed = run_dir.read_record(stage.folder)
    if committed is not None and _speed_inputs(committed.inputs) == _speed_inputs(inputs):
        yield run_dir.attempt_uri(stage.folder, committed.fingerprint)


def _speed_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a stage that decide its speed on a given machine."""
    return {
        name: value
        for name, value in inputs.items()
        if name in _SPEED_FIELDS or name.startswith("influence.lora")
    }


def _train_rows(state: RunState) -> int | None:
    """Train rows of all categories; None while nothing has been read."""
    uri = state.tagged_uri or state.ingested_uri
    return None if uri is None else sum(Corpus.open(uri).counts("train").values())


def _remarks(config: RunConfig, supply: int | None) -> list[str]:
    """Notes on settings that are valid but probably not intended.

    Args:
        config: of the run.
        supply: train rows of all categories; None while nothing has been read.

    Raises:
        ConfigError: the budget is larger than the number of train rows.
    """
    remarks = []
    if config.influence.replications == 1:
        remarks.append(
            "influence.replications is 1: the errors will not contain the noise of training, no "
            "effect will count as identifiable, and the mix will stay at the base"
        )
    solve = config.solve
    if supply is not None and solve.unit == "examples" and solve.max_epochs == 1.0:
        if solve.budget > supply:
            raise ConfigError(
                f"solve.budget: expected at most the {supply:,} train rows, since solve.max_epochs "
                f"is 1, found {solve.budget:,}. Lower solve.budget or raise solve.max_epochs."
            )
        if solve.budget == supply:
            remarks.append(
                "solve.budget equals the number of train rows and solve.max_epochs is 1: the mix "
                "must use every row once and cannot change; lower solve.budget or raise "
                "solve.max_epochs"
            )
    idle = idle_gpus_remark(config.cluster, visible_gpus(), "this machine")
    if idle is not None:
        remarks.append(idle)
    return [f"note: {remark}" for remark in remarks]


def describe_status(run_dir_uri: str) -> str:
    """The finished stages of a run directory, with their log lines.

    Raises:
        ConfigError: the directory is not a run directory.
    """
    run_dir = RunDir(run_dir_uri)
    if not storage.exists(storage.join(run_dir.uri, "config.json")):
        raise ConfigError(
            f"{run_dir_uri}: expected a run directory, found no config.json in it; "
            "`instructmix run CONFIG` creates one"
        )
    lines = []
    for name, folder in STAGE_FOLDERS.items():
        record = run_dir.read_record(folder)
        if record is None:
            is_begun = bool(storage.list_names(run_dir.stage_uri(folder)))
            lines.append(f"{name:<11} {'started' if is_begun else '-'}")
            continue
        lines.append(f"{name:<11} done {record.finished}, {record.seconds:.0f} s")
        lines += [f"            {line}" for line in record.lines]
    holder = run_dir.read_lease()
    if holder is not None:
        lines.append(f"in use by process {holder.pid} on {holder.host}")
    return "\n".join(lines)
