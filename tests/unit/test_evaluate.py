from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from evaluation_world import BASE_GAP, full_summary, loss_table, simulate
from scipy import stats

from system.config import RunConfig
from system.errors import ConfigError, DataError
from system.evaluation.ablation import ARMS, ablation_config, ablation_tables
from system.evaluation.contrast import contrast
from system.evaluation.evaluate import headline
from system.evaluation.tables import OUTCOMES, accuracy_table, performance_of
from system.intervals import wilson_interval

DIFFERENCE = {"solved": 1.0, "natural": -1.0}


def test_a_difference_by_hand():
    performance = {
        "natural": {"a": np.array([[0.0, 0.0], [0.0, 0.0]])},
        "solved": {"a": np.array([[1.0, 3.0], [2.0, 6.0]])},
    }
    found = contrast(performance, DIFFERENCE, {"a": 1.0}, 0.95)
    # d = [[1, 3], [2, 6]]: seed means 2, 4; example means 1.5, 4.5; mean 3; rest +-0.5.
    # MS_seed = 2 * var(2, 4) = 4, MS_example = 2 * var(1.5, 4.5) = 9, MS_rest = 4 * 0.25 / 1 = 1.
    assert found.value == 3.0
    assert found.se**2 == pytest.approx((4 + 9 - 1) / 4)
    assert found.se_seeds**2 == pytest.approx(4 / 4)
    assert found.se_heldout**2 == pytest.approx((9 - 1) / 4)
    t_seeds, t_heldout = stats.t.ppf(0.975, [1.0, 8**2 / (9**2 / 1 + 1**2 / 1)])
    half = np.sqrt(t_seeds**2 * 4 / 4 + t_heldout**2 * 8 / 4)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert found.verdict == "tie"


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, hits, runs = 0.03, 0, 600
    for _ in range(runs):
        performance = simulate(rng, gain=truth)
        found = contrast(performance, DIFFERENCE, {"a": 0.7, "b": 0.3}, 0.95)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / runs <= 0.999


def test_intervals_against_the_base_cover_although_the_base_has_no_seed():
    rng = np.random.default_rng(1)
    hits, runs = 0, 600
    for _ in range(runs):
        performance = simulate(rng, gain=0.2, seeds=4)
        found = contrast(performance, {"solved": 1.0, "base": -1.0}, {"a": 0.5, "b": 0.5}, 0.95)
        hits += found.low <= BASE_GAP + 0.2 <= found.high
    assert 0.93 <= hits / runs <= 0.999


def test_a_true_gain_is_found_and_none_is_a_tie_most_of_the_time():
    rng = np.random.default_rng(2)
    weights = {"a": 0.5, "b": 0.5}
    big = [contrast(simulate(rng, gain=0.3), DIFFERENCE, weights, 0.95) for _ in range(50)]
    none = [contrast(simulate(rng), DIFFERENCE, weights, 0.95).verdict for _ in range(200)]
    assert sum(found.verdict == "better" for found in big) >= 48
    assert none.count("tie") >= 184
    assert {contrast(simulate(rng, gain=-1.0), DIFFERENCE, weights, 0.95).verdict} == {"worse"}


def test_more_examples_do_not_hide_that_trainings_differ():
    rng = np.random.default_rng(3)
    found = contrast(
        simulate(rng, rows=20_000, seed_sd=0.1, interaction_sd=0.0), DIFFERENCE, {"a": 1.0}, 0.95
    )
    assert found.se > 0.02
    assert found.se_seeds == pytest.approx(found.se, rel=0.05)


def test_with_one_seed_the_missing_part_of_the_error_is_named_not_guessed():
    found = contrast(simulate(np.random.default_rng(4), seeds=1), DIFFERENCE, {"a": 1.0}, 0.95)
    assert found.se_seeds is None
    assert found.se == found.se_heldout > 0


def test_pairing_takes_out_what_arms_share():
    rng = np.random.default_rng(5)
    performance = simulate(rng, example_sd=5.0, interaction_sd=0.0, seed_sd=0.0)
    assert contrast(performance, DIFFERENCE, {"a": 1.0}, 0.95).se < 0.02


def test_identical_arms_are_a_tie_with_no_error():
    same = simulate(np.random.default_rng(6), arms=("natural",))["natural"]
    found = contrast({"natural": same, "solved": same}, DIFFERENCE, {"a": 1.0}, 0.95)
    assert (found.value, found.se, found.verdict) == (0.0, 0.0, "tie")


