"""The arms of an evaluation: which examples, in which order, at equal budget.

An arm's name says both: the mix (`natural`, `uniform`, `random`, `solved`) and the order (shuffled
unless the name ends in `-curriculum` or `-reversed`).  All arms take as many passes as the
curriculum and, per pass, the budget of the solved mix: `natural` has the shares of the train split,
`uniform` is as equal as supply allows, `random` moves as much as `solved` from the base mix, in a
random direction, another one for every seed, so that its interval holds for other directions too.
The reversed order is the curriculum's stages, last first.
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
    natural: Mapping[str, int],
    uniform: Mapping[str, int],
    supply: Mapping[str, int],
    max_epochs: float,
    seed: int,
) -> list[ArmPlan]:
    """Mix and order of every arm in one of its trainings.

    Args:
        names: arms, as in `evaluate.arms`.
        mix: the solved mix.
        curriculum: the order that goes with it; its totals are the mix times its epochs.
        settings: for the curriculum of other mixes.
        natural: counts of one pass, see `system.mix.question.control_counts`.
        uniform: likewise.
        supply: train rows of each category.
        max_epochs: how often an example may be used within a pass.
        seed: of the random move, see `move_seed`; other mixes are the same for all seeds.
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
    """The counts with `moved` examples taken from some categories and given to the others.

    A coin decides each category's side; what it gives or gets is random, in proportion to its size.
    Less is moved only where the sides cannot hold so much.

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
    gets_C = np.zeros(len(names), dtype=bool)
    gets_C[order[: max(len(names) // 2, 1)]] = True
    weights_C = rng.uniform(0.2, 1.0, len(names)) * np.maximum(count_C, 1)
    most_C = np.where(gets_C, room_C, count_C)
    moved = min(moved, int(most_C[gets_C].sum()), int(most_C[~gets_C].sum()))
    change_C = np.zeros(len(names), dtype=np.int64)
    for side_C, sign in ((gets_C, 1), (~gets_C, -1)):
        change_C[side_C] = sign * _shared_out(moved, weights_C[side_C], most_C[side_C])
    return {name: int(count_C[c] + change_C[c]) for c, name in enumerate(names)}


def _shared_out(total: int, weights_K: np.ndarray, most_K: np.ndarray) -> np.ndarray:
    """[K] whole numbers in proportion to weights, none above its most, that sum to the total."""
    given_K = np.zeros(len(weights_K), dtype=np.int64)
    while (left := total - int(given_K.sum())) > 0:
        open_K = given_K < most_K
        share_K = np.where(open_K, weights_K, 0.0)
        step_K = np.floor(left * share_K / share_K.sum()).astype(np.int64)
        if not step_K.any():  # the last few, one each to the largest
            step_K[np.argsort(-share_K, kind="stable")[: min(left, int(open_K.sum()))]] = 1
        given_K = np.minimum(given_K + step_K, most_K)
    return given_K


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
