"""The influence stage: a ledger of runs over two pools, then the effect matrix.

    design ──> ledger ── tune(unit) ──> Tuner   ──> checkpoints/<unit>/, units/<unit>.json
                  ^ └─── score(unit) ─> Scorer  ──> scores/<unit>.parquet, checkpoint deleted
                  └──────── wait_any ─────────┘
    (`gradient`: warm_up and differentiate on the tuners, whose answers are the scores)
    all scored ──> matrix.parquet, replicates.parquet, summary.json

The files are the state: a training counts once its `units/*.json` is there, a scoring once its
`scores/*.parquet` is, and both are written whole or not at all.  A driver that starts again finds
them and goes on; a dead actor's unit is given out again by its pool.  Warm-up checkpoints
(`branch`, `gradient`) stay until the stage is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import pyarrow as pa
import ray

from actors.pool import ActorPool, ActorSpec, wait_any
from actors.scorer import scorer_pool
from actors.stage import StageContext, StageResult
from actors.tuner import Tuner
from system import storage
from system.data.corpus import Corpus
from system.errors import ConfigError
from system.influence.design import Design, Unit
from system.influence.external_targets import read_target
from system.influence.first_order import gradient_task, gradients_table, predicted_scores
from system.influence.gradient import Derivatives
from system.influence.heldout import draw_targets, seeded_draw
from system.influence.interventions import Schedule, active_rows, assemble_design, plan_replication
from system.influence.ledger import Ledger
from system.influence.matrix import estimate_effects
from system.influence.measurements import collect_losses, paired_differences
from system.influence.summary import Cost, replicates_table, result_lines, summarise
from system.models.base import load_tokenizer
from system.training.plan import TrainPlan, read_plan, write_plan
from system.training.settings import TrainSettings

TUNERS = "tuner"


def run(context: StageContext) -> StageResult:
    """Measures how a dose of every category changes the loss on every target."""
    design = _design(context)
    _Measuring(context, design).run()
    return _estimate(context, design)


def _uri(context: StageContext, *parts: str) -> str:
    return storage.join(context.attempt, *parts)


def _plan_uri(context: StageContext, replication: int, kind: str) -> str:
    return _uri(context, "plans", f"r{replication:02d}-{kind}.arrow")


def _design(context: StageContext) -> Design:
    """The design of this attempt, drawn from the corpus the first time."""
    uri = _uri(context, "design.json")
    if storage.exists(uri):
        return Design.from_json(storage.read_json(uri), uri)
    config = context.config
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokenizer = load_tokenizer(
        context.input("model", "model"), trust_remote_code=config.model.trust_remote_code
    )
    draw = seeded_draw(corpus, tokenizer, config.model.max_length)
    sources = tuple(corpus.categories)
    schedules = []
    for index in range(config.influence.replications):
        schedule = plan_replication(
            index,
            run_seed=config.seed,
            sources=sources,
            config=config.influence,
            max_length=config.model.max_length,
            draw=draw,
        )
        write_plan(_plan_uri(context, index, "main"), schedule.plan)
        if schedule.warm is not None:
            write_plan(_plan_uri(context, index, "warm"), schedule.warm)
        schedules.append(schedule)
    external, left_out = _external_targets(context, sources, schedules)
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
    storage.write_table(_uri(context, "heldout.arrow"), heldout)
    storage.write_json(uri, design.to_json())
    return design


def _external_targets(
    context: StageContext, sources: tuple[str, ...], schedules: list[Schedule]
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Tables of `influence.targets` without rows that any schedule trains on."""
    config = context.config
    taken = sorted(set(config.influence.targets) & set(sources))
    if taken:
        raise ConfigError(
            f"influence.targets {taken}: these names are categories of the corpus; give the "
            "target files other names"
        )
    trained = {
        name
        for schedule in schedules
        for plan in (schedule.plan, schedule.warm)
        if plan is not None
        for name in plan.table.column("id").to_pylist()
    }
    tables: dict[str, pa.Table] = {}
    left_out: dict[str, int] = {}
    for name, path in config.influence.targets.items():
        tables[name], lost = read_target(
            name, path, data_dir=config.data_dir, ingest=config.ingest, exclude=trained
        )
        left_out |= {f"{name}: {reason}": count for reason, count in lost.items()}
    return tables, left_out


