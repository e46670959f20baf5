"""What `check` and `status` print: what would run and why, what is finished, what it cost."""

from __future__ import annotations

from collections.abc import Mapping

from actors.pipeline import STAGES, Stage, stage_inputs
from system import storage
from system.config import InfluenceConfig, RunConfig
from system.errors import ConfigError
from system.influence.random_design import enough_runs
from system.rundir import RunDir, StageRecord, describe_change, fingerprint
from system.stages import STAGE_FOLDERS


def describe_plan(config: RunConfig) -> str:
    """The plan of a run, stage by stage, and how many trainings it takes; starts nothing.

    Raises:
        InstructMixError: the same input errors that `run` would report before it starts.
    """
    run_dir = RunDir(config.run_dir)
    lines = [f"run directory {run_dir.uri}", ""]
    records: dict[str, StageRecord] = {}
    for stage in STAGES:
        state = _state(stage, config, records, run_dir)
        lines.append(f"  {stage.name:<11} {state}")
    return "\n".join([*lines, "", *_cost(config, records), *_remarks(config, records)])


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
    if run_dir.read_attempt_record(stage.folder, attempt) is not None:
        return "done in an earlier attempt with these settings"
    if committed is not None:
        return f"again: {describe_change(committed.inputs, inputs)}"
    if storage.exists(run_dir.attempt_uri(stage.folder, attempt)):
        return "to continue"
    return "to do"


def _cost(config: RunConfig, records: Mapping[str, StageRecord]) -> list[str]:
    influence = config.influence
    categories = _num_categories(records)
    directions = " and ".join(influence.directions)
    of_what = {
        "retrain": "one reference run and one run per category and direction",
        "branch": "one warm-up, one reference run and one run per category and direction",
        "random-design": "runs with half of all doses each, for every direction",
        "gradient": f"one warm-up with {influence.gradient_checkpoints} checkpoints, no run per "
        "category",
    }
    lines = [
        f"influence: {influence.replications} replications of {of_what[influence.estimator]} "
        f"({directions})"
    ]
    if categories is not None and influence.estimator == "gradient":
        parts = influence.replications * influence.gradient_checkpoints
        doses = categories * influence.dose_rows * len(influence.directions)
        lines.append(
            f"  {categories} categories: {influence.replications} trainings on up to "
            f"{categories * influence.warm_rows_per_category:,} rows each; {parts} passes of "
            f"gradients over {doses:,} dose rows and {categories * influence.heldout_rows:,} "
            "held-out rows"
        )
    elif categories is not None:
        runs = influence.replications * _runs_per_replication(influence, categories)
        rows = categories * influence.rows_per_category
        lines.append(
            f"  {categories} categories: {runs} trainings on up to {rows:,} rows each, scored on "
            f"{categories * influence.heldout_rows:,} held-out rows each"
        )
    else:
        lines.append("  (how many categories there are is known after ingest)")
    select = config.select
    if select.uses_score and select.score in ("loss", "ifd"):
        times = "twice, with its prompt and without" if select.score == "ifd" else "once"
        lines.append(f"select: the base model reads every train row {times}")
    evaluate = config.evaluate
    total = config.solve.budget * config.curriculum.epochs
    lines.append(
        f"train: 1 run on {total:,} {config.solve.unit}; evaluate: {len(evaluate.arms)} arms x "
        f"{evaluate.seeds} seeds, the same size each"
    )
    return lines


def _runs_per_replication(influence: InfluenceConfig, categories: int) -> int:
    if influence.estimator == "random-design":
        return enough_runs(categories) * len(influence.directions)
    warm_ups = 1 if influence.estimator == "branch" else 0
    return warm_ups + 1 + categories * len(influence.directions)


def _remarks(config: RunConfig, records: Mapping[str, StageRecord]) -> list[str]:
    """What is allowed but will disappoint."""
    remarks = []
    if config.influence.replications == 1:
        remarks.append(
            "influence.replications is 1: errors will be held-out only, nothing will count as "
            "identifiable, and the mix will stay at the base"
        )
    supply = records["ingest"].counts.get("train_rows") if "ingest" in records else None
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
    return [f"note: {remark}" for remark in remarks]


def _num_categories(records: Mapping[str, StageRecord]) -> int | None:
    record = records.get("tag") or records.get("ingest")
    return None if record is None else record.counts.get("categories")


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
