"""The influence stage: a ledger of runs over two pools, then the effect matrix.

    design ──> ledger ── tune(unit) ──> Tuner   ──> checkpoints/<unit>/, units/<unit>.json
                  ^ └─── score(unit) ─> Scorer  ──> scores/<unit>.parquet, checkpoint deleted
                  └──────── wait_any ─────────┘
    all scored ──> matrix.parquet, replicates.parquet, summary.json

The files are the state: a training counts once its `units/*.json` is there, a scoring once its
`scores/*.parquet` is, and both are written whole or not at all.  A driver that starts again finds
them and goes on; a dead actor's unit is given out again by its pool.  Runs that another attempt of
the stage has finished are taken from it where everything that decides them is the same
(`system.influence.reuse`).  Warm-up checkpoints (`branch`) stay until the stage is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from actors.designer import answer_tokens, draw_design, plan_uri
from actors.pool import ActorPool, ActorSpec, wait_any
from actors.rounds import measure_in_rounds
from actors.scorer import scorer_pool
from actors.stage import StageContext, StageResult
from actors.tuner import Tuner
from system import storage
from system.influence.accuracy_targets import check_some_vary
from system.influence.design import Design, Unit
from system.influence.interventions import active_rows
from system.influence.ledger import Ledger
from system.influence.matrix import EffectMatrix, Estimate, estimate_effects
from system.influence.matrix import Unit as DataUnit
from system.influence.measurements import (
    Losses,
    Measurements,
    collect_losses,
    paired_differences,
)
from system.influence.reuse import SharedRuns, heldout_digest, run_key
from system.influence.rounds import Round
from system.influence.summary import (
    METRIC_UNITS,
    Cost,
    replicates_table,
    result_lines,
    short_unit,
    summarise,
)
from system.models.base import kind_of
from system.training.plan import TrainPlan, read_plan
from system.training.settings import TrainSettings

TUNERS = "tuner"


def run(context: StageContext) -> StageResult:
    """Measures how a dose of every category changes the loss on every target."""
    planned = draw_design(context)
    rounds: list[Round] = []
    reason = ""
    if context.config.influence.estimator == "auto":
        rounds, reason = measure_in_rounds(
            context,
            planned,
            lambda design: _Measuring(context, design).run(),
            lambda design: _matrices(context, design),
        )
        planned = planned.first(rounds[-1].replications)
    else:
        _Measuring(context, planned).run()
    context.cluster.close_pool(TUNERS)
    return _estimate(context, planned, rounds, reason)


def _uri(context: StageContext, *parts: str) -> str:
    return storage.join(context.attempt, *parts)


def _model_identity(context: StageContext) -> dict[str, Any]:
    """What decides the base model's weights; the corpus only where the model is built from it."""
    record = context.upstream["model"]
    if kind_of(context.config.model.path) == "builtin":
        return {"fingerprint": record.fingerprint}
    return {name: value for name, value in record.inputs.items() if not name.startswith("after.")}