class _Measuring:
    """The runs of one attempt, from where an earlier driver left them."""

    def __init__(self, context: StageContext, design: Design) -> None:
        self.context = context
        self.design = design
        self.heldout = storage.read_table(_uri(context, "heldout.arrow"))
        self.plans: dict[str, TrainPlan] = {}
        self.started: dict[str, float] = {}

    def run(self) -> None:
        """Trains and scores whatever is not there yet."""
        context, config = self.context, self.context.config
        scored = {name.removesuffix(".parquet") for name in self._names("scores")}
        checkpoints = set(self._names("checkpoints"))
        trained = {name.removesuffix(".json") for name in self._names("units")} & checkpoints
        ledger = Ledger(
            self.design.units,
            trained=trained,
            scored=scored,
            max_checkpoints=config.cluster.num_tuners + 2 * config.cluster.num_scorers,
        )
        total = len(self.design.units)
        if not ledger.is_done:
            with context.progress.bar("influence", total=total) as bar:
                bar.advance(total - max(ledger.num_unscored, ledger.num_to_train))
                self._drain(ledger, bar)
            context.cluster.close_pool(TUNERS)
        if not config.influence.keep_checkpoints:
            storage.delete(_uri(context, "checkpoints"))

    def _drain(self, ledger: Ledger, bar: Any) -> None:
        by_gradient = self.design.estimator == "gradient"
        scorers = None if by_gradient else scorer_pool(self.context)
        tuners = self._tuner_pool()
        heldout = ray.put(self.heldout)
        while not ledger.is_done:
            while scorers and scorers.has_room and (unit := ledger.next_to_score()) is not None:
                self._score(scorers, unit, heldout)
            while tuners.has_room and (unit := ledger.next_to_train()) is not None:
                if by_gradient:
                    self._differentiate(tuners, unit, heldout)
                else:
                    self._tune(tuners, unit)
            for done in wait_any([tuners] if scorers is None else [scorers, tuners]):
                unit = cast(Unit, done.key)
                if unit.kind == "gradient":
                    self._keep_gradients(unit, done.value)
                    ledger.scored(unit)
                    bar.advance(1)
                elif done.pool is tuners:
                    storage.write_json(self._file("units", unit, ".json"), asdict(done.value))
                    ledger.trained(unit)
                    bar.advance(1 if unit.kind == "warm" else 0)
                else:
                    self._keep_scores(unit, done.value)
                    ledger.scored(unit)
                    bar.advance(1)

    def _tuner_pool(self) -> ActorPool:
        config = self.context.config
        return self.context.cluster.pool(
            ActorSpec(
                name=TUNERS,
                actor_class=Tuner,
                args=(
                    self.context.input("model", "model"),
                    max(1, int(config.cluster.actor_cpus)),
                    config.cluster.tuner_gpus > 0,
                    config.model.trust_remote_code,
                ),
                num_actors=config.cluster.num_tuners,
                num_cpus=config.cluster.actor_cpus,
                num_gpus=config.cluster.tuner_gpus,
                max_attempts=config.cluster.max_attempts,
            )
        )

    def _tune(self, tuners: ActorPool, unit: Unit) -> None:
        plan_uri, plan = self._plan(unit)
        branches = self.design.estimator == "branch" and unit.kind != "warm"
        # Only a checkpoint that is written whole may be called trained after a crash.
        storage.delete(self._file("units", unit, ".json"))
        tuners.submit(
            unit,
            "tune",
            plan_uri,
            active_rows(plan, unit, self.design),
            self._settings(unit),
            self._warm_uri(unit) if branches else None,
            self._file("checkpoints", unit),
        )

    def _differentiate(self, tuners: ActorPool, unit: Unit, heldout: ray.ObjectRef) -> None:
        config = self.context.config.influence
        plan_uri, plan = self._plan(unit)
        warm_uri = self._warm_uri(unit)
        settings = self._settings(unit)
        storage.delete(self._file("units", unit, ".json"))
        if unit.kind == "warm":
            checkpoints = self.design.gradient_checkpoints
            tuners.submit(unit, "warm_up", plan_uri, settings, checkpoints, warm_uri)
            return
        task = gradient_task(plan, self.design, unit, config.projection_dim)
        tuners.submit(unit, "differentiate", plan_uri, task, heldout, settings, warm_uri)

    def _plan(self, unit: Unit) -> tuple[str, TrainPlan]:
        uri = _plan_uri(self.context, unit.replication, "warm" if unit.kind == "warm" else "main")
        if uri not in self.plans:
            self.plans[uri] = read_plan(uri)
        return uri, self.plans[uri]

    def _settings(self, unit: Unit) -> TrainSettings:
        config = self.context.config
        seed = self.design.replications[unit.replication].seed
        return TrainSettings.from_influence(config.influence, config.model, seed)

    def _warm_uri(self, unit: Unit) -> str:
        warm = Unit(replication=unit.replication, kind="warm", source=-1)
        return self._file("checkpoints", warm)

    def _score(self, scorers: ActorPool, unit: Unit, heldout: ray.ObjectRef) -> None:
        self.started[unit.name] = time.perf_counter()
        scorers.submit(unit, "score", self._file("checkpoints", unit), heldout)

    def _keep_gradients(self, unit: Unit, found: Derivatives) -> None:
        """Commits derivatives as the unit's scores; what they cost, before."""
        cost = {
            "trained_tokens": 0, "gradient_tokens": found.num_tokens, "seconds": found.seconds,
        }  # fmt: skip
        storage.write_json(self._file("units", unit, ".json"), cost)
        table, rejected = gradients_table(self.heldout, found)
        metadata = {"instructmix.seconds": "0", "instructmix.rejected": json.dumps(rejected)}
        storage.write_table(
            self._file("scores", unit, ".parquet"), table.replace_schema_metadata(metadata)
        )

    def _keep_scores(self, unit: Unit, scored: Any) -> None:
        """Commits the scores, then frees the checkpoint they came from."""
        metadata = {
            "instructmix.seconds": f"{time.perf_counter() - self.started[unit.name]:.3f}",
            "instructmix.rejected": json.dumps(scored.rejected),
        }
        storage.write_table(
            self._file("scores", unit, ".parquet"), scored.table.replace_schema_metadata(metadata)
        )
        if not self.context.config.influence.keep_checkpoints:
            storage.delete(self._file("checkpoints", unit))

    def _names(self, folder: str) -> list[str]:
        return storage.list_names(_uri(self.context, folder))

    def _file(self, folder: str, unit: Unit, ending: str = "") -> str:
        return _uri(self.context, folder, unit.name + ending)


