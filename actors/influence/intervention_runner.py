"""The runs of an influence stage: a ledger of units over tuners and scorers.

    design ──> ledger ── tune(unit) ──> Tuner   ──> checkpoints/<unit>/, units/<unit>.json
                  ^ └─── score(part) ─> Scorer  ──> scores/<unit>.parquet, checkpoint deleted
                  └──────── wait_any ─────────┘
    (`gradient`: warm_up and differentiate on the tuners, whose answers are the scores)

The files are the state: a training counts once its `units/*.json` is there, a scoring once its
`scores/*.parquet` is, and both are written whole or not at all.  Many held-out rows are scored in
parts (`system.influence.measure.score_parts`), each kept as `parts/<unit>/*.parquet` until all are
there. A driver that starts again finds them and goes on; a dead actor's unit is given out again by
its pool.  Runs that another attempt of the stage has finished are taken from it where everything
that decides them is the same (`system.influence.measure.reuse`).  Warm-up checkpoints (`branch`,
`gradient`) stay until it is done.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from actors.influence.analysis import estimate_alone, largest_matrices
from actors.influence.designer import answer_tokens, plan_uri
from actors.influence.tuner import Tuner
from actors.pool import ActorPool, ActorSpec, wait_any
from actors.scorer import scorer_pool
from actors.stage import StageContext
from system import storage
from system.influence.design.design import Design, Unit
from system.influence.design.interventions import active_rows
from system.influence.estimate.summary import METRIC_UNITS, short_unit
from system.influence.measure.first_order import gradient_task, gradients_table
from system.influence.measure.gradient import Derivatives
from system.influence.measure.ledger import Ledger, open_checkpoints
from system.influence.measure.reuse import SharedRuns, heldout_digest, run_key
from system.influence.measure.score_parts import ScorePart, join_parts, score_parts
from system.scoring.score import Scored
from system.training.plan import TrainPlan, read_plan
from system.training.settings import TrainSettings

TUNERS = "tuner"


def _how_measured(context: StageContext, design: Design) -> dict[str, Any]:
    """What decides a unit's result beside its rows, its training and the model."""
    config = context.config.influence
    how: dict[str, Any] = {"metric": config.metric}
    if config.metric == "accuracy":
        how["max_new_tokens"] = answer_tokens(context.config)
    if design.estimator == "gradient":
        how["checkpoints"] = design.gradient_checkpoints
        how["projection_dim"] = config.projection_dim
        how["directions"] = list(design.directions)
    return how


