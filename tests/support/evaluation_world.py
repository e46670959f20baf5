"""Simulated evaluations whose truth is known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from system.evaluation.evaluate import ArmInfo, summarise
from system.evaluation.tables import LOSSES, OUTCOMES

BASE_GAP = 0.7


def simulate(
    rng: np.random.Generator,
    *,
    gain: float = 0.0,
    seeds: int = 3,
    rows: int = 40,
    seed_sd: float = 0.02,
    example_sd: float = 0.5,
    interaction_sd: float = 0.05,
    categories: tuple[str, ...] = ("a", "b"),
    arms: tuple[str, ...] = ("natural", "solved", "solved-curriculum"),
) -> dict[str, dict[str, np.ndarray]]:
    """Arms x seeds x examples with the error model of `system.evaluation.contrast`."""
    performance = {arm: {} for arm in ("base", *arms)}
    noise = {arm: rng.normal(0, seed_sd, seeds) for arm in arms}
    common = rng.normal(0, 3 * seed_sd, seeds)
    for category in categories:
        examples = rng.normal(-2, example_sd, rows)
        taste = rng.normal(0, interaction_sd, rows)
        performance["base"][category] = (examples + taste - BASE_GAP)[None, :]
        for arm in arms:
            taste = rng.normal(0, interaction_sd, rows)
            rest = rng.normal(0, 0.05, (seeds, rows))
            level = gain if arm == "solved" else 0.0
            performance[arm][category] = (
                level + (common + noise[arm])[:, None] + examples + taste + rest
            )
    return performance


def loss_table(performance: dict[str, dict[str, np.ndarray]]) -> pa.Table:
    rows = [
        {"arm": arm, "seed": seed, "category": c, "id": f"{c}{i:03d}", "nll": -value * 7,
         "num_tokens": 7}
        for arm, of in performance.items()
        for c, values in of.items()
        for seed, line in enumerate(values)
        for i, value in enumerate(line)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=LOSSES)


def arm_info(name: str, seeds: int = 3) -> ArmInfo:
    return ArmInfo(
        name=name, mix="natural", order="shuffled", seeds=seeds, examples=10, response_tokens=70,
        steps=2, counts={"a": 5, "b": 5},
    )  # fmt: skip


def full_summary(performance, outcomes=None, forecast=None, importance=None):
    outcomes = OUTCOMES.empty_table() if outcomes is None else outcomes
    trained = [name for name in performance if name != "base"]
    return summarise(
        losses=loss_table(performance),
        outcomes=outcomes,
        arms=[arm_info(name) for name in trained],
        importance={"a": 30.0, "b": 10.0} if importance is None else importance,
        forecast=forecast,
        confidence=0.95,
    )
