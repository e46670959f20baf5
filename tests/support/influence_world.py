"""A world with known effects and known variance components, for tests of the estimators."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from system.influence.estimate.measurements import Measurements


@dataclass(frozen=True, kw_only=True)
class World:
    """True effects per example, and how noisy training and held-out examples are, in nats."""

    num_categories: int = 8
    external_targets: int = 0
    own: float = 0.30
    spread: float = 0.06
    shared_noise: float = 0.02
    run_noise: float = 0.02
    relative_noise: float = 0.1
    """Noise of an effect that grows with the effect."""
    duplicate: bool = False
    """Whether sources 0 and 1 are one and the same."""
    target_noise: tuple[float, float] = (0.6, 1.6)
    """Noise of the quietest and the loudest target, as multiples of the sizes above."""
    alike_over_targets: float = 0.5
    example_effect: float = 0.15
    example_noise: float = 0.10
    dose: float = 100.0
    """Examples that `own` and `spread` are nats of."""
    doses: tuple[float, ...] = ()
    """Examples of each source that are removed; empty: `dose` of all."""
    seed: int = 0

    @property
    def dose_S(self) -> np.ndarray:
        """[S] examples of each source."""
        return np.array(self.doses or (self.dose,) * self.num_categories)

    def truth_TS(self) -> np.ndarray:
        """[T, S] nats of the whole dose of each source."""
        rng = np.random.default_rng((self.seed, 1))
        rows = self.num_categories + self.external_targets
        effect_TS = rng.normal(0.0, self.spread, (rows, self.num_categories))
        index = np.arange(self.num_categories)
        effect_TS[index, index] = self.own * rng.uniform(0.3, 1.7, self.num_categories)
        if self.duplicate:
            effect_TS[0, 1], effect_TS[1, 0] = effect_TS[0, 0], effect_TS[1, 1]
        return effect_TS * self.dose_S / self.dose

    def measure(
        self, replications: int, examples: int = 64, *, draw: int = 0, direction: str = "remove"
    ) -> Measurements:
        """One draw of all noises."""
        rng = np.random.default_rng((self.seed, 2, draw))
        truth_TS = self.truth_TS()
        rows, columns = truth_TS.shape
        target_scale = np.random.default_rng((self.seed, 3)).uniform(*self.target_noise, rows)

        def shock(shape: tuple[int, ...], size: float) -> np.ndarray:
            # Part of a run's noise moves all targets together: one run, one set of weights.
            together = rng.normal(size=(*shape, 1)) * np.sqrt(self.alike_over_targets)
            alone = rng.normal(size=(*shape, rows)) * np.sqrt(1 - self.alike_over_targets)
            return size * target_scale * (together + alone)

        reference_RT = shock((replications,), self.shared_noise)
        run_RST = shock((replications, columns), self.run_noise)
        differences = []
        for row in range(rows):
            training_RS = run_RST[:, :, row] - reference_RT[:, None, row]
            training_RS += self.relative_noise * truth_TS[row] * rng.normal(size=training_RS.shape)
            common_H = rng.normal(0.0, self.example_effect, examples) * 0.5
            persistent_SH = (
                rng.normal(0.0, self.example_effect, (columns, examples)) * 0.85 + common_H
            )
            rest = rng.normal(0.0, self.example_noise, (replications, columns, examples))
            differences.append(
                truth_TS[row][None, :, None] + training_RS[:, :, None] + persistent_SH[None] + rest
            )
        names = tuple(f"c{index}" for index in range(columns))
        extra = tuple(f"x{index}" for index in range(self.external_targets))
        return Measurements(
            targets=names + extra,
            sources=names,
            direction=direction,
            estimator="retrain",
            dose_S=self.dose_S,
            dose_tokens_S=self.dose_S * np.linspace(20.0, 60.0, columns),
            differences=tuple(differences),
        )


FITTED = {
    "num_categories": 14,
    "own": 0.137,
    "spread": 0.0056,
    "shared_noise": 0.0,
    "run_noise": 0.0028,
    "target_noise": (0.5, 2.6),
    "relative_noise": 0.084,
    "alike_over_targets": 0.2,
    "example_effect": 0.018,
    "example_noise": 0.027,
    "dose": 80.0,
}
"""Settings of `World` with the variance components that `fit_errors` and `shrink` found in a real
run: configs/real_cpu.yaml (commit 835d6a9), 14 categories, direction `remove`, two replications of
`retrain`, 64 held-out rows."""


@dataclass(frozen=True, kw_only=True)
class AnswerWorld:
    """Right and wrong answers: questions of some difficulty, runs that answer a share of them."""

    num_categories: int = 8
    num_silent: int = 0
    """Targets of which no run does any question."""
    own: float = 0.15
    spread: float = 0.05
    """Share of right answers that a dose of another category moves."""
    run_noise: float = 0.03
    seed: int = 0

    def truth_TS(self) -> np.ndarray:
        """[T, S] change of the expected share of right answers."""
        rng = np.random.default_rng((self.seed, 1))
        effect_TS = rng.normal(0.0, self.spread, (self.num_categories, self.num_categories))
        effect_TS += self.own * np.eye(self.num_categories)
        effect_TS[: self.num_silent] = 0.0
        return effect_TS

    def measure(self, replications: int, questions: int = 30) -> Measurements:
        """The answers of all runs, as differences of a question's loss (0 right, 1 wrong)."""
        rng = np.random.default_rng((self.seed, 2))
        truth_TS = self.truth_TS()
        base_T = rng.uniform(0.3, 0.7, self.num_categories)
        ability = NormalDist()
        differences = []
        for row in range(self.num_categories):
            difficulty_H = rng.normal(size=questions)

            def right(share: float, difficulty_H: np.ndarray = difficulty_H) -> np.ndarray:
                share = float(np.clip(share + rng.normal(0.0, self.run_noise), 0.02, 0.98))
                luck_H = rng.normal(size=difficulty_H.size)
                return 0.9 * difficulty_H + 0.44 * luck_H < ability.inv_cdf(share)

            row_RSH = np.zeros((replications, self.num_categories, questions))
            for replication in range(replications):
                reference_H = right(base_T[row])
                for source in range(self.num_categories):
                    without_H = right(base_T[row] - truth_TS[row, source])
                    row_RSH[replication, source] = reference_H.astype(float) - without_H
            differences.append(row_RSH * (row >= self.num_silent))
        names = tuple(f"c{index}" for index in range(self.num_categories))
        dose_S = np.ones(self.num_categories)
        return Measurements(
            targets=names,
            sources=names,
            direction="remove",
            estimator="retrain",
            dose_S=dose_S,
            dose_tokens_S=dose_S,
            differences=tuple(differences),
            is_binary=True,
        )
