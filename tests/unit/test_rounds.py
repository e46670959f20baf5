"""When `auto` goes on and when it stops."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from influence_world import World

from system import storage
from system.auto.rounds import Round, judge_round, reason_to_stop
from system.config import AutoConfig, GroupLimit, InfluenceConfig, SolveConfig
from system.influence.estimate.matrix import estimate_effects
from system.mix.question import mix_problem
from system.solve import MixOptions, solve_mix

ROUND = Round(
    replications=2, trained_tokens=1000, tuner_hours=1.0, precision=0.01, gain=0.02, regret=0.01,
    regret_error=0.0, undecided={},
)  # fmt: skip


SOLVE = SolveConfig(budget=1000, objective="robust", importance="uniform")


def counts(matrix):
    return dict.fromkeys(matrix.sources, 200)


def judge(world, replications, draw=0, solve=SOLVE):
    matrix = estimate_effects(world.measure(replications, draw=draw)).matrix
    return judge_round(
        {"remove": matrix},
        solve,
        counts(matrix),
        None,
        replications=replications,
        trained_tokens=100 * replications,
        tuner_hours=0.1,
        seed=0,
    )


@pytest.mark.parametrize(
    ("last", "auto", "reason"),
    [
        (ROUND, AutoConfig(), None),
        (replace(ROUND, regret=0.004), AutoConfig(), "enough"),
        (replace(ROUND, regret=0.004), AutoConfig(precision=0.001), None),
        (replace(ROUND, regret=0.004), AutoConfig(precision=0.02), "enough"),
        (ROUND, AutoConfig(max_replications=2), "max_replications 2 reached: the expected regret"),
        (ROUND, AutoConfig(max_tokens=1499), "exceed auto.max_tokens 1,499"),
        (ROUND, AutoConfig(max_tokens=1500), None),
        (ROUND, AutoConfig(max_tuner_hours=1.4), "max_tuner_hours 1.4"),
        (replace(ROUND, regret=None), AutoConfig(regret=10.0), None),
        (
            replace(ROUND, regret=None),
            AutoConfig(regret=10.0, max_replications=2),
            "max_replications 2 reached: with the present effects no mix satisfies the guards",
        ),
        (
            replace(ROUND, regret=0.0),
            AutoConfig(precision=0.001, max_replications=2),
            "the error is 0.0100, auto.precision asks for 0.001",
        ),
    ],
)
def test_every_reason_to_stop(last, auto, reason):
    found = reason_to_stop([last], auto)
    assert found is None if reason is None else reason in (found or "")


def test_more_replications_leave_less_to_regret():
    world = World(run_noise=0.06, shared_noise=0.06)
    few, many = (judge(world, count) for count in (2, 16))
    assert many.regret < 0.5 * few.regret
    assert many.precision < 0.6 * few.precision
    assert many.gain > 0 and few.regret > 0
    assert set(few.undecided) <= {f"c{index}" for index in range(8)}
    assert list(few.undecided.values()) == sorted(few.undecided.values(), reverse=True)


def test_the_expected_regret_is_what_mixes_fall_short_of_on_average():
    """Against the truth of simulated worlds: their best mix less the mix that the estimate gave."""
    expected, real = [], []
    for seed in range(25):
        world = World(seed=seed, own=0.1, run_noise=0.05, shared_noise=0.05)
        matrix = estimate_effects(world.measure(3, draw=seed)).matrix
        expected.append(judge(world, 3, draw=seed).regret)
        options = MixOptions(objective="linear", move=0.1, budget=1000.0)
        truth = mix_problem(SOLVE, {"remove": matrix}, counts(matrix), None)
        effect_TS = world.truth_TS() / world.dose
        truth = replace(truth, effect_add_TS=effect_TS, effect_remove_TS=None)
        estimated = mix_problem(SOLVE, {"remove": matrix}, counts(matrix), None)
        chosen = solve_mix(estimated, replace(options, objective="robust"))
        move_S = np.array([item.count - item.base for item in chosen.categories])
        gain = float(truth.importance_T @ effect_TS @ move_S)
        real.append(solve_mix(truth, options).expected_gain - gain)
    error = np.std(real, ddof=1) / np.sqrt(len(real))
    assert abs(np.mean(expected) - np.mean(real)) < 3 * error + 0.25 * np.mean(real)
    assert np.mean(real) > 0


def test_effects_that_allow_no_mix_yet_are_a_reason_to_go_on(tmp_path):
    """One of two categories must grow, so the other one's target loses more than it may."""
    world = World(num_categories=2, own=0.1, run_noise=1e-3, shared_noise=1e-3)
    group = GroupLimit(categories=("c0",), lower=110.0)
    grown = SOLVE.model_copy(update={"budget": 200, "groups": {"first": group}})
    assert judge(world, 2, solve=grown).regret is not None
    last = judge(world, 2, solve=grown.model_copy(update={"guard_nats": 1e-9}))
    assert last.gain is None and last.regret is None and last.undecided == {}
    assert "no mix keeps the guards" in last.line
    storage.write_json(str(tmp_path / "round.json"), asdict(last))
    assert reason_to_stop([last], AutoConfig()) is None


def test_verdicts_repeat():
    assert judge(World(), 3) == judge(World(), 3)


def test_one_replication_is_no_beginning():
    with pytest.raises(ValueError, match="no errors to judge by"):
        InfluenceConfig(estimator="auto", replications=1)
    with pytest.raises(ValueError, match="max_replications"):
        InfluenceConfig(estimator="auto", replications=9)
