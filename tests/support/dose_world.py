"""Losses at several doses of a world whose returns are known to diminish, or not to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from system.influence.estimate.measurements import Measurements


@dataclass(frozen=True, kw_only=True)
class CurvedWorld:
    """Effect of a dose d: slope * scale * (1 - exp(-d / scale)); `scale` inf: proportional to d.

    Doses of a source share the reference run, the held-out examples and, nested as they are, much
    of the noise of their runs.
    """

    doses: tuple[float, ...] = (16.0, 32.0, 64.0)
    scale: float = 60.0
    num_categories: int = 8
    own: float = 3e-3
    """Nats per example at a dose of nothing."""
    spread: float = 6e-4
    shared_noise: float = 0.015
    run_noise: float = 0.015
    alike_over_doses: float = 0.5
    """Share of a run's variance that all doses of a source have in common."""
    alike_over_targets: float = 0.5
    example_effect: float = 0.10
    example_noise: float = 0.08
    seed: int = 0

    def slope_TS(self) -> np.ndarray:
        """[T, S] nats per example of the first example."""
        rng = np.random.default_rng((self.seed, 1))
        slope_TS = rng.normal(0.0, self.spread, (self.num_categories,) * 2)
        np.fill_diagonal(slope_TS, self.own * rng.uniform(0.4, 1.6, self.num_categories))
        return slope_TS

    def truth_TS(self, dose: float) -> np.ndarray:
        """[T, S] nats per example, mean over a dose."""
        if not np.isfinite(self.scale):
            return self.slope_TS()
        return self.slope_TS() * self.scale * -np.expm1(-dose / self.scale) / dose

    def change_TS(self) -> np.ndarray:
        """[T, S] from the smallest dose to the largest, per example."""
        return self.truth_TS(self.doses[-1]) - self.truth_TS(self.doses[0])

    def measure(
        self, replications: int, examples: int = 64, *, draw: int = 0, direction: str = "add"
    ) -> list[Measurements]:
        """One draw of all noises, at every dose."""
        rng = np.random.default_rng((self.seed, 2, draw))
        count = self.num_categories
        scale_T = np.random.default_rng((self.seed, 3)).uniform(0.6, 1.6, count)

        def shock(*shape: int) -> np.ndarray:
            together = rng.normal(size=(*shape, 1)) * np.sqrt(self.alike_over_targets)
            alone = rng.normal(size=(*shape, count)) * np.sqrt(1 - self.alike_over_targets)
            return scale_T * (together + alone)

        reference_RT = self.shared_noise * shock(replications)
        in_common_RST = shock(replications, count) * np.sqrt(self.alike_over_doses)
        example_TSH = self.example_effect * rng.normal(size=(count, count, examples))
        names = tuple(f"c{index}" for index in range(count))
        found = []
        for dose in self.doses:
            alone_RST = shock(replications, count) * np.sqrt(1 - self.alike_over_doses)
            run_RST = self.run_noise * (in_common_RST + alone_RST)
            part = dose / self.doses[-1]
            differences = []
            for row in range(count):
                training_RS = run_RST[:, :, row] - reference_RT[:, None, row]
                rest = rng.normal(0.0, self.example_noise, (replications, count, examples))
                mean_S = self.truth_TS(dose)[row] * dose
                differences.append(
                    mean_S[None, :, None]
                    + training_RS[:, :, None]
                    + part * example_TSH[row][None]
                    + rest
                )
            found.append(
                Measurements(
                    targets=names,
                    sources=names,
                    direction=direction,
                    estimator="retrain",
                    dose_S=np.full(count, dose),
                    dose_tokens_S=30.0 * np.full(count, dose),
                    differences=tuple(differences),
                )
            )
        return found
