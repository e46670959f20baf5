"""`solve.base`: the mix that moves start from, and the controls it is compared with."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from influence_world import World

from actors.pipeline import STAGES, stage_inputs
from system.config import RunConfig, SolveConfig
from system.errors import ConfigError
from system.influence.estimate.matrix import EffectMatrix, estimate_effects
from system.mix.notes import base_notes
from system.mix.question import control_counts, importance_weights, mix_options, mix_problem
from system.solve import Mix, MixPredictor, solve_mix

COUNTS = {"c0": 700, "c1": 200, "c2": 60, "c3": 40}
EQUAL = dict.fromkeys(COUNTS, 160.0)


def matrix() -> EffectMatrix:
    return estimate_effects(World(num_categories=4).measure(2)).matrix


def solved(solve: SolveConfig, tokens: dict[str, float] | None = None) -> Mix:
    asked = mix_problem(solve, {"remove": matrix()}, COUNTS, tokens)
    return solve_mix(asked, mix_options(solve, is_believed=True))


def bases(mix: Mix) -> dict[str, float]:
    return {item.category: item.base for item in mix.categories}


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("natural", {"c0": 112, "c1": 32, "c2": 10, "c3": 6}),
        ("uniform", dict.fromkeys(COUNTS, 40)),
        ({"c0": 1.0, "c1": 3.0}, {"c0": 40, "c1": 120, "c2": 0, "c3": 0}),
    ],
    ids=["natural", "uniform", "weights"],
)
def test_moves_start_from_the_chosen_base(base, expected):
    mix = solved(SolveConfig(budget=160, base=base, move=0.1))
    assert bases(mix) == expected
    changes = [item.count - item.base for item in mix.categories]
    assert 0 < sum(max(change, 0) for change in changes) <= 16
    still = solved(SolveConfig(budget=160, base=base, move=0.0))
    assert still.counts() == expected and still.expected_gain == 0


def test_an_equal_base_keeps_to_the_supply():
    mix = solved(SolveConfig(budget=400, base="uniform", move=0.0))
    assert mix.counts() == {"c0": 150, "c1": 150, "c2": 60, "c3": 40}


def test_a_base_that_names_no_category_is_refused():
    with pytest.raises(ConfigError, match=r"solve\.base names \['d'\]"):
        solved(SolveConfig(budget=100, base={"d": 1.0}))


def test_a_base_without_any_weight_is_refused():
    with pytest.raises(ConfigError, match="weight above 0"):
        solved(SolveConfig(budget=100, base={"c0": 0.0}))


@pytest.mark.parametrize("base", ["natural", "uniform", {"c2": 1.0, "c3": 3.0}])
def test_importance_by_base_share_follows_the_base(base):
    solve = SolveConfig(budget=100, base=base, max_epochs=10)
    asked = mix_problem(solve, {"remove": matrix()}, COUNTS, None)
    weights = importance_weights(solve, matrix().targets, COUNTS)
    np.testing.assert_allclose(weights, asked.importance_T)
    if base == "uniform":
        np.testing.assert_allclose(weights, 0.25)


def test_controls_are_the_same_whatever_the_base_and_keep_the_budget():
    found = {
        str(base): [
            control_counts(SolveConfig(budget=400, base=base), name, COUNTS, None)
            for name in ("natural", "uniform")
        ]
        for base in ("natural", "uniform", {"c3": 1.0})
    }
    natural, uniform = found["natural"]
    assert natural == {"c0": 280, "c1": 80, "c2": 24, "c3": 16}
    assert uniform == {"c0": 150, "c1": 150, "c2": 60, "c3": 40}
    assert all(pair == [natural, uniform] for pair in found.values())


def test_controls_of_a_budget_in_tokens_spend_as_many_tokens():
    tokens = {"c0": 10.0, "c1": 50.0, "c2": 100.0, "c3": 5.0}
    solve = SolveConfig(budget=5000, unit="tokens")
    for name in ("natural", "uniform"):
        counts = control_counts(solve, name, COUNTS, tokens)
        spent = sum(count * tokens[category] for category, count in counts.items())
        assert 4900 < spent <= 5000, name


def test_the_uniform_control_ignores_the_limits_of_the_mix_and_the_natural_one_keeps_them():
    solve = SolveConfig(budget=100, lower={"c3": 20.0}, upper={"c0": 50.0})
    assert set(control_counts(solve, "uniform", COUNTS, None).values()) == {25}
    natural = control_counts(solve, "natural", COUNTS, None)
    assert natural["c3"] == 20 and natural["c0"] == 50 and sum(natural.values()) == 100


def test_what_the_equal_mix_promises_does_not_depend_on_which_base_is_named_first():
    """A predictor at one base says of the other what the other says of the first, reversed."""
    gains = []
    for base in ("natural", "uniform"):
        solve = SolveConfig(budget=160, base=base)
        asked = mix_problem(solve, {"remove": matrix()}, COUNTS, None)
        predictor = MixPredictor(asked, mix_options(solve, is_believed=True))
        uniform = control_counts(solve, "uniform", COUNTS, None)
        natural = control_counts(solve, "natural", COUNTS, None)
        weights = dict.fromkeys(matrix().targets, 0.25)
        gains.append(predictor.gain([uniform], [natural], weights).value)
    assert gains[0] == pytest.approx(gains[1])


def test_a_mix_says_where_it_starts_and_how_far_from_what_was_measured():
    solve = SolveConfig(budget=160, base="uniform")
    (note,) = base_notes(solve, solved(solve), EQUAL, COUNTS)
    assert "equal shares (solve.base)" in note and "45% of its examples" in note
    natural = SolveConfig(budget=160)
    (note,) = base_notes(natural, solved(natural), EQUAL, COUNTS)
    assert "differs from the base mix in 45%" in note and "solve.base: uniform" in note
    assert (
        base_notes(natural, solved(natural), {k: float(v) for k, v in COUNTS.items()}, COUNTS) == ()
    )


def test_naming_the_default_base_repeats_nothing():
    def inputs(name: str, **solve: object) -> dict[str, object]:
        config = RunConfig.model_validate(
            {
                "run_dir": "runs/x", "sources": [{"path": "a.jsonl", "category": "a"}],
                "model": {"path": "builtin:tiny"}, "solve": {"budget": 10, **solve},
            }
        )  # fmt: skip
        stage = next(stage for stage in STAGES if stage.name == name)
        record: Any = SimpleNamespace(fingerprint="f", identity="r")
        return stage_inputs(stage, config, {other.name: record for other in STAGES})

    for name in ("influence", "solve"):
        assert inputs(name) == inputs(name, base="natural")
        assert inputs(name) != inputs(name, base="uniform")
    alike = [
        inputs("influence", base=base, importance="uniform") for base in ("natural", "uniform")
    ]
    assert alike[0] == alike[1]