def test_arms_that_share_their_order_do_not_make_another_order_look_certain():
    """Orders of one and the same mix, as noisy as measured: a false verdict is as rare as said."""
    rng = np.random.default_rng(6)
    verdicts = []
    for _ in range(300):
        performance = simulate(rng, arms=("natural", "solved"), seeds=3, seed_sd=0.0)
        order = {arm: rng.normal(0, 0.02, (3, 1)) for arm in ("shuffled", "solved-curriculum")}
        shuffled = {c: of + order["shuffled"] for c, of in performance["natural"].items()}
        other = {c: of + order["solved-curriculum"] for c, of in performance["solved"].items()}
        arms = {"natural": shuffled, "solved": shuffled, "solved-curriculum": other}
        difference = {"solved-curriculum": 1.0, "natural": -1.0}
        verdicts.append(contrast(arms, difference, {"a": 1.0}, 0.95).verdict)
    assert verdicts.count("tie") / len(verdicts) > 0.93


def test_a_few_answers_that_all_agree_are_no_proof_of_equality():
    wrong = {"a": np.zeros((2, 6)), "b": np.zeros((2, 20))}
    found = contrast(
        {"natural": wrong, "solved": wrong}, DIFFERENCE, {"a": 0.5, "b": 0.5}, 0.95, is_binary=True
    )
    assert found.verdict == "tie"
    assert found.se == pytest.approx(0.5 * np.hypot(1 / 8, 1 / 22))
    assert found.low < -0.1 < 0.1 < found.high


def test_arms_with_different_seeds_cannot_be_paired():
    performance = simulate(np.random.default_rng(7))
    performance["solved"] = {c: of[:2] for c, of in performance["solved"].items()}
    with pytest.raises(ValueError, match="different numbers of seeds"):
        contrast(performance, DIFFERENCE, {"a": 1.0}, 0.95)


def test_a_long_table_becomes_arrays_over_seeds_and_common_examples():
    performance = simulate(np.random.default_rng(8), rows=5)
    table = loss_table(performance)
    order = np.random.default_rng(0).permutation(table.num_rows)
    found, left_out = performance_of(table.take(pa.array(order)), "loss")
    assert left_out == {}
    for arm, of in performance.items():
        for c, values in of.items():
            np.testing.assert_allclose(found[arm][c], values)
    found, left_out = performance_of(table.slice(1), "loss")
    assert left_out == {"a": 1}
    np.testing.assert_allclose(found["solved"]["a"], performance["solved"]["a"][:, 1:])


def test_the_summary_compares_every_arm_with_natural_and_with_base():
    performance = simulate(np.random.default_rng(9), gain=1.0)
    summary = full_summary(performance)
    pairs = {(r["arm"], r["reference"]) for r in summary["comparisons"]}
    assert pairs == {
        ("solved", "natural"), ("solved-curriculum", "natural"),
        ("natural", "base"), ("solved", "base"), ("solved-curriculum", "base"),
        ("solved-curriculum", "solved"),
    }  # fmt: skip
    overall = {
        (r["arm"], r["reference"], r["weighting"]): r
        for r in summary["comparisons"]
        if r["category"] is None
    }
    per_category = {
        r["category"]: r["value"]
        for r in summary["comparisons"]
        if r["arm"] == "solved" and r["reference"] == "natural" and r["category"]
    }
    assert overall["solved", "natural", "importance"]["value"] == pytest.approx(
        0.75 * per_category["a"] + 0.25 * per_category["b"]
    )
    assert overall["solved", "natural", "uniform"]["value"] == pytest.approx(
        0.5 * per_category["a"] + 0.5 * per_category["b"]
    )
    assert overall["solved", "natural", "importance"]["verdict"] == "better"
    assert any("solved against natural: +" in line for line in headline(summary))
    levels = {(r["arm"], r["category"]): r["value"] for r in summary["losses"]}
    assert levels["solved", "a"] == pytest.approx(-performance["solved"]["a"].mean())