class _Measuring:
    """The runs of one attempt, from where an earlier driver left them."""

    def __init__(self, context: StageContext, design: Design) -> None:
        self.context = context
        self.design = design
        self.heldout = storage.read_table(_uri(context, "heldout.arrow"))
        self.plans: dict[str, TrainPlan] = {}
        self.started: dict[str, float] = {}
        self.shared = SharedRuns(context.shared_uri)
        self.model = _model_identity(context)
        if context.config.influence.metric == "accuracy":
            self.model["max_new_tokens"] = answer_tokens(context.config)
        self.heldout_sha256 = heldout_digest(self.heldout)
        self.shown = 0

    def run(self) -> None:
        """Trains and scores whatever is not there yet."""
        context, config = self.context, self.context.config
        if not config.influence.keep_checkpoints:  # an adopted run has no checkpoint to keep
            self._adopt_finished_runs()
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
        if not config.influence.keep_checkpoints:
            storage.delete(_uri(context, "checkpoints"))

    def _adopt_finished_runs(self) -> None:
        """Takes what other attempts measured under the very same circumstances."""
        here = set(self._names("units")) | set(self._names("scores"))
        adopted = 0
        for unit in self.design.units:
            ending = ".json" if unit.kind == "warm" else ".parquet"
            if unit.name + ending in here or (found := self.shared.find(self._key(unit))) is None:
                continue
            scores, training = found
            storage.write_json(self._file("units", unit, ".json"), training)
            if scores is not None:
                storage.write_table(self._file("scores", unit, ".parquet"), scores)
            adopted += 1
        if adopted:
            self.context.progress.say(
                f"  {adopted} of {len(self.design.units)} runs were measured before and still hold"
            )

    def _key(self, unit: Unit) -> str:
        return run_key(
            self.design,
            unit,
            active_rows(self._plan(unit), unit, self.design),
            self._settings(unit),
            model=self.model,
            heldout=self.heldout_sha256,
        )

    def _plan(self, unit: Unit) -> TrainPlan:
        uri = self._plan_uri(unit)
        if uri not in self.plans:
            self.plans[uri] = read_plan(uri)
        return self.plans[uri]

    def _plan_uri(self, unit: Unit) -> str:
        return plan_uri(self.context, unit.replication, "warm" if unit.kind == "warm" else "main")

    def _settings(self, unit: Unit) -> TrainSettings:
        config = self.context.config
        seed = self.design.replications[unit.replication].seed
        return TrainSettings.from_influence(config.influence, config.model, seed)

    def _drain(self, ledger: Ledger, bar: Any) -> None:
        scorers, tuners = scorer_pool(self.context), self._tuner_pool()
        heldout = ray.put(self.heldout)
        while not ledger.is_done:
            while scorers.has_room and (unit := ledger.next_to_score()) is not None:
                self._score(scorers, unit, heldout)
            while tuners.has_room and (unit := ledger.next_to_train()) is not None:
                self._tune(tuners, unit)
            for done in wait_any([scorers, tuners]):
                unit = cast(Unit, done.key)
                if done.pool is tuners:
                    storage.write_json(self._file("units", unit, ".json"), asdict(done.value))
                    if unit.kind == "warm":
                        self.shared.keep(self._key(unit), None, asdict(done.value))
                    ledger.trained(unit)
                    bar.advance(1 if unit.kind == "warm" else 0)
                else:
                    self._keep_scores(unit, done.value)
                    ledger.scored(unit)
                    bar.advance(1)
                    self._show_partial_matrix(ledger)

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
        start_uri = None
        if self.design.estimator == "branch" and unit.kind != "warm":
            start_uri = self._file(
                "checkpoints", Unit(replication=unit.replication, kind="warm", source=-1)
            )
        # Only a checkpoint that is written whole may be called trained after a crash.
        storage.delete(self._file("units", unit, ".json"))
        tuners.submit(
            unit,
            "tune",
            self._plan_uri(unit),
            active_rows(self._plan(unit), unit, self.design),
            self._settings(unit),
            start_uri,
            self._file("checkpoints", unit),
        )

    def _score(self, scorers: ActorPool, unit: Unit, heldout: ray.ObjectRef) -> None:
        self.started[unit.name] = time.perf_counter()
        config, weights = self.context.config, self._file("checkpoints", unit)
        if config.influence.metric == "accuracy":
            scorers.submit(unit, "answer", weights, heldout, answer_tokens(config))
        else:
            scorers.submit(unit, "score", weights, heldout)

    def _keep_scores(self, unit: Unit, scored: Any) -> None:
        """Commits the scores, then frees the checkpoint they came from."""
        metadata = {
            "instructmix.seconds": f"{time.perf_counter() - self.started[unit.name]:.3f}",
            "instructmix.rejected": json.dumps(scored.rejected),
        }
        table = scored.table.replace_schema_metadata(metadata)
        training = storage.read_json(self._file("units", unit, ".json"))
        self.shared.keep(self._key(unit), table, training)
        storage.write_table(self._file("scores", unit, ".parquet"), table)
        if not self.context.config.influence.keep_checkpoints:
            storage.delete(self._file("checkpoints", unit))

    def _show_partial_matrix(self, ledger: Ledger) -> None:
        """What the replications so far say, for whoever watches; the last one says it itself."""
        total = len(self.design.replications)
        count = ledger.num_scored_replications(total)
        if not self.shown < count < total:
            return
        self.shown = count
        matrices = _matrices(self.context, self.design.first(count))
        uri = _uri(self.context, "partial.parquet")
        storage.write_table(
            uri, pa.concat_tables(matrix.to_table() for matrix in matrices.values())
        )
        errors = ", ".join(
            f"{np.median((matrix.effect_se_TS * matrix.dose_S)[~matrix.own_TS]):.4f} ({direction})"
            for direction, matrix in matrices.items()
        )
        unit = short_unit(METRIC_UNITS[self.context.config.influence.metric])
        kind = "held-out errors only" if count == 1 else "errors by replication"
        self.context.progress.say(
            f"  {count} of {total} replications done: typical error {errors} {unit} for a dose, "
            f"{kind}; partial matrix in {uri}"
        )

    def _names(self, folder: str) -> list[str]:
        return storage.list_names(_uri(self.context, folder))

    def _file(self, folder: str, unit: Unit, ending: str = "") -> str:
        return _uri(self.context, folder, unit.name + ending)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Analysis:
    """What the scores of a design say."""

    scores: dict[str, pa.Table]
    losses: Losses
    measured: dict[str, Measurements]
    """By direction."""
    estimates: dict[str, dict[str, Estimate]]
    """By unit of data, then by direction."""


