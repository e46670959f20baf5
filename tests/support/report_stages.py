"""What each stage of a simulated run leaves, written by the code that a real run uses."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from system import storage
from system.config import RunConfig
from system.curriculum import plan_curriculum
from system.data.corpus import Shard, make_manifest, write_manifest
from system.data.rows.conversation import SPLITS
from system.evaluation.arms import apportion
from system.evaluation.evaluate import ArmInfo, summarise
from system.evaluation.prediction import ArmForecast
from system.evaluation.tables import LOSSES, OUTCOMES
from system.influence.design.design import CategoryRows, Design, Replication, Target
from system.influence.estimate.matrix import estimate_effects
from system.influence.estimate.measurements import Losses
from system.influence.estimate.summary import Cost
from system.influence.estimate.summary import summarise as summarise_influence
from system.mix.notes import (
    evidence_notes,
    why_not_believed,
)
from system.mix.question import (
    dependency_effects,
    mix_options,
    mix_problem,
)
from system.rundir import RunDir, StageRecord, fingerprint
from system.solve import MixPredictor, nearest_mix, solve_mix, sweep_move
from system.stages import STAGE_FOLDERS, STAGE_NAMES
from system.tagging.choose import TAGS, measure_accuracy
from system.taxonomy import estimate_taxonomy

if TYPE_CHECKING:
    from report_builder import RunBuilder

_SECONDS = {
    "ingest": 8.4, "model": 31.0, "tag": 74.2, "influence": 1380.5, "solve": 0.4,
    "curriculum": 1.3, "select": 2.2, "train": 212.9, "evaluate": 655.0,
}  # fmt: skip


class StageWriter:
    """Writes one stage after the other, each from what the ones before left."""

    def __init__(self, run: RunBuilder, run_dir: RunDir, config: RunConfig) -> None:
        self.run, self.run_dir, self.config = run, run_dir, config
        self.rng = np.random.default_rng((run.seed, 4))
        self.matrices: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.mix: Any = None
        self.predictor: Any = None
        self.curriculum: Any = None

    def write_stage(self, stage: str) -> None:
        """Writes the outputs of a stage and commits its record."""
        attempt = fingerprint({"stage": stage, "seed": self.run.seed})
        self.base = self.run_dir.attempt_uri(STAGE_FOLDERS[stage], attempt)
        outputs = getattr(self, f"_{stage}")()
        record = StageRecord(
            stage=stage,
            fingerprint=attempt,
            inputs={"stage": stage},
            outputs={
                name: storage.join(STAGE_FOLDERS[stage], attempt, path)
                for name, path in outputs.items()
            },
            counts={"rows": 12345, "dropped": {"too-long": 3, "no-response": 0}},
            lines=(f"{stage} had something to say",),
            seconds=_SECONDS[stage],
            finished=f"2030-01-0{1 + STAGE_NAMES.index(stage)}T10:00:00+00:00",
            versions={"instructmix": "0.1.0", "numpy": "2.2.0"},
        )
        self.run_dir.commit(STAGE_FOLDERS[stage], record)

    def _json(self, name: str, value: Any) -> None:
        storage.write_json(storage.join(self.base, name), value)

    def _manifest(self) -> None:
        rows = self.run.train_rows()
        shards = [
            Shard(
                path=f"shards/{split}/{k}.arrow", split=split, category=name,
                rows=rows[name] if split == "train" else 40 + k, first_id=f"{k:032x}",
                last_id=f"{k:032x}", sha256="0" * 64,
            )
            for split in SPLITS
            for k, name in enumerate(self.run.categories)
        ]  # fmt: skip
        kept = sum(shard.rows for shard in shards)
        manifest = make_manifest(
            shards,
            read=kept + 61 + 23,
            kept=kept,
            duplicates=61,
            rejected={"too-long": 4, "no-response": 19},
            sources=(
                {
                    "name": "instructions", "files": {"instructions.jsonl": "1-2"},
                    "read": kept + 84, "rejected": {"too-long": 4, "no-response": 19},
                },
            ),
            details={"duplicates": {"exact": 61}},
        )  # fmt: skip
        write_manifest(storage.join(self.base, "manifest.json"), manifest)

    def _ingest(self) -> dict[str, str]:
        self._manifest()
        return {"manifest": "manifest.json"}

    def _model(self) -> dict[str, str]:
        return {}

    def _tag(self) -> dict[str, str]:
        self._manifest()
        names = self.run.categories
        known = [name for name in names for _ in range(20)]
        chosen = [
            name if self.rng.random() < 0.6 else names[int(self.rng.integers(len(names)))]
            for name in known
        ]
        columns = {"id": [f"{k:032x}" for k in range(len(known))], "known": known}
        columns |= {"category": chosen}
        filler = {
            field.name: pa.nulls(len(known), field.type)
            for field in TAGS
            if field.name not in columns
        }
        table = pa.table({**columns, **filler})
        self._json("accuracy.json", measure_accuracy(table, self.run.train_rows()).to_json())
        return {"manifest": "manifest.json", "accuracy": "accuracy.json"}

    def _influence(self) -> dict[str, str]:
        config = self.config.influence
        measured = {name: self.run.measure(name) for name in self.run.directions}
        estimates = {name: estimate_effects(item) for name, item in measured.items()}
        self.matrices = {name: estimate.matrix for name, estimate in estimates.items()}
        storage.write_table(
            storage.join(self.base, "matrix.parquet"),
            pa.concat_tables([matrix.to_table() for matrix in self.matrices.values()]),
        )
        cost = Cost(
            runs=60, trained_tokens=5_200_000, scored_tokens=2_100_000, train_seconds=900.0,
            score_seconds=300.0,
        )  # fmt: skip
        self.summary = summarise_influence(
            self._design(), config, measured, estimates, self._reference_losses(), cost, {}
        )
        self._json("summary.json", self.summary)
        return {"matrix": "matrix.parquet", "summary": "summary.json"}

    def _design(self) -> Design:
        rows = CategoryRows(available=400, base=192, dose=128, extra=128, warm=0, warm_reused=0)
        names = self.run.categories
        asked = {"base": 192, "dose": 128, "extra": 128, "warm": 0, "heldout": 96}
        return Design(
            estimator="retrain",
            seed=0,
            directions=self.run.directions,
            sources=names,
            targets=tuple(
                Target(name=name, num_rows=96, num_tokens=4000, is_external=name not in names)
                for name in self.run.targets
            ),
            replications=tuple(
                Replication(
                    index=k, seed=k, plan_sha256="0" * 64, warm_sha256=None, num_steps=100,
                    rows=dict.fromkeys(names, rows),
                    dose_tokens={d: dict.fromkeys(names, 5000) for d in self.run.directions},
                )
                for k in range(self.run.replications)
            ),
            asked=asked,
            dropped={},
        )  # fmt: skip

    def _reference_losses(self) -> Losses:
        count = 96
        places = [np.arange(k * count, (k + 1) * count) for k in range(len(self.run.targets))]
        return Losses(
            examples=tuple(places),
            num_tokens_N=np.full(count * len(places), 40),
            loss={
                f"r{k:02d}-reference": self.rng.normal(2.0, 0.1, count * len(places))
                for k in range(self.run.replications)
            },
            num_incomplete=0,
        )

    def _solve(self) -> dict[str, str]:
        solve = self.config.solve
        problem = mix_problem(solve, self.matrices, self.run.train_rows(), None)
        doubt = why_not_believed(self.summary)
        options = mix_options(solve, is_believed=not doubt)
        self.mix = (nearest_mix if doubt else solve_mix)(problem, options)
        self.predictor = MixPredictor(problem, options)
        if doubt:
            self.mix = dataclasses.replace(self.mix, notes=(doubt, *self.mix.notes))
        notes = (*evidence_notes(self.mix, self.summary), *self.mix.notes)
        self.mix = dataclasses.replace(self.mix, notes=notes)
        storage.write_bytes(storage.join(self.base, "mix.json"), self.mix.to_json().encode())
        points = sweep_move(problem, options, [0.0, 0.05, 0.1, 0.15, 0.2, 0.3])
        self._json("sweep.json", [dataclasses.asdict(point) for point in points])
        return {"mix": "mix.json", "sweep": "sweep.json"}

    def _curriculum(self) -> dict[str, str]:
        categories, effects, errors, usable = dependency_effects(self.matrices)
        taxonomy = estimate_taxonomy(categories, effects, errors, identifiable=usable)
        self.curriculum = plan_curriculum(
            {name: round(count) for name, count in self.mix.counts().items()},
            taxonomy.curriculum_levels,
            num_stages=3,
        )
        self._json("taxonomy.json", taxonomy.to_json())
        self._json("curriculum.json", self.curriculum.to_json())
        return {"taxonomy": "taxonomy.json", "curriculum": "curriculum.json"}

    def _select(self) -> dict[str, str]:
        return {}

    def _train(self) -> dict[str, str]:
        lines, step = [], 0
        total = sum(stage.size for stage in self.curriculum.stages) // 16
        for stage in self.curriculum.stages:
            for _ in range(stage.size // 16):
                record = {
                    "step": step, "stage": stage.name,
                    "loss": 1.5 + 1.4 * float(np.exp(-step / 60)) + self.rng.normal(0, 0.06),
                    "learning_rate": 2e-4 * (1 - step / total), "grad_norm": 1.1,
                    "response_tokens": 900 + step % 7, "tokens": 1500, "seconds": 0.8,
                    "tokens_per_second": 1875.0, "mfu": 0.41, "memory_bytes": 2**31,
                    "world_size": 2, "time": 0.0, "category_loss": {},
                }  # fmt: skip
                lines.append(json.dumps(record) + "\n")
                step += 1
        storage.write_bytes(storage.join(self.base, "metrics.jsonl"), "".join(lines).encode())
        return {"metrics": "metrics.jsonl"}

    def _evaluate(self) -> dict[str, str]:
        arms = [
            ArmInfo(
                name=name, mix=name.split("-")[0],
                order="curriculum" if name.endswith("curriculum") else "shuffled",
                seeds=self.run.seeds, examples=3000, response_tokens=171_000, steps=188,
                counts=self._counts(name.split("-")[0]),
            )
            for name in self.run.arms
        ]  # fmt: skip
        summary = summarise(
            losses=self._test_losses(),
            outcomes=self._answers(),
            arms=arms,
            importance={target.target: target.importance for target in self.mix.targets},
            forecast=ArmForecast(
                predictor=self.predictor,
                counts={arm.name: [arm.counts] for arm in arms},
                unit=self.mix.effect_unit,
            ),
            confidence=0.95,
        )
        self._json("summary.json", summary)
        return {"summary": "summary.json"}

    def _counts(self, mix: str) -> dict[str, int]:
        base = {item.category: item.base for item in self.mix.categories}
        if mix == "solved":
            return {name: round(count) for name, count in self.mix.counts().items()}
        total = round(sum(base.values()))
        return apportion(total, base if mix == "natural" else dict.fromkeys(base, 1.0))

    def _models(self) -> list[tuple[str, int]]:
        seeds = range(self.run.seeds)
        return [("base", 0), *((arm, seed) for arm in self.run.arms for seed in seeds)]

    def _test_losses(self, rows: int = 60) -> pa.Table:
        names = self.run.categories
        level = np.random.default_rng(5).uniform(1.2, 2.4, len(names))
        example = np.random.default_rng(6).normal(0, 0.3, (len(names), rows))
        promised = {target.target: target.change for target in self.mix.targets}
        parts = []
        for arm, seed in self._models():
            for k, name in enumerate(names):
                shift = 0.6 + 0.2 * np.sin(k) if arm == "base" else 0.0
                if arm.startswith("solved"):
                    shift -= self.run.kept * promised[name]
                if arm.endswith("curriculum"):
                    shift -= 0.003
                shift += self.rng.normal(0, 0.004)
                loss = level[k] + example[k] + shift + self.rng.normal(0, 0.05, rows)
                parts.append(self._rows(arm, seed, name, {"nll": loss * 40}))
        columns = {"num_tokens": pa.array([40] * rows * len(parts), pa.int32())}
        table = pa.concat_tables(parts)
        return pa.table({**{n: table[n] for n in table.column_names}, **columns}).cast(LOSSES)

    def _answers(self, rows: int = 20) -> pa.Table:
        parts = [
            self._rows(arm, seed, name, {"correct": self.rng.random(rows) < 0.3 + 0.02 * k})
            for arm, seed in self._models()
            for k, name in enumerate(self.run.categories[:3])
        ]
        return pa.concat_tables(parts).cast(OUTCOMES)

    def _rows(self, arm: str, seed: int, name: str, values: dict[str, np.ndarray]) -> pa.Table:
        count = len(next(iter(values.values())))
        return pa.table(
            {
                "arm": [arm] * count,
                "seed": pa.array([seed] * count, pa.int32()),
                "category": [name] * count,
                "id": [f"{name}-{k}" for k in range(count)],
                **values,
            }
        )
