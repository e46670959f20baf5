"""Chooses the design of `auto`: makes the first round of every candidate in its own folder.

    designs ──> trial/<design>/ (designer, measuring) ──> Trial ──> trial.json ──> the cheapest

The choice is written once and read again after a restart.  The rounds of the chosen design then
reuse the runs of its trial (`system.influence.measure.reuse`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict

from actors.influence.analysis import largest_dose_matrices
from actors.influence.designer import answer_tokens, draw_design
from actors.influence.intervention_runner import InterventionRunner
from actors.stage import StageContext
from system import storage
from system.auto.trial import Trial, cheapest, describe_choice, typical_error
from system.influence.design.cost import SCORED_SHARE
from system.influence.design.design import Design
from system.influence.estimate.summary import METRIC_UNITS, short_unit


def choose_design(context: StageContext) -> tuple[StageContext, list[Trial]]:
    """The context with the chosen design, and the trials; no trials if there is one candidate."""
    names = context.config.influence.auto.designs
    if len(names) == 1:
        return context, []
    uri = storage.join(context.attempt, "trial.json")
    if storage.is_whole(uri):
        trials = [Trial(**value) for value in storage.read_json(uri)]
    else:
        trials = [_try(context, name) for name in names]
        storage.write_json(uri, [asdict(trial) for trial in trials])
        unit = short_unit(METRIC_UNITS[context.config.influence.metric])
        context.progress.say(f"  {describe_choice(trials, unit)}")
    return _with_design(context, cheapest(trials).design), trials


def _with_design(context: StageContext, name: str) -> StageContext:
    influence = context.config.influence.with_design(name)
    config = context.config.model_copy(update={"influence": influence})
    return dataclasses.replace(context, config=config)


def _try(context: StageContext, name: str) -> Trial:
    """Makes the first round of a design; its checkpoints are never kept."""
    context.progress.say(f"  trying design {name}")
    folder = storage.join(context.attempt, "trial", name)
    context = _with_design(
        dataclasses.replace(context, attempt=folder, shared=context.shared_uri), name
    )
    influence = context.config.influence.model_copy(update={"keep_checkpoints": False})
    config = context.config.model_copy(update={"influence": influence})
    context = dataclasses.replace(context, config=config)
    design = draw_design(context).first(influence.replications)
    InterventionRunner(context, design).run()
    return _judge(context, design)


def _judge(context: StageContext, design: Design) -> Trial:
    stats = [
        storage.read_json(storage.join(context.attempt, "units", f"{run.name}.json"))
        for run in design.all_runs
    ]
    heldout = storage.read_table(storage.join(context.attempt, "heldout.arrow"))
    scored = sum(map(len, heldout.column("input_ids").to_pylist()))
    if context.config.influence.metric == "accuracy":
        scored += heldout.num_rows * answer_tokens(context.config)
    scorings = sum(run.kind != "warm" for run in design.all_runs)
    trained = sum(item["trained_tokens"] for item in stats)
    return Trial(
        design=context.config.influence.design,
        precision=typical_error(largest_dose_matrices(context, design)),
        token_equivalents=trained + SCORED_SHARE * scored * scorings,
        trained_tokens=trained,
        tuner_hours=sum(item["seconds"] for item in stats) / 3600.0,
    )