def _analyse(context: StageContext, design: Design) -> _Analysis:
    config = context.config.influence
    scores = {
        unit.name: storage.read_table(_uri(context, "scores", f"{unit.name}.parquet"))
        for unit in design.units
        if unit.kind != "warm"
    }
    losses = collect_losses(design, scores)
    if config.metric == "accuracy":
        check_some_vary(losses.loss)
    measured = {name: paired_differences(design, losses, name) for name in design.directions}
    units: tuple[DataUnit, ...] = ("examples", "tokens")
    estimates = {
        unit: {
            direction: estimate_effects(
                measurements,
                unit=unit,
                confidence=config.confidence,
                gamma_floor=config.gamma_floor,
                gamma_max_width=config.gamma_max_width,
            )
            for direction, measurements in measured.items()
        }
        for unit in units
    }
    return _Analysis(scores=scores, losses=losses, measured=measured, estimates=dict(estimates))


def _matrices(context: StageContext, design: Design) -> dict[str, EffectMatrix]:
    found = _analyse(context, design).estimates["examples"]
    return {direction: estimate.matrix for direction, estimate in found.items()}


def _estimate(
    context: StageContext, design: Design, rounds: Sequence[Round], reason: str
) -> StageResult:
    config = context.config.influence
    storage.write_json(_uri(context, "design.json"), design.to_json())
    analysis = _analyse(context, design)
    scores, losses, measured = analysis.scores, analysis.losses, analysis.measured
    estimates = analysis.estimates["examples"]
    tables = [
        analysis.estimates[unit][direction].matrix.to_table()
        for direction in design.directions
        for unit in analysis.estimates
    ]
    storage.write_table(_uri(context, "matrix.parquet"), pa.concat_tables(tables))
    storage.write_table(_uri(context, "replicates.parquet"), replicates_table(estimates))
    cost, rejected = _cost(context, design, scores)
    summary = summarise(design, config, measured, estimates, losses, cost, rejected)
    if rounds:
        summary["rounds"] = {"stopped": reason, "rounds": [asdict(item) for item in rounds]}
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
        lines=(*([reason] if reason else []), *result_lines(summary)),
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
    if context.config.influence.metric == "accuracy":  # answers may end earlier
        row_tokens += heldout.num_rows * answer_tokens(context.config)
    rejected: dict[str, str] = {}
    seconds = 0.0
    for table in scores.values():
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        seconds += float(metadata["instructmix.seconds"])
        rejected |= json.loads(metadata["instructmix.rejected"])
    cost = Cost(
        runs=len(stats),
        trained_tokens=sum(item["trained_tokens"] for item in stats),
        scored_tokens=row_tokens * len(scores),
        train_seconds=sum(item["seconds"] for item in stats),
        score_seconds=seconds,
    )
    return cost, rejected