def _estimate(context: StageContext, design: Design) -> StageResult:
    config = context.config.influence
    scores = {
        unit.name: storage.read_table(_uri(context, "scores", f"{unit.name}.parquet"))
        for unit in design.units
        if unit.kind != "warm"
    }
    by_gradient = design.estimator == "gradient"
    losses = collect_losses(design, predicted_scores(design, scores) if by_gradient else scores)
    measured = {name: paired_differences(design, losses, name) for name in design.directions}
    tables, estimates = [], {}
    for direction, measurements in measured.items():
        for unit in ("examples", "tokens"):
            estimate = estimate_effects(
                measurements,
                unit=unit,
                confidence=config.confidence,
                gamma_floor=config.gamma_floor,
                gamma_max_width=config.gamma_max_width,
            )
            tables.append(estimate.matrix.to_table())
            if unit == "examples":
                estimates[direction] = estimate
    storage.write_table(_uri(context, "matrix.parquet"), pa.concat_tables(tables))
    storage.write_table(_uri(context, "replicates.parquet"), replicates_table(estimates))
    cost, rejected = _cost(context, design, scores)
    summary = summarise(design, config, measured, estimates, losses, cost, rejected)
    storage.write_json(_uri(context, "summary.json"), summary)
    return StageResult(
        outputs={
            "design": "design.json",
            "scores": "scores",
            "matrix": "matrix.parquet",
            "replicates": "replicates.parquet",
            "summary": "summary.json",
        },
        counts={
            "sources": len(design.sources),
            "targets": len(design.targets),
            "replications": len(design.replications),
            **asdict(cost),
            "rows dropped": design.dropped,
            "rows rejected by the scorer": len(rejected),
        },
        lines=result_lines(summary),
    )


def _cost(
    context: StageContext, design: Design, scores: Mapping[str, pa.Table]
) -> tuple[Cost, dict[str, str]]:
    """What the runs took, from what each left; held-out rows that some run could not score."""
    stats = [
        storage.read_json(_uri(context, "units", f"{unit.name}.json")) for unit in design.units
    ]
    heldout = storage.read_table(_uri(context, "heldout.arrow"))
    row_tokens = sum(len(row) for row in heldout.column("input_ids").to_pylist())
    rejected: dict[str, str] = {}
    seconds = 0.0
    for table in scores.values():
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        seconds += float(metadata["instructmix.seconds"])
        rejected |= json.loads(metadata["instructmix.rejected"])
    cost = Cost(
        runs=sum(unit.kind != "gradient" for unit in design.units),
        trained_tokens=sum(item["trained_tokens"] for item in stats),
        gradient_tokens=sum(item.get("gradient_tokens", 0) for item in stats),
        scored_tokens=0 if design.estimator == "gradient" else row_tokens * len(scores),
        train_seconds=sum(item["seconds"] for item in stats),
        score_seconds=seconds,
    )
    return cost, rejected
