"""The arms of an evaluation: the counts and the order that each is trained on.

The name of an arm has its mix and its order.  The order is shuffled unless the name ends in
`-curriculum` or `-reversed` (the stages of the curriculum, last first).  All arms have the budget
of the solved mix per pass, and as many passes as the curriculum.  The mixes are

    solved     the solved mix
    natural    the shares of the train split
    uniform    as equal as the supply allows
    random     moves as many examples from the base mix as `solved`, in a random direction, which
               differs for every seed, so that the interval includes other directions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from system.config import CurriculumConfig
from system.curriculum import Curriculum, plan_curriculum
from system.influence.design.interventions import seed_of
from system.solve import Mix

ORDERS = ("curriculum", "reversed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmPlan:
    """Counts and order of one arm."""

    name: str
    mix: str
    order: str
    """shuffled | curriculum | reversed."""
    counts: dict[str, int]
    """Examples of each category over all passes."""
    curriculum: dict[str, Any] | None
    """Content of a curriculum.json whose stages add up to `counts`; None if shuffled."""


def plan_arms(
    names: Sequence[str],
    *,
    mix: Mix,
    curriculum: Curriculum,
    settings: CurriculumConfig,
    natural: Mapping[str, int],
    uniform: Mapping[str, int],
    supply: Mapping[str, int],
    max_epochs: float,
    seed: int,
) -> list[ArmPlan]:
    """Counts and order of every arm for one training seed.

    Args:
        names: arms, as in `evaluate.arms`.
        mix: the solved mix.
        curriculum: of the solved mix; its totals are the mix times its epochs.
        settings: for the curricula of other mixes.
        natural: counts per pass, see `system.mix.question.control_counts`.
        uniform: same as `natural`.
        supply: train rows of each category.
        max_epochs: how often an example may be used within a pass.
        seed: of the random move, see `move_seed`; the other mixes do not depend on it.
    """
    solved = dict(zip(curriculum.levels, curriculum.counts_TS.sum(axis=0).tolist(), strict=True))
    base = {item.category: item.base for item in mix.categories}
    base = apportion(round(sum(base.values())), base)
    limits = {name: int(rows * max_epochs) for name, rows in supply.items()}
    changes = (solved[name] / curriculum.epochs - count for name, count in base.items())
    moved = round(sum(max(change, 0.0) for change in changes))
    random = random_move(base, limits, moved, seed)
    mixes = {
        "solved": solved,
        "natural": {name: count * curriculum.epochs for name, count in natural.items()},
        "uniform": {name: count * curriculum.epochs for name, count in uniform.items()},
        "random": {name: count * curriculum.epochs for name, count in random.items()},
    }
    return [_plan(name, mixes, curriculum, settings) for name in names]


def move_seed(run_seed: int, training: int) -> int:
    """Seed of the random move of one training of the arm `random`."""
    return seed_of(run_seed, "evaluate-random-move", training)


def random_move(
    counts: Mapping[str, int], limits: Mapping[str, int], moved: int, seed: int
) -> dict[str, int]:
    """The counts after a random move: some categories give `moved` examples to the others.

    A random half of the categories receives.  How much a category gives or receives is random, in
    proportion to its size.  Fewer examples move only if the limits do not allow more.

    Args:
        counts: category -> examples.
        limits: category -> most examples it may have.
        moved: examples to move.
        seed: equal seeds give equal moves.
    """
    rng = np.random.default_rng(seed)
    names = sorted(counts)
    count_C = np.array([counts[name] for name in names])
    room_C = np.maximum(np.array([limits[name] for name in names]) - count_C, 0)
    order = rng.permutation(len(names))
    receives_C = np.zeros(len(names), dtype=bool)
    receives_C[order[: max(len(names) // 2, 1)]] = True
    weights_C = rng.uniform(0.2, 1.0, len(names)) * np.maximum(count_C, 1)
    limit_C = np.where(receives_C, room_C, count_C)
    moved = min(moved, int(limit_C[receives_C].sum()), int(limit_C[~receives_C].sum()))
    change_C = np.zeros(len(names), dtype=np.int64)
    for side_C, sign in ((receives_C, 1), (~receives_C, -1)):
        change_C[side_C] = sign * _distribute(moved, weights_C[side_C], limit_C[side_C])
    return {name: int(count_C[c] + change_C[c]) for c, name in enumerate(names)}


def _distribute(total: int, weights_K: np.ndarray, limit_K: np.ndarray) -> np.ndarray:
    """[K] whole numbers that sum to the total, in proportion to the weights, within the limits."""
    amount_K = np.zeros(len(weights_K), dtype=np.int64)
    while (left := total - int(amount_K.sum())) > 0:
        open_K = amount_K < limit_K
        share_K = np.where(open_K, weights_K, 0.0)
        step_K = np.floor(left * share_K / share_K.sum()).astype(np.int64)
        if not step_K.any():  # fewer are left than categories: one each, by size
            step_K[np.argsort(-share_K, kind="stable")[: min(left, int(open_K.sum()))]] = 1
        amount_K = np.minimum(amount_K + step_K, limit_K)
    return amount_K


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
