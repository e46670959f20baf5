"""Draws the design of an influence stage from the corpus and writes it to files.

corpus ── seeded draws ──> plans/*.arrow (schedules), heldout.arrow, design.json
"""

from __future__ import annotations

import pyarrow as pa

from actors.stage import StageContext
from system import storage
from system.config import RunConfig
from system.data.corpus import Corpus
from system.errors import ConfigError
from system.influence.design.accuracy_targets import answer_tokens, draw_accuracy_targets
from system.influence.design.design import Design
from system.influence.design.external_targets import read_targets
from system.influence.design.heldout import draw_targets, seeded_draw
from system.influence.design.interventions import Schedule, assemble_design, plan_replication
from system.models.base import load_tokenizer
from system.training.plan import write_plan


def plan_uri(context: StageContext, replication: int, kind: str) -> str:
    """URI of a replication's schedule; `kind` is `main`, `warm` or `append`."""
    return storage.join(context.attempt, "plans", f"r{replication:02d}-{kind}.arrow")


def draw_design(context: StageContext) -> Design:
    """The design of this attempt; drawn once, then read from its file.

    With `auto` it contains all replications that may be needed: the held-out rows, and the rows of
    external targets that must be excluded, cannot depend on when measuring stops.
    """
    config = context.config
    is_auto = config.influence.estimator == "auto"
    uri = storage.join(context.attempt, "planned.json" if is_auto else "design.json")
    if storage.is_whole(uri):
        return Design.from_json(storage.read_json(uri), uri)
    count = config.influence.auto.max_replications if is_auto else config.influence.replications
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokenizer = load_tokenizer(
        context.input("model", "model"), trust_remote_code=config.model.trust_remote_code
    )
    draw = seeded_draw(corpus, tokenizer, config.model.max_length)
    sources = tuple(corpus.categories)
    schedules = []
    for index in range(count):
        schedule = plan_replication(
            index,
            run_seed=config.seed,
            sources=sources,
            config=config.influence,
            max_length=config.model.max_length,
            draw=draw,
        )
        write_plan(plan_uri(context, index, "main"), schedule.plan)
        if schedule.warm is not None:
            write_plan(plan_uri(context, index, "warm"), schedule.warm)
        schedules.append(schedule)
    external, left_out = _external_targets(context, sources, schedules)
    if config.influence.metric == "accuracy":
        heldout, targets, dropped = draw_accuracy_targets(
            run_seed=config.seed,
            corpus=corpus,
            num_rows=config.influence.heldout_rows,
            max_prompt_tokens=config.model.max_length - answer_tokens(config),
            external=external,
            tokenizer=tokenizer,
        )
    else:
        heldout, targets, dropped = draw_targets(
            run_seed=config.seed,
            sources=sources,
            num_rows=config.influence.heldout_rows,
            draw=draw,
            external=external,
            tokenizer=tokenizer,
            max_length=config.model.max_length,
        )
    design = assemble_design(
        run_seed=config.seed,
        config=config.influence,
        sources=sources,
        targets=targets,
        schedules=schedules,
        heldout_dropped=dropped | left_out,
    )
    storage.write_table(storage.join(context.attempt, "heldout.arrow"), heldout)
    storage.write_json(uri, design.to_json())
    return design


def check_target_names(config: RunConfig, sources: tuple[str, ...]) -> None:
    """Checks that no external target has the name of a category.

    Raises:
        ConfigError: one has.
    """
    taken = sorted(set(config.influence.targets) & set(sources))
    if taken:
        raise ConfigError(
            f"influence.targets {taken}: these names are categories of the corpus; give the "
            "target files other names"
        )


def _external_targets(
    context: StageContext, sources: tuple[str, ...], schedules: list[Schedule]
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """The tables of `influence.targets`, without rows that any schedule trains on."""
    config = context.config
    check_target_names(config, sources)
    trained = {
        name
        for schedule in schedules
        for plan in (schedule.plan, schedule.warm)
        if plan is not None
        for name in plan.table.column("id").to_pylist()
    }
    return read_targets(config, "estimate", trained)