class InterventionRunner:
    """The runs of one attempt, from where an earlier driver left them."""

    def __init__(self, context: StageContext, design: Design) -> None:
        self.context = context
        self.design = design
        self.heldout = storage.read_table(storage.join(context.attempt, "heldout.arrow"))
        self.plans: dict[str, TrainPlan] = {}
        self.started: dict[ScorePart, float] = {}
        self.waiting: deque[ScorePart] = deque()
        self.shared = SharedRuns(context.shared_uri)
        self.model = context.model_identity
        self.how = _how_measured(context, design)
        self.digests: dict[int, str] = {}
        self.references: dict[tuple[int, range], ray.ObjectRef] = {}
        self.shown = 0

    def run(self) -> None:
        """Trains and scores whatever is not there yet."""
        context, config = self.context, self.context.config
        if not config.influence.keep_checkpoints:  # an adopted run has no checkpoint to keep
            self._adopt_finished_runs()
        scored = {name.removesuffix(".parquet") for name in self._names("scores")}
        ledger = Ledger(
            self.design.units,
            trained=self._trained(),
            scored=scored,
            max_checkpoints=open_checkpoints(config.cluster.num_tuners, config.cluster.num_scorers),
        )
        total = len(self.design.units)
        if not ledger.is_done:
            with context.progress.bar("influence", total=total) as bar:
                bar.skip(total - max(ledger.num_unscored, ledger.num_to_train))
                self._drain(ledger, bar)
        if not config.influence.keep_checkpoints:
            storage.delete(storage.join(context.attempt, "checkpoints"))

    def _trained(self) -> set[str]:
        """Names of the units whose checkpoints are there."""
        checkpoints = set(self._names("checkpoints"))
        return {name.removesuffix(".json") for name in self._names("units")} & checkpoints

    def _scored_on(self, unit: Unit) -> pa.Table:
        """The held-out rows that a unit is scored on: one of the tables that this object holds."""
        return self.heldout

    def _checkpoint(self, unit: Unit) -> str:
        """Where the weights of a unit are, once they are trained."""
        return self._file("checkpoints", unit)

    def _training_stats(self, unit: Unit, stats: dict[str, Any]) -> dict[str, Any]:
        """What is written of a training."""
        return stats

    def _complete(self, unit: Unit, table: pa.Table) -> pa.Table:
        """All scores of a unit, from those of `_scored_on`."""
        return table

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
                table = self._complete(unit, scores)
                storage.write_table(self._file("scores", unit, ".parquet"), table)
            adopted += 1
        if adopted:
            self.context.progress.say(
                f"  {adopted} of {len(self.design.units)} runs were measured before and still hold"
            )

    def _key(self, unit: Unit) -> str:
        plan, how = self._plan(unit), self.how
        if unit.kind == "gradient":
            active, how = np.ones(plan.table.num_rows, dtype=bool), {**how, "part": unit.source}
        else:
            active = active_rows(plan, unit, self.design)
        return run_key(
            self.design,
            unit,
            active,
            self._settings(unit),
            how=how,
            model=self.model,
            heldout=self._heldout_sha256(unit),
        )

    def _heldout_sha256(self, unit: Unit) -> str:
        table = self._scored_on(unit)
        if id(table) not in self.digests:
            self.digests[id(table)] = heldout_digest(table)
        return self.digests[id(table)]

    def _heldout_reference(self, part: ScorePart) -> ray.ObjectRef:
        table = self._scored_on(part.unit)
        key = id(table), part.rows
        if key not in self.references:
            rows = table.slice(part.rows.start, len(part.rows)).combine_chunks()
            self.references[key] = ray.put(rows)
        return self.references[key]

    def _plan(self, unit: Unit) -> TrainPlan:
        uri = self._plan_uri(unit)
        if uri not in self.plans:
            self.plans[uri] = read_plan(uri)
        return self.plans[uri]

    def _plan_uri(self, unit: Unit) -> str:
        kind = unit.kind if unit.kind in ("warm", "append") else "main"
        return plan_uri(self.context, unit.replication, kind)

    def _settings(self, unit: Unit) -> TrainSettings:
        config = self.context.config
        seed = self.design.replications[unit.replication].seed
        return TrainSettings.from_influence(config.influence, config.model, seed)

    def _drain(self, ledger: Ledger, bar: Any) -> None:
        by_gradient = self.design.estimator == "gradient"
        scorers = None if by_gradient else scorer_pool(self.context)
        tuners = self._tuner_pool()
        while not ledger.is_done:
            while scorers and scorers.has_room and (part := self._next_part(ledger)) is not None:
                self._score(scorers, part)
            while tuners.has_room and (unit := ledger.next_to_train()) is not None:
                if by_gradient:
                    self._differentiate(tuners, unit)
                else:
                    self._tune(tuners, unit)
            for done in wait_any([tuners] if scorers is None else [scorers, tuners]):
                if isinstance(done.key, ScorePart):
                    unit = done.key.unit
                    if self._keep_part(done.key, done.value):
                        ledger.scored(unit)
                        bar.advance(1)
                        self._show_partial_matrix(ledger)
                    continue
                unit = cast(Unit, done.key)
                if unit.kind == "gradient":
                    self._keep_gradients(unit, done.value)
                    ledger.scored(unit)
                    bar.advance(1)
                else:
                    stats = self._training_stats(unit, asdict(done.value))
                    storage.write_json(self._file("units", unit, ".json"), stats)
                    if unit.kind == "warm":
                        self.shared.keep(self._key(unit), None, stats)
                    ledger.trained(unit)
                    bar.advance(1 if unit.kind == "warm" else 0)

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
        branches = self.design.estimator == "branch" and unit.kind != "warm"
        # Only a checkpoint that is written whole may be called trained after a crash.
        storage.delete(self._file("units", unit, ".json"))
        tuners.submit(
            unit,
            "tune",
            self._plan_uri(unit),
            active_rows(self._plan(unit), unit, self.design),
            self._settings(unit),
            self._warm_uri(unit) if branches else None,
            self._file("checkpoints", unit),
        )

    def _differentiate(self, tuners: ActorPool, unit: Unit) -> None:
        config = self.context.config.influence
        uri, warm_uri = self._plan_uri(unit), self._warm_uri(unit)
        settings = self._settings(unit)
        storage.delete(self._file("units", unit, ".json"))
        if unit.kind == "warm":
            checkpoints = self.design.gradient_checkpoints
            tuners.submit(unit, "warm_up", uri, settings, checkpoints, warm_uri)
            return
        task = gradient_task(self._plan(unit), self.design, unit, config.projection_dim)
        every = ScorePart(unit=unit, index=0, rows=range(self._scored_on(unit).num_rows))
        heldout = self._heldout_reference(every)
        tuners.submit(unit, "differentiate", uri, task, heldout, settings, warm_uri)

    def _warm_uri(self, unit: Unit) -> str:
        warm = Unit(replication=unit.replication, kind="warm", source=-1)
        return self._checkpoint(warm)

    def _parts(self, unit: Unit) -> list[ScorePart]:
        return score_parts(unit, self._scored_on(unit).column("category").to_pylist())

    def _next_part(self, ledger: Ledger) -> ScorePart | None:
        """The next span of rows to score, or None where no checkpoint waits."""
        if not self.waiting and (unit := ledger.next_to_score()) is not None:
            there = set(storage.list_names(self._file("parts", unit)))
            parts = self._parts(unit)
            # The last part that comes in concludes, so one is left even where all are there.
            missing = [part for part in parts if part.name not in there] or parts[-1:]
            self.waiting.extend(missing)
        return self.waiting.popleft() if self.waiting else None

    def _score(self, scorers: ActorPool, part: ScorePart) -> None:
        self.started[part] = time.perf_counter()
        config, weights = self.context.config, self._checkpoint(part.unit)
        heldout = self._heldout_reference(part)
        if config.influence.metric == "accuracy":
            scorers.submit(part, "answer", weights, heldout, answer_tokens(config))
        else:
            scorers.submit(part, "score", weights, heldout)

    def _keep_gradients(self, unit: Unit, found: Derivatives) -> None:
        """Commits derivatives as the unit's scores; what they cost, before."""
        cost = {
            "trained_tokens": 0, "gradient_tokens": found.num_tokens, "seconds": found.seconds,
        }  # fmt: skip
        storage.write_json(self._file("units", unit, ".json"), cost)
        table, rejected = gradients_table(self.heldout, found)
        table = _with_metadata(Scored(table=table, rejected=rejected), 0.0)
        self.shared.keep(self._key(unit), table, cost)
        storage.write_table(self._file("scores", unit, ".parquet"), table)

    def _keep_part(self, part: ScorePart, scored: Scored) -> bool:
        """Commits the scores of a part; with the last one those of the unit, and says so."""
        seconds = time.perf_counter() - self.started.pop(part)
        parts = self._parts(part.unit)
        if len(parts) == 1:
            self._keep_scores(part.unit, scored, seconds)
            return True
        folder = self._file("parts", part.unit)
        storage.write_table(storage.join(folder, part.name), _with_metadata(scored, seconds))
        if {other.name for other in parts} - set(storage.list_names(folder)):
            return False
        tables = [storage.read_table(storage.join(folder, other.name)) for other in parts]
        found, seconds = zip(*map(_from_metadata, tables), strict=True)
        self._keep_scores(part.unit, join_parts(found), sum(seconds))
        storage.delete(folder)
        return True

    def _keep_scores(self, unit: Unit, scored: Scored, seconds: float) -> None:
        """Commits the scores, then frees the checkpoint they came from."""
        table = _with_metadata(scored, seconds)
        training = storage.read_json(self._file("units", unit, ".json"))
        self.shared.keep(self._key(unit), table, training)
        uri = self._file("scores", unit, ".parquet")
        storage.write_table(uri, self._complete(unit, table))
        if not self.context.config.influence.keep_checkpoints:
            storage.delete(self._file("checkpoints", unit))

    def _show_partial_matrix(self, ledger: Ledger) -> None:
        """What the replications so far say, for whoever watches; the last one says it itself."""
        total = len(self.design.replications)
        count = ledger.num_scored_replications(total)
        if not self.shown < count < total:
            return
        self.shown = count
        config, attempt = self.context.config.influence, self.context.attempt
        analysis = estimate_alone(config, attempt, self.design.first(count))
        uri = storage.join(self.context.attempt, "partial.parquet")
        storage.write_table(uri, analysis.matrix_table())
        matrices = largest_matrices(analysis)
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
        return storage.list_names(storage.join(self.context.attempt, folder))

    def _file(self, folder: str, unit: Unit, ending: str = "") -> str:
        return storage.join(self.context.attempt, folder, unit.name + ending)


def _with_metadata(scored: Scored, seconds: float) -> pa.Table:
    """The scores as a table whose metadata holds the rejected rows and the seconds of scoring."""
    metadata = {
        "instructmix.seconds": f"{seconds:.3f}",
        "instructmix.rejected": json.dumps(scored.rejected),
    }
    return scored.table.replace_schema_metadata(metadata)


def _from_metadata(table: pa.Table) -> tuple[Scored, float]:
    """The scores and the seconds of scoring from a table of `_with_metadata`."""
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    rejected = json.loads(metadata["instructmix.rejected"])
    scored = Scored(table=table.replace_schema_metadata(None), rejected=rejected)
    return scored, float(metadata["instructmix.seconds"])
