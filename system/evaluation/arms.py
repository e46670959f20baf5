"""The arms of an evaluation: which examples, in which order, at equal budget.

An arm's name says both: the mix (`natural`, `uniform`, `solved`) and the order (shuffled unless the
name ends in `-curriculum` or `-reversed`).  All arms take as many passes as the curriculum and, per
pass, the budget of the solved mix: `natural` is the base mix that the solver started from,
`uniform` is as equal as supply allows.  The reversed order is the curriculum's stages, last first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from system.config import CurriculumConfig
from system.curriculum import Curriculum, plan_curriculum
from system.data.tag import stratified_sizes
from system.solve import Mix

ORDERS = ("curriculum", "reversed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmPlan:
    """What an arm trains on."""

    name: str
    mix: str
    order: str
    """shuffled | curriculum | reversed."""
    counts: dict[str, int]
    """Examples of each category over all passes."""
    curriculum: dict[str, Any] | None
    """Content of a curriculum.json whose stages add up to `counts`; None where shuffled."""


def plan_arms(
    names: Sequence[str],
    *,
    mix: Mix,
    curriculum: Curriculum,
    settings: CurriculumConfig,
    supply: Mapping[str, int],
    max_epochs: float,
) -> list[ArmPlan]:
    """Mix and order of every arm.

    Args:
        names: arms, as in `evaluate.arms`.
        mix: the solved mix.
        curriculum: the order that goes with it; its totals are the mix times its epochs.
        settings: for the curriculum of other mixes.
        supply: train rows of each category.
        max_epochs: how often an example may be used within a pass.
    """
    solved = dict(zip(curriculum.levels, curriculum.counts_TS.sum(axis=0).tolist(), strict=True))
    base = {item.category: item.base for item in mix.categories}
    natural = apportion(round(sum(base.values())), base)
    limits = {name: int(rows * max_epochs) for name, rows in supply.items()}
    uniform = stratified_sizes(limits, sum(natural.values()))
    mixes = {
        "solved": solved,
        "natural": {name: count * curriculum.epochs for name, count in natural.items()},
        "uniform": {name: count * curriculum.epochs for name, count in uniform.items()},
    }
    return [_plan(name, mixes, curriculum, settings) for name in names]


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the weights that sum to the total (largest remainders)."""
    names = list(weights)
    exact = np.array([weights[name] for name in names], dtype=np.float64)
    exact *= total / exact.sum()
    counts = np.floor(exact + 1e-9).astype(np.int64)
    rest = total - int(counts.sum())
    for place in np.argsort(counts - exact, kind="stable")[:rest]:
        counts[place] += 1
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _plan(
    name: str,
    mixes: Mapping[str, dict[str, int]],
    curriculum: Curriculum,
    settings: CurriculumConfig,
) -> ArmPlan:
    mix, _, order = name.partition("-")
    counts = mixes[mix]
    own = None if order not in ORDERS else curriculum
    if own is not None and mix != "solved":
        own = plan_curriculum(
            {category: count // curriculum.epochs for category, count in counts.items()},
            {category: curriculum.levels.get(category) for category in counts},
            preset=settings.preset,
            num_stages=settings.num_stages,
            epochs=settings.epochs,
            tilt=settings.tilt,
            rehearsal=settings.rehearsal,
        )
    content = None if own is None else own.to_json()
    if content is not None and order == "reversed":
        content["stages"].reverse()
    return ArmPlan(
        name=name, mix=mix, order=order or "shuffled", counts=dict(counts), curriculum=content
    )