def test_mix_and_order_are_judged_apart_where_all_four_arms_were_trained():
    arms = ("natural", "solved", "natural-curriculum", "solved-curriculum")
    performance = simulate(np.random.default_rng(10), arms=arms, seed_sd=0.0)
    for c in ("a", "b"):
        for arm, level in zip(arms, (0.0, 0.5, 0.2, 0.9), strict=True):
            performance[arm][c] = performance["natural"][c] + level
    factors = {
        r["factor"]: r["value"]
        for r in full_summary(performance)["factors"]
        if r["weighting"] == "uniform"
    }
    assert factors == pytest.approx({"mix": 0.6, "order": 0.3, "interaction": 0.2})
    del performance["natural-curriculum"]
    factors = {
        r["factor"]: (r["formula"], r["value"])
        for r in full_summary(performance)["factors"]
        if r["weighting"] == "uniform"
    }
    assert factors["mix"] == ("solved - natural", pytest.approx(0.5))
    assert factors["order"] == ("solved-curriculum - solved", pytest.approx(0.4))
    assert "interaction" not in factors


def test_accuracy_is_compared_on_the_same_questions():
    performance = simulate(np.random.default_rng(11))
    rows = [
        {"arm": arm, "seed": seed, "category": "a", "id": f"q{i}",
         "correct": i < (8 if arm == "solved" else 3)}
        for arm, seeds in (("base", 1), ("natural", 3), ("solved", 3), ("solved-curriculum", 3))
        for seed in range(seeds)
        for i in range(10)
    ]  # fmt: skip
    outcomes = pa.Table.from_pylist(rows, schema=OUTCOMES)
    summary = full_summary(performance, outcomes)
    solved = next(r for r in summary["accuracy"] if r["arm"] == "solved")
    assert (solved["value"], solved["rows"], solved["seeds"]) == (0.8, 10, 3)
    assert 0.4 < solved["low"] < 0.5
    gain = next(
        r
        for r in summary["comparisons"]
        if r["metric"] == "accuracy" and r["arm"] == "solved" and r["reference"] == "natural"
    )
    assert gain["value"] == pytest.approx(0.5)
    table = accuracy_table(outcomes, 0.95)
    assert table.num_rows == 10
    assert set(table["rows"].to_pylist()) == {10}


def test_too_few_common_rows_is_a_clear_error():
    performance = simulate(np.random.default_rng(12), rows=1)
    with pytest.raises(DataError, match=r"evaluate\.test_rows"):
        full_summary(performance)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (3, 7), (81, 263)])
def test_wilson_ends_are_where_the_score_test_just_accepts(hits: int, trials: int):
    found = wilson_interval(hits, trials, 0.95)
    z = stats.norm.ppf(0.975)
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(hits / trials - end) == pytest.approx(z * np.sqrt(end * (1 - end) / trials))
    assert found.low <= found.value <= found.high


def test_wilson_refuses_no_trials():
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(0, 0)


def test_the_ablation_table_holds_the_paired_differences_of_every_arm_and_order():
    performance = simulate(np.random.default_rng(9), gain=0.1, arms=ARMS, categories=("a", "b"))
    summary = full_summary(performance)
    text = ablation_tables(summary)
    natural, rest = text.split("Order alone")
    for arm in ARMS[1:]:
        assert arm in natural
        for row in summary["comparisons"]:
            if row["arm"] == arm and row["reference"] == "natural" and row["category"]:
                assert f"{row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]" in natural
    expected = contrast(performance, {"solved-reversed": 1.0, "solved": -1.0}, {"b": 1.0}, 0.95)
    assert f"{expected.value:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]" in rest
    factors = {row["factor"] for row in summary["factors"]}
    assert factors == {"mix", "order", "reversed order", "interaction"}


def test_an_ablation_of_one_seed_is_refused():
    config = RunConfig.model_validate(
        {"run_dir": "r", "sources": [{"path": "x"}], "model": {"path": "builtin:tiny"},
         "solve": {"budget": 8}}
    )  # fmt: skip
    assert ablation_config(config, 4).evaluate.arms == ARMS
    assert ablation_config(config, 4).evaluate.seeds == 4
    with pytest.raises(ConfigError, match="two seeds"):
        ablation_config(config, 1)


def test_importance_of_what_has_no_test_rows_is_said_aloud():
    performance = simulate(np.random.default_rng(13))
    alone = full_summary(performance, importance={"benchmark": 2.0})
    assert alone["importance"] == {"a": 0.5, "b": 0.5}
    assert "(benchmark) have 100% of solve.importance" in alone["importance_note"]
    assert "weights all categories equally" in alone["importance_note"]
    assert headline(alone)[0] == alone["importance_note"]
    beside = full_summary(performance, importance={"benchmark": 1.0, "a": 3.0, "b": 0.0})
    assert beside["importance"] == {"a": 1.0, "b": 0.0}
    assert "(benchmark) have 25% of solve.importance" in beside["importance_note"]
    assert full_summary(performance)["importance_note"] == ""
