"""A run directory as the stages leave it: simulated measurements, real estimators.

Every file is written by the code that a run uses (matrix, summary, mix, taxonomy, curriculum,
evaluation, corpus manifest), so a change of any format shows in the report's tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from report_stages import StageWriter

from system import storage
from system.config import RunConfig
from system.influence.estimate.measurements import Measurements
from system.rundir import RunDir
from system.stages import STAGE_NAMES

CATEGORIES = (
    "arithmetic word problems", "code generation", "code review and repair", "creative writing",
    "extractive question answering", "grade-school mathematics", "logical deduction",
    "multi-turn role play", "natural language inference", "paraphrase", "sentiment", "summaries",
    "tool use with structured calls", "translation",
)  # fmt: skip
_GROUPS = (0, 1, 1, 2, 3, 0, 0, 2, 3, 3, 3, 2, 1, 2)


@dataclass(frozen=True, kw_only=True)
class RunBuilder:
    """What kind of run to write.

    Example:
        >>> RunBuilder(until="solve").write(str(tmp_path / "run"))
    """

    categories: tuple[str, ...] = CATEGORIES
    external: tuple[str, ...] = ("general ability",)
    directions: tuple[str, ...] = ("remove",)
    replications: int = 4
    seeds: int = 3
    arms: tuple[str, ...] = ("natural", "natural-curriculum", "solved", "solved-curriculum")
    kept: float = 0.4
    """Share of the promise that trainings keep; negative ones break it."""
    until: str = "evaluate"
    """Last stage that has run; `none`: not even the first."""
    seed: int = 0

    def write(self, uri: str) -> RunDir:
        """Writes the run directory and returns it."""
        run_dir = RunDir(uri)
        config = self.config(uri)
        storage.write_json(storage.join(run_dir.uri, "config.json"), config.model_dump(mode="json"))
        writer = StageWriter(self, run_dir, config)
        for stage in STAGE_NAMES[:-1]:
            if self.until == "none":
                break
            writer.write_stage(stage)
            if stage == self.until:
                break
        return run_dir

    def config(self, uri: str) -> RunConfig:
        """The configuration of the run."""
        return RunConfig.model_validate(
            {
                "run_dir": uri,
                "sources": [{"path": "instructions.jsonl"}],
                "model": {"path": "builtin:tiny"},
                "influence": {
                    "directions": list(self.directions),
                    "replications": self.replications,
                    "targets": {name: f"{k}.jsonl" for k, name in enumerate(self.external)},
                },
                "solve": {
                    "budget": sum(self.train_rows().values()) // 2,
                    "move": 0.15,
                    "category_cap": 0.5,
                    "guard": 0.2,
                    "objective": "robust",
                    "robust_radius": 0.3,
                },
                "evaluate": {"seeds": self.seeds, "arms": list(self.arms)},
            }
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Measured on: the categories, then targets that no source owns."""
        return self.categories + self.external

    def train_rows(self) -> dict[str, int]:
        """Rows of the train split."""
        rng = np.random.default_rng((self.seed, 1))
        return {name: int(rng.integers(120, 700)) for name in self.categories}

    def true_effects(self) -> np.ndarray:
        """[T, S] nats of a dose: related categories help each other, the lower one more."""
        rng = np.random.default_rng((self.seed, 2))
        groups = [_GROUPS[k % len(_GROUPS)] for k in range(len(self.categories))]
        groups += [-1] * len(self.external)
        effect = rng.normal(-0.004, 0.006, (len(self.targets), len(self.categories)))
        for t, group in enumerate(groups):
            for s in range(len(self.categories)):
                if t == s:
                    effect[t, s] = rng.uniform(0.12, 0.3)
                elif group == groups[s]:
                    effect[t, s] = rng.uniform(0.03, 0.06) + (0.05 if s < t else -0.02)
        return effect

    def measure(self, direction: str) -> Measurements:
        """Simulated differences of losses in every replication."""
        rng = np.random.default_rng((self.seed, 3, len(direction)))
        truth = self.true_effects() * (1.0 if direction == "remove" else 0.8)
        rows, columns = truth.shape
        shared = rng.normal(0, 0.006, (self.replications, rows, 1))
        noise = shared + rng.normal(0, 0.008, (self.replications, rows, columns))
        examples = rng.normal(0, 0.08, (rows, columns, 96))
        return Measurements(
            targets=self.targets,
            sources=self.categories,
            direction=direction,
            estimator="retrain",
            dose_S=np.full(columns, 128.0),
            dose_tokens_S=np.linspace(4000.0, 9000.0, columns),
            differences=tuple(
                (truth[t] + noise[:, t])[:, :, None]
                + examples[t][None]
                + rng.normal(0, 0.05, (self.replications, columns, 96))
                for t in range(rows)
            ),
        )
