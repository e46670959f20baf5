from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.config import CurriculumConfig
from system.curriculum import Curriculum, plan_curriculum
from system.evaluation.arms import ArmPlan, apportion, move_seed, plan_arms, random_move
from system.solve import Mix
from system.solve.mix import CategoryMix, SolverInfo

BASE = {"a": 50.0, "b": 30.5, "c": 19.5}
SOLVED = {"a": 40, "b": 30, "c": 30}
LEVELS = {"a": 0, "b": 1, "c": 2}
SUPPLY = {"a": 500, "b": 305, "c": 20}


def solved_mix() -> Mix:
    values: dict[str, Any] = {
        "status": "optimal", "kind": "linear", "objective": 1.0, "base_objective": 0.0,
        "gain": 1.0, "expected_gain": 1.0, "expected_gain_se": None, "budget": 100.0,
        "unit": "examples", "move": 0.2, "moved": 0.1, "targets": (), "groups": (),
        "move_price": None, "budget_price": None,
        "solver": SolverInfo(name="x", version="1", seconds=0.0),
    }  # fmt: skip
    categories = tuple(
        CategoryMix(
            category=name, base=BASE[name], count=count, share=count / 100, reduced_cost=None,
            supply_price=None, at="free",
        )
        for name, count in SOLVED.items()
    )  # fmt: skip
    return Mix(categories=categories, **values)


def plan(names: list[str], training: int = 0, **settings: Any) -> dict[str, ArmPlan]:
    config = CurriculumConfig(**settings)
    curriculum: Curriculum = plan_curriculum(
        SOLVED, LEVELS, preset=config.preset, num_stages=config.num_stages, epochs=config.epochs,
        tilt=config.tilt, rehearsal=config.rehearsal,
    )  # fmt: skip
    arms = plan_arms(
        names,
        mix=solved_mix(),
        curriculum=curriculum,
        settings=config,
        natural={"a": 50, "b": 31, "c": 19},
        uniform={"a": 40, "b": 40, "c": 20},
        supply=SUPPLY,
        max_epochs=1.0,
        seed=move_seed(4, training),
    )
    return {arm.name: arm for arm in arms}


ALL = [
    "natural", "uniform", "random", "solved", "solved-curriculum", "solved-reversed",
    "natural-curriculum",
]  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 3])
def test_all_arms_have_the_same_budget(epochs: int):
    for arm in plan(ALL, epochs=epochs).values():
        assert sum(arm.counts.values()) == 100 * epochs, arm.name


def test_natural_is_the_base_mix_and_uniform_is_as_equal_as_supply_allows():
    arms = plan(ALL)
    assert arms["natural"].counts == {"a": 50, "b": 31, "c": 19}
    assert arms["uniform"].counts == {"a": 40, "b": 40, "c": 20}
    assert arms["solved"].counts == SOLVED


@pytest.mark.parametrize("preset", ["tilted", "paper", "sequential"])
def test_stages_of_an_ordered_arm_add_up_to_its_mix(preset: str):
    arms = plan(ALL, preset=preset).values()
    assert any(arm.curriculum is not None for arm in arms)
    for arm in arms:
        if arm.curriculum is None:
            assert arm.order == "shuffled"
            continue
        totals = dict.fromkeys(arm.counts, 0)
        for stage in arm.curriculum["stages"]:
            for category, count in stage["counts"].items():
                totals[category] += count
        assert totals == arm.counts


def test_reversed_runs_the_same_stages_last_first():
    arms = plan(ALL)
    forward = arms["solved-curriculum"].curriculum
    backward = arms["solved-reversed"].curriculum
    assert forward is not None and backward is not None
    assert backward["stages"] == forward["stages"][::-1]
    assert forward["stages"][0]["counts"] != forward["stages"][-1]["counts"]


def test_mix_and_order_are_read_from_the_name():
    found = {name: (arm.mix, arm.order) for name, arm in plan(ALL).items()}
    assert found["natural-curriculum"] == ("natural", "curriculum")
    assert found["solved-reversed"] == ("solved", "reversed")
    assert found["uniform"] == ("uniform", "shuffled")


def test_whole_numbers_keep_the_total_and_stay_within_one_of_the_exact_share():
    weights = {"a": 1.0, "b": 2.0, "c": 4.1}
    for total in (0, 1, 7, 100, 1001):
        counts = apportion(total, weights)
        assert sum(counts.values()) == total
        for name, weight in weights.items():
            assert abs(counts[name] - total * weight / 7.1) < 1


@given(
    counts=st.lists(st.integers(0, 400), min_size=2, max_size=9),
    room=st.lists(st.integers(0, 300), min_size=9, max_size=9),
    moved=st.integers(0, 500),
    seed=st.integers(0, 99),
)
def test_a_random_move_keeps_total_and_limits_and_moves_what_was_asked(counts, room, moved, seed):
    names = [f"c{place}" for place in range(len(counts))]
    before = dict(zip(names, counts, strict=True))
    limits = {name: before[name] + room[place] for place, name in enumerate(names)}
    after = random_move(before, limits, moved, seed)
    assert sum(after.values()) == sum(counts)
    assert all(0 <= after[name] <= limits[name] for name in names)
    gained = sum(max(after[name] - before[name], 0) for name in names)
    assert gained <= moved
    if all(limits[name] - before[name] >= moved and before[name] >= moved for name in names):
        assert gained == moved
    assert after == random_move(before, limits, moved, seed)


def test_the_random_arm_moves_as_much_as_the_solved_one():
    arms = plan(["natural", "solved", "random"])
    natural, solved = arms["natural"].counts, arms["solved"].counts
    moved = sum(max(solved[name] - natural[name], 0) for name in natural)
    random = arms["random"].counts
    assert sum(random.values()) == sum(natural.values())
    assert 0 < sum(max(random[name] - natural[name], 0) for name in natural) <= moved
    assert random != solved


def test_every_training_of_the_random_arm_moves_elsewhere_and_all_others_stay():
    trainings = [plan(ALL, training=number) for number in range(4)]
    moves = [tuple(arms["random"].counts.values()) for arms in trainings]
    assert len(set(moves)) > 1
    for name in set(ALL) - {"random"}:
        assert len({tuple(arms[name].counts.values()) for arms in trainings}) == 1
    again = plan(["random"], training=2)["random"]
    assert again.counts == trainings[2]["random"].counts
