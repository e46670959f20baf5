"""Stage `evaluate`: trains control arms and compares them with the delivered model.

All models are scored on test rows that no training and no measurement used.

    plans of all arms x seeds ──> actors.fit (one group of workers) ──> arms/<arm>-<seed>/
    base, delivered, arms ──> Scorer.score, Scorer.generate ──> scores/*, answers/*   one by one
                                     │ when all are written
                   losses.parquet, accuracy.parquet, outputs.jsonl, summary.json

A model is deleted when both its files (scores and answers) are written.  A driver that starts again
repeats only the trainings, scores, and answers whose files are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from actors.fit import fit
from actors.pool import Done, wait_any
from actors.scorer import scorer_pool
from actors.solver import measured_problem
from actors.stage import StageContext, StageResult
from actors.trainer import make_job, plan_selection
from system import storage
from system.curriculum import Curriculum
from system.data.corpus import Corpus
from system.data.lengths import mean_response_tokens
from system.evaluation.arms import ArmPlan, move_seed, plan_arms
from system.evaluation.evaluate import BASE, DELIVERED, ArmInfo, headline, summarise
from system.evaluation.prediction import ArmForecast
from system.evaluation.tables import LOSSES, OUTCOMES, accuracy_table
from system.evaluation.unseen_rows import draw_test_questions, draw_test_rows, untrained_rows
from system.influence.design.interventions import seed_of
from system.mix.notes import choose_shrinkage
from system.mix.question import control_counts, mix_options
from system.models.base import load_tokenizer
from system.scoring.answers import ANSWERS, Questions, check_answers
from system.scoring.score import Scored
from system.selection.select import select_arm
from system.solve import Mix, MixPredictor
from system.training.plan import read_plan, write_plan

_REJECTED = "instructmix.rejected"


def run(context: StageContext) -> StageResult:
    """Trains the arms, scores all models on test rows, and writes the comparison."""
    stage = _Evaluation(context)
    stage.train_arms()
    stage.measure()
    return stage.conclude()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """One model to evaluate."""

    arm: str
    seed: int
    weights_uri: str | None
    """None: the base model."""
    is_ours: bool
    """Whether this stage trained it, and deletes it after it was scored."""

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed:02d}"


class _Evaluation:
    """The work of one attempt; all of its state is in files, so it can resume."""

    def __init__(self, context: StageContext) -> None:
        config = context.config
        self.context = context
        self.corpus = Corpus.open(context.input("tag", "manifest"))
        self.curriculum = Curriculum.from_json(
            storage.read_json(context.input("curriculum", "curriculum"))
        )
        self.tokenizer = load_tokenizer(
            context.input("model", "model"), trust_remote_code=config.model.trust_remote_code
        )
        self.mix = Mix.from_json(storage.read_bytes(context.input("solve", "mix")).decode())
        counts = self.corpus.counts("train")
        tokens = mean_response_tokens(self.corpus) if config.solve.unit == "tokens" else None
        self.plans = {
            (arm.name, seed): arm
            for seed in range(config.evaluate.seeds)
            for arm in plan_arms(
                config.evaluate.arms,
                mix=self.mix,
                curriculum=self.curriculum,
                settings=config.curriculum,
                natural=control_counts(config.solve, "natural", counts, tokens),
                uniform=control_counts(config.solve, "uniform", counts, tokens),
                supply=counts,
                max_epochs=config.solve.max_epochs,
                seed=move_seed(config.seed, seed),
            )
        }
        # Arms choose by the scores and vectors of stage `select`, which covers all categories.
        self.selection_uri = context.input("select", "manifest").rpartition("/")[0]
        delivered = context.input("train", "model")
        self.models = [
            _Model(arm=BASE, seed=0, weights_uri=None, is_ours=False),
            _Model(arm=DELIVERED, seed=0, weights_uri=delivered, is_ours=False),
            *(
                _Model(
                    arm=arm,
                    seed=seed,
                    weights_uri=self._uri("arms", f"{arm}-{seed:02d}", "model"),
                    is_ours=True,
                )
                for arm, seed in self.plans
            ),
        ]

    def train_arms(self) -> None:
        """Trains every arm and seed whose scores or answers are missing."""
        ours = [model for model in self.models if model.is_ours]
        # All plans come first: the test rows exclude the training rows of every model.
        for model in ours:
            self._write_plan(self.plans[model.arm, model.seed], model)
        jobs = [
            make_job(
                model.name,
                self._uri("arms", model.name, "plan.arrow"),
                self._uri("arms", model.name),
                self.context,
                seed=self._seed(model),
                keep_checkpoints=0,
            )
            for model in ours
            if not self._has("scores", model) or self._lacks_answers(model)
        ]
        if jobs:
            fit(jobs, self.context)

    def measure(self) -> None:
        """Scores every model and generates its answers; each result is written at once."""
        rows, left_out = self.external
        tokens, dropped = draw_test_rows(self.context.config, self.corpus, self.tokenizer, rows)
        storage.write_json(self._uri("dropped.json"), dropped | left_out)
        pending = list(self._units(tokens))
        if not pending:
            return
        pool = scorer_pool(self.context)
        models = {model.name: model for model in self.models}
        with self.context.progress.bar("evaluate", total=len(pending)) as bar:
            # The pool bounds the units in flight; the next one is submitted when it has room.
            waiting = iter(pending)
            unit = next(waiting, None)
            while unit is not None or pool.num_pending:
                while unit is not None and pool.has_room:
                    key, method, args = unit
                    pool.submit(key, method, *args)
                    unit = next(waiting, None)
                for done in wait_any([pool]):
                    self._keep(done, models)
                    bar.advance()

    def conclude(self) -> StageResult:
        """Combines the files of all models, compares the arms, and writes the outputs."""
        config = self.context.config
        losses = pa.concat_tables(
            _labelled(self._read("scores", model), model, LOSSES) for model in self.models
        )
        rejected = self._rejected("scores", self.models)
        rejected_answers = self._rejected("answers", self._answering_models())
        answers = {model.name: self._read("answers", model) for model in self._answering_models()}
        self._write_outputs(answers)
        outcomes = pa.concat_tables(
            [
                OUTCOMES.empty_table(),
                *(
                    _labelled(answers[model.name], model, OUTCOMES)
                    for model in self._answering_models()
                ),
            ]
        )
        summary = summarise(
            losses=losses,
            outcomes=outcomes,
            arms=self._arm_infos(),
            importance=self._importance(),
            forecast=self._forecast(),
            confidence=config.evaluate.confidence,
        )
        summary["rejected"] = rejected
        summary["rejected_answers"] = rejected_answers
        summary["dropped"] = storage.read_json(self._uri("dropped.json"))
        storage.write_table(self._uri("losses.parquet"), losses)
        storage.write_table(
            self._uri("accuracy.parquet"), accuracy_table(outcomes, config.evaluate.confidence)
        )
        storage.write_json(self._uri("summary.json"), summary)
        return StageResult(
            outputs={
                "losses": "losses.parquet",
                "summary": "summary.json",
                "accuracy": "accuracy.parquet",
                "outputs": "outputs.jsonl",
            },
            counts={
                "models": len(self.models),
                "test_rows": sum(summary["test_rows"].values()),
                "questions": self.questions.rows.num_rows,
                "rejected": sum(len(rows) for rows in rejected.values()),
                "rejected_answers": sum(len(rows) for rows in rejected_answers.values()),
                "dropped": summary["dropped"],
            },
            lines=headline(summary),
        )

    def _forecast(self) -> ArmForecast:
        """The predictions for the arms, in the unit of the effects, even if the mix used gamma."""
        summary = storage.read_json(self.context.input("influence", "summary"))
        solve = self.context.config.solve.model_copy(update={"matrix": "effect"})
        solve, _ = choose_shrinkage(solve, summary)
        problem, _ = measured_problem(self.context, solve)
        passes = self.curriculum.epochs
        return ArmForecast(
            predictor=MixPredictor(problem, mix_options(solve, is_believed=True)),
            counts={
                arm: [
                    {name: count / passes for name, count in plan.counts.items()} for plan in plans
                ]
                for arm, plans in self._plans_by_arm().items()
            },
            unit=summary["unit"],
        )

    @cached_property
    def external(self) -> tuple[dict[str, pa.Table], dict[str, int]]:
        """Test rows of further targets, without the training rows of any model."""
        plans = [
            self._uri("arms", model.name, "plan.arrow") for model in self.models if model.is_ours
        ]
        plans.append(self.context.input("train", "plan"))
        trained = (read_plan(uri).table.column("id") for uri in plans)
        return untrained_rows(self.context.config, trained)

    @cached_property
    def questions(self) -> Questions:
        """The questions that every model answers."""
        rows, _ = self.external
        return draw_test_questions(self.context.config, self.corpus, self.tokenizer, rows)

    def _seed(self, model: _Model) -> int:
        return seed_of(self.context.config.seed, "evaluate", model.seed)

    def _write_plan(self, arm: ArmPlan, model: _Model) -> None:
        """Writes the plan of an arm and then `arm.json` with its numbers, unless both exist."""
        uri = self._uri("arms", model.name, "plan.arrow")
        info_uri = self._uri("arms", model.name, "arm.json")
        if storage.is_whole(info_uri) and storage.is_whole(uri):
            return
        table = select_arm(
            self.corpus,
            arm.counts,
            self._seed(model),
            curriculum=arm.curriculum,
            settings=self.context.config.select,
            attempt=self.selection_uri,
        )
        plan, dropped = plan_selection([table], self.context.input("model", "model"), self.context)
        write_plan(uri, plan)
        info = {
            "examples": plan.table.num_rows,
            "response_tokens": int(plan.denominators.sum()),
            "steps": plan.num_steps,
            "dropped": dropped,
        }
        storage.write_json(info_uri, info)

    def _units(self, tokens: pa.Table) -> Iterator[tuple[tuple[str, str], str, tuple[Any, ...]]]:
        limit = self.context.config.evaluate.max_new_tokens
        stops = self.questions.stop_token_ids
        for model in self.models:
            if not self._has("scores", model):
                yield (model.name, "scores"), "score", (model.weights_uri, tokens)
            if self._lacks_answers(model):
                arguments = (model.weights_uri, self.questions.prompts, limit, stops)
                yield (model.name, "answers"), "generate", arguments

    def _keep(self, done: Done, models: Mapping[str, _Model]) -> None:
        name, kind = done.key  # pyright: ignore[reportGeneralTypeIssues]
        model = models[name]
        if kind == "scores":
            scored: Scored = done.value
            table, rejected = scored.table, scored.rejected
        else:
            table, rejected = check_answers(self.questions, done.value, self.tokenizer)
        table = table.replace_schema_metadata({_REJECTED: json.dumps(rejected)})
        storage.write_table(self._uri(kind, f"{name}.parquet"), table)
        if model.is_ours and self._has("scores", model) and not self._lacks_answers(model):
            storage.delete(self._uri("arms", name, "model"))

    def _rejected(self, kind: str, models: Sequence[_Model]) -> dict[str, dict[str, str]]:
        """Model -> row -> reason why the engine could not score or answer it."""
        rejected = {}
        for model in models:
            metadata = self._read(kind, model).schema.metadata or {}
            if rows := json.loads(metadata.get(_REJECTED.encode(), b"{}")):
                rejected[model.name] = rows
        return rejected

    def _write_outputs(self, answers: Mapping[str, pa.Table]) -> None:
        with storage.atomic_output(self._uri("outputs.jsonl")) as file:
            for model in self._answering_models():
                for row in answers[model.name].select(ANSWERS.names).to_pylist():
                    line = {
                        "id": row["id"], "category": row["category"], "arm": model.arm,
                        "seed": model.seed, "prompt": row["prompt"], "expected": row["expected"],
                        "output": row["output"], "correct": row["correct"],
                    }  # fmt: skip
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def _arm_infos(self) -> list[ArmInfo]:
        seeds = self.context.config.evaluate.seeds
        infos = []
        for name, plans in self._plans_by_arm().items():
            facts = [
                storage.read_json(self._uri("arms", f"{name}-{seed:02d}", "arm.json"))
                for seed in range(seeds)
            ]
            infos.append(
                ArmInfo(
                    name=name,
                    mix=plans[0].mix,
                    order=plans[0].order,
                    seeds=seeds,
                    examples=facts[0]["examples"],
                    response_tokens=sum(info["response_tokens"] for info in facts) // seeds,
                    steps=facts[0]["steps"],
                    counts={
                        category: sum(plan.counts[category] for plan in plans) / seeds
                        for category in plans[0].counts
                    },
                )
            )
        plan = read_plan(self.context.input("train", "plan"))
        categories = plan.table.column("category").to_pylist()
        infos.append(
            ArmInfo(
                name=DELIVERED,
                mix="solved",
                order="curriculum",
                seeds=1,
                examples=plan.table.num_rows,
                response_tokens=int(plan.denominators.sum()),
                steps=plan.num_steps,
                counts={name: categories.count(name) for name in self.corpus.categories},
            )
        )
        return infos

    def _plans_by_arm(self) -> dict[str, list[ArmPlan]]:
        """The plans of each arm, one per seed."""
        by_arm: dict[str, list[ArmPlan]] = {}
        for (arm, _), plan in self.plans.items():
            by_arm.setdefault(arm, []).append(plan)
        return by_arm

    def _importance(self) -> dict[str, float]:
        """Weight of each target, as in the solver."""
        importance = self.context.config.solve.importance
        if isinstance(importance, dict):
            return importance
        counts = self.corpus.counts("train")
        if importance == "uniform":
            return dict.fromkeys([*counts, *(t.target for t in self.mix.targets)], 1.0)
        return {name: float(count) for name, count in counts.items()}

    def _answering_models(self) -> list[_Model]:
        return self.models if self.questions.rows.num_rows else []

    def _lacks_answers(self, model: _Model) -> bool:
        return bool(self.questions.rows.num_rows) and not self._has("answers", model)

    def _has(self, kind: str, model: _Model) -> bool:
        return storage.is_whole(self._uri(kind, f"{model.name}.parquet"))

    def _read(self, kind: str, model: _Model) -> pa.Table:
        return storage.read_table(self._uri(kind, f"{model.name}.parquet"))

    def _uri(self, *parts: str) -> str:
        return storage.join(self.context.attempt, *parts)


def _labelled(table: pa.Table, model: _Model, schema: pa.Schema) -> pa.Table:
    """The table with the columns of the schema; arm and seed are added."""
    size = table.num_rows
    columns = {
        "arm": pa.array([model.arm] * size, pa.string()),
        "seed": pa.array([model.seed] * size, pa.int32()),
        **{name: table.column(name) for name in schema.names if name in table.column_names},
    }
    return pa.table(columns, schema=schema)
