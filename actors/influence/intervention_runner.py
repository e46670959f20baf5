"""Makes the runs of an influence stage: a ledger hands them to tuners and scorers.

    design ──> ledger ── tune(run) ──> Tuner   ──> checkpoints/<run>/, units/<run>.json
                  ^ └─── score(part) ─> Scorer  ──> scores/<run>.parquet, checkpoint deleted
                  └──────── wait_any ─────────┘
    (`gradient`: warm_up and differentiate on the tuners, whose answers are the scores)

The files are the state.  A training is finished when `units/<run>.json` exists, a scoring when
`scores/<run>.parquet` exists; both are written atomically.  Many held-out rows are scored in parts
(`system.influence.measure.score_parts`); each part is kept as `parts/<run>/*.parquet` until all
exist.  A driver that restarts finds these files and continues.  If an actor dies, its pool gives
the work unit to another one.  Runs that another attempt has finished are reused if everything that
decides their result is the same (`system.influence.measure.reuse`).  Warm-up checkpoints (`branch`,
`gradient`) are kept until the stage is done.
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

from actors.influence.analysis import estimate_attempt, largest_matrices
from actors.influence.designer import answer_tokens, plan_uri
from actors.influence.tuner import Tuner
from actors.pool import ActorPool, ActorSpec, wait_any
from actors.scorer import scorer_pool
from actors.stage import StageContext
from system import storage
from system.influence.design.design import Design, InterventionRun
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
    """Further settings that decide the result of a run, besides rows, training and model."""
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
    """Makes the runs of one attempt; continues where an earlier driver stopped."""

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
        """Trains and scores all runs that are not finished."""
        context, config = self.context, self.context.config
        # A reused run has no checkpoint, so nothing is reused if checkpoints must be kept.
        if not config.influence.keep_checkpoints:
            self._adopt_finished_runs()
        scored = {name.removesuffix(".parquet") for name in self._names("scores")}
        ledger = Ledger(
            self.design.all_runs,
            trained=self._trained(),
            scored=scored,
            max_checkpoints=open_checkpoints(config.cluster.num_tuners, config.cluster.num_scorers),
        )
        total = len(self.design.all_runs)
        if not ledger.is_done:
            with context.progress.bar("influence", total=total) as bar:
                bar.skip(total - max(ledger.num_unscored, ledger.num_to_train))
                self._drain(ledger, bar)
        if not config.influence.keep_checkpoints:
            storage.delete(storage.join(context.attempt, "checkpoints"))

    def _trained(self) -> set[str]:
        """Names of the runs that are trained and whose checkpoints exist."""
        checkpoints = set(self._names("checkpoints"))
        return {name.removesuffix(".json") for name in self._names("units")} & checkpoints

    def _scored_on(self, run: InterventionRun) -> pa.Table:
        """The held-out rows that a run is scored on; always the same table object for a run."""
        return self.heldout

    def _checkpoint(self, run: InterventionRun) -> str:
        """URI of the weights of a run, once it is trained."""
        return self._file("checkpoints", run)

    def _training_stats(self, run: InterventionRun, stats: dict[str, Any]) -> dict[str, Any]:
        """The statistics of a training that are written to its file."""
        return stats

    def _complete(self, run: InterventionRun, table: pa.Table) -> pa.Table:
        """All scores of a run, from those of `_scored_on`."""
        return table

    def _adopt_finished_runs(self) -> None:
        """Reuses runs that other attempts finished with the same key."""
        here = set(self._names("units")) | set(self._names("scores"))
        adopted = 0
        for run in self.design.all_runs:
            ending = ".json" if run.kind == "warm" else ".parquet"
            if run.name + ending in here or (match := self.shared.find(self._key(run))) is None:
                continue
            scores, training = match
            storage.write_json(self._file("units", run, ".json"), training)
            if scores is not None:
                table = self._complete(run, scores)
                storage.write_table(self._file("scores", run, ".parquet"), table)
            adopted += 1
        if adopted:
            self.context.progress.say(
                f"  {adopted} of {len(self.design.all_runs)} runs are reused from earlier attempts"
            )

    def _key(self, run: InterventionRun) -> str:
        plan, how = self._plan(run), self.how
        if run.kind == "gradient":
            active, how = np.ones(plan.table.num_rows, dtype=bool), {**how, "part": run.source}
        else:
            active = active_rows(plan, run, self.design)
        return run_key(
            self.design,
            run,
            active,
            self._settings(run),
            how=how,
            model=self.model,
            heldout=self._heldout_sha256(run),
        )

    def _heldout_sha256(self, run: InterventionRun) -> str:
        table = self._scored_on(run)
        if id(table) not in self.digests:
            self.digests[id(table)] = heldout_digest(table)
        return self.digests[id(table)]

    def _heldout_reference(self, part: ScorePart) -> ray.ObjectRef:
        table = self._scored_on(part.run)
        key = id(table), part.rows
        if key not in self.references:
            rows = table.slice(part.rows.start, len(part.rows)).combine_chunks()
            self.references[key] = ray.put(rows)
        return self.references[key]

    def _plan(self, run: InterventionRun) -> TrainPlan:
        uri = self._plan_uri(run)
        if uri not in self.plans:
            self.plans[uri] = read_plan(uri)
        return self.plans[uri]

    def _plan_uri(self, run: InterventionRun) -> str:
        kind = run.kind if run.kind in ("warm", "append") else "main"
        return plan_uri(self.context, run.replication, kind)

    def _settings(self, run: InterventionRun) -> TrainSettings:
        config = self.context.config
        seed = self.design.replications[run.replication].seed
        return TrainSettings.from_influence(config.influence, config.model, seed)

    def _drain(self, ledger: Ledger, bar: Any) -> None:
        by_gradient = self.design.estimator == "gradient"
        scorers = None if by_gradient else scorer_pool(self.context)
        tuners = self._tuner_pool()
        # Scorers first: each scoring frees a checkpoint, which allows the next training.
        while not ledger.is_done:
            while scorers and scorers.has_room and (part := self._next_part(ledger)) is not None:
                self._score(scorers, part)
            while tuners.has_room and (run := ledger.next_to_train()) is not None:
                if by_gradient:
                    self._differentiate(tuners, run)
                else:
                    self._tune(tuners, run)
            for done in wait_any([tuners] if scorers is None else [scorers, tuners]):
                if isinstance(done.key, ScorePart):
                    run = done.key.run
                    if self._keep_part(done.key, done.value):
                        ledger.scored(run)
                        bar.advance(1)
                        self._show_partial_matrix(ledger)
                    continue
                run = cast(InterventionRun, done.key)
                if run.kind == "gradient":
                    self._keep_gradients(run, done.value)
                    ledger.scored(run)
                    bar.advance(1)
                else:
                    stats = self._training_stats(run, asdict(done.value))
                    storage.write_json(self._file("units", run, ".json"), stats)
                    if run.kind == "warm":
                        self.shared.keep(self._key(run), None, stats)
                    ledger.trained(run)
                    bar.advance(1 if run.kind == "warm" else 0)

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

    def _tune(self, tuners: ActorPool, run: InterventionRun) -> None:
        branches = self.design.estimator == "branch" and run.kind != "warm"
        # The tuner is about to overwrite the checkpoint.  If it crashes meanwhile, the old record
        # must not declare a broken checkpoint finished.
        storage.delete(self._file("units", run, ".json"))
        tuners.submit(
            run,
            "tune",
            self._plan_uri(run),
            active_rows(self._plan(run), run, self.design),
            self._settings(run),
            self._warm_uri(run) if branches else None,
            self._file("checkpoints", run),
        )

    def _differentiate(self, tuners: ActorPool, run: InterventionRun) -> None:
        config = self.context.config.influence
        uri, warm_uri = self._plan_uri(run), self._warm_uri(run)
        settings = self._settings(run)
        storage.delete(self._file("units", run, ".json"))
        if run.kind == "warm":
            checkpoints = self.design.gradient_checkpoints
            tuners.submit(run, "warm_up", uri, settings, checkpoints, warm_uri)
            return
        task = gradient_task(self._plan(run), self.design, run, config.projection_dim)
        every = ScorePart(run=run, index=0, rows=range(self._scored_on(run).num_rows))
        heldout = self._heldout_reference(every)
        tuners.submit(run, "differentiate", uri, task, heldout, settings, warm_uri)

    def _warm_uri(self, run: InterventionRun) -> str:
        warm = InterventionRun(replication=run.replication, kind="warm", source=-1)
        return self._checkpoint(warm)

    def _parts(self, run: InterventionRun) -> list[ScorePart]:
        return score_parts(run, self._scored_on(run).column("category").to_pylist())

    def _next_part(self, ledger: Ledger) -> ScorePart | None:
        """The next part to score, or None if no checkpoint waits."""
        if not self.waiting and (run := ledger.next_to_score()) is not None:
            present = set(storage.whole_names(self._file("parts", run)))
            parts = self._parts(run)
            # A scoring is concluded when a part arrives.  If all parts exist already (the driver
            # died just before), one is scored again so that this happens.
            missing = [part for part in parts if part.name not in present] or parts[-1:]
            self.waiting.extend(missing)
        return self.waiting.popleft() if self.waiting else None

    def _score(self, scorers: ActorPool, part: ScorePart) -> None:
        self.started[part] = time.perf_counter()
        config, weights = self.context.config, self._checkpoint(part.run)
        heldout = self._heldout_reference(part)
        if config.influence.metric == "accuracy":
            scorers.submit(part, "answer", weights, heldout, answer_tokens(config))
        else:
            scorers.submit(part, "score", weights, heldout)

    def _keep_gradients(self, run: InterventionRun, derivatives: Derivatives) -> None:
        """Writes the cost of a gradient run, then commits its derivatives as scores."""
        cost = {
            "trained_tokens": 0,
            "gradient_tokens": derivatives.num_tokens,
            "seconds": derivatives.seconds,
        }
        storage.write_json(self._file("units", run, ".json"), cost)
        table, rejected = gradients_table(self.heldout, derivatives)
        table = _with_metadata(Scored(table=table, rejected=rejected), 0.0)
        self.shared.keep(self._key(run), table, cost)
        storage.write_table(self._file("scores", run, ".parquet"), table)

    def _keep_part(self, part: ScorePart, scored: Scored) -> bool:
        """Commits the scores of a part; returns True if the scoring of the run is complete."""
        seconds = time.perf_counter() - self.started.pop(part)
        parts = self._parts(part.run)
        if len(parts) == 1:
            self._keep_scores(part.run, scored, seconds)
            return True
        folder = self._file("parts", part.run)
        storage.write_table(storage.join(folder, part.name), _with_metadata(scored, seconds))
        if {other.name for other in parts} - set(storage.whole_names(folder)):
            return False
        tables = [storage.read_table(storage.join(folder, other.name)) for other in parts]
        scored_parts, seconds = zip(*map(_read_metadata, tables), strict=True)
        self._keep_scores(part.run, join_parts(scored_parts), sum(seconds))
        storage.delete(folder)
        return True

    def _keep_scores(self, run: InterventionRun, scored: Scored, seconds: float) -> None:
        """Commits the scores of a run, then deletes its checkpoint."""
        table = _with_metadata(scored, seconds)
        training = storage.read_json(self._file("units", run, ".json"))
        self.shared.keep(self._key(run), table, training)
        uri = self._file("scores", run, ".parquet")
        storage.write_table(uri, self._complete(run, table))
        if not self.context.config.influence.keep_checkpoints:
            storage.delete(self._file("checkpoints", run))

    def _show_partial_matrix(self, ledger: Ledger) -> None:
        """Reports the effects of the replications so far; the last one is reported by the stage."""
        total = len(self.design.replications)
        count = ledger.num_scored_replications(total)
        if not self.shown < count < total:
            return
        self.shown = count
        config, attempt = self.context.config.influence, self.context.attempt
        analysis = estimate_attempt(config, attempt, self.design.first(count))
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
        return storage.whole_names(storage.join(self.context.attempt, folder))

    def _file(self, folder: str, run: InterventionRun, ending: str = "") -> str:
        return storage.join(self.context.attempt, folder, run.name + ending)


def _with_metadata(scored: Scored, seconds: float) -> pa.Table:
    """The table of scores, with seconds and rejected rows in its metadata."""
    metadata = {
        "instructmix.seconds": f"{seconds:.3f}",
        "instructmix.rejected": json.dumps(scored.rejected),
    }
    return scored.table.replace_schema_metadata(metadata)


def _read_metadata(table: pa.Table) -> tuple[Scored, float]:
    """Reads back what `_with_metadata` joined: scores and seconds."""
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    rejected = json.loads(metadata["instructmix.rejected"])
    scored = Scored(table=table.replace_schema_metadata(None), rejected=rejected)
    return scored, float(metadata["instructmix.seconds"])
