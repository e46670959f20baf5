"""What was promised for the arms beside what came, and the table of `instructmix verify`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from evaluation_world import full_summary, simulate
from mix_reference import problem
from report_builder import CATEGORIES, RunBuilder

from actors.cluster import Cluster
from actors.solver import measured_problem
from actors.stage import StageContext
from system import storage
from system.config import RunConfig
from system.config.load import load_config
from system.errors import ConfigError
from system.evaluation.evaluate import headline
from system.evaluation.prediction import ArmForecast
from system.evaluation.verification import describe_prediction, prediction_tables
from system.mix.question import mix_options
from system.progress import Progress
from system.report.view import RunView
from system.rundir import RunDir, StageRecord
from system.solve import MixOptions, MixPredictor, solve_mix
from system.solve.mix import ANSWERS, NATS
from system.stages import STAGE_FOLDERS

EFFECT = np.array([[2e-3, 5e-4], [-1e-3, 1e-3]])
ERROR = np.array([[2e-4, 1e-4], [3e-4, 1e-4]])
NATURAL = {"a": 50.0, "b": 50.0}
UNEVEN = {"natural": NATURAL, "uniform": {"a": 60.0, "b": 40.0}, "solved": {"a": 80.0, "b": 20.0}}
OPTIONS = MixOptions(objective="linear", budget=100.0, move=0.3)


def predictor() -> MixPredictor:
    names = {"categories": ("a", "b"), "targets": ("a", "b")}
    return MixPredictor(problem(EFFECT, [50.0, 50.0], se_TS=ERROR, **names), OPTIONS)


def forecast(unit: str, counts: Mapping[str, Mapping[str, float]]) -> ArmForecast:
    mixes = {arm: [of] * 3 for arm, of in {**UNEVEN, **counts}.items()}
    return ArmForecast(predictor=predictor(), counts=mixes, unit=unit)


def test_the_promise_of_the_solved_mix_is_its_own_expected_gain():
    for objective in ("linear", "concave", "robust"):
        options = MixOptions(objective=objective, budget=100.0, move=0.3, integer=True)
        effect_TS = EFFECT * [[3.0, 1.0], [1.0, 1.0]]
        asked = problem(
            effect_TS, [50.0, 50.0], se_TS=ERROR, effect_remove_TS=effect_TS * 1.2,
            se_remove_TS=ERROR * 1.5,
        )  # fmt: skip
        mix = solve_mix(asked, options)
        assert mix.moved > 0
        weights = {target.target: target.importance for target in mix.targets}
        base = [{item.category: item.base for item in mix.categories}]
        found = MixPredictor(asked, options).gain([mix.counts()], base, weights)
        assert found.value == pytest.approx(mix.expected_gain)
        assert found.se == pytest.approx(mix.expected_gain_se)
        first = mix.targets[0]
        alone = MixPredictor(asked, options).gain([mix.counts()], base, {first.target: 1.0})
        assert alone.value == pytest.approx(first.change)
        assert alone.se == pytest.approx(first.change_se)


def test_a_difference_of_two_mixes_by_hand():
    found = predictor().gain([UNEVEN["solved"]], [UNEVEN["uniform"]], {"a": 1.0})
    assert found.value == pytest.approx(20 * 2e-3 - 20 * 5e-4)
    assert found.se == pytest.approx(20 * np.hypot(2e-4, 1e-4))
    same = predictor().gain([UNEVEN["uniform"]], [UNEVEN["uniform"]], {"a": 0.5, "b": 0.5})
    assert (same.value, same.se) == (0.0, 0.0)


def test_several_counts_are_promised_the_mean_of_their_gains():
    opposite = [{"a": 70.0, "b": 30.0}, {"a": 30.0, "b": 70.0}]
    found = predictor().gain(opposite, [NATURAL], {"a": 1.0})
    assert found.value == pytest.approx(0.0)
    assert found.se == pytest.approx(0.0)
    alone = [predictor().gain([counts], [NATURAL], {"b": 1.0}).value for counts in opposite[:1]]
    assert alone == pytest.approx([20 * -1e-3 - 20 * 1e-3])


def performance(gains: dict[str, float]):
    found = simulate(np.random.default_rng(3), arms=tuple(gains), seed_sd=1e-3)
    for arm, gain in gains.items():
        found[arm] = {c: values + gain for c, values in found[arm].items()}
    return found


GAINS = {"natural": 0.0, "uniform": -0.3, "random": -0.6, "solved": 0.5, "solved-curriculum": 0.5}


def closed_loop() -> dict:
    more = {"random": {"a": 20.0, "b": 80.0}, "solved-curriculum": UNEVEN["solved"]}
    return full_summary(performance(GAINS), forecast=forecast(NATS, more))


def test_every_arm_has_its_promise_beside_its_outcome():
    summary = closed_loop()
    found = {(p["arm"], p["reference"]): p["overall"] for p in summary["predictions"]}
    assert list(found) == [
        ("uniform", "natural"), ("solved", "natural"), ("random", "natural"),
        ("solved-curriculum", "natural"), ("solved", "uniform"), ("solved", "random"),
    ]  # fmt: skip
    for (arm, reference), row in found.items():
        assert row["realised"] == pytest.approx(GAINS[arm] - GAINS[reference], abs=0.1)
        assert row["low"] < row["realised"] < row["high"]
        assert row["predicted_se"] > 0
    mean = 0.75 * (30 * 2e-3 - 30 * 5e-4) + 0.25 * (30 * -1e-3 - 30 * 1e-3)
    assert found["solved", "natural"]["predicted"] == pytest.approx(mean)
    assert found["random", "natural"]["predicted"] == pytest.approx(-mean)
    assert found["solved", "random"]["predicted"] == pytest.approx(2 * mean)
    assert found["solved-curriculum", "natural"]["predicted"] == pytest.approx(mean)
    assert summary["prediction"]["overall"] == found["solved", "natural"]


def test_the_solved_mix_is_compared_with_every_other_mix():
    rows = {
        (r["arm"], r["reference"]): r
        for r in closed_loop()["comparisons"]
        if r["category"] is None and r["weighting"] == "importance" and r["metric"] == "loss"
    }
    assert rows["solved", "uniform"]["value"] == pytest.approx(0.8, abs=0.1)
    assert rows["solved", "random"]["verdict"] == "better"
    assert ("solved-curriculum", "uniform") not in rows
    lines = headline(closed_loop())
    assert any(line.startswith("solved against uniform: +") for line in lines)
    assert any(line.startswith("solved against random: +") for line in lines)


def test_the_table_shows_arms_contrasts_and_targets():
    text = prediction_tables(closed_loop())
    for label in (
        "uniform - natural", "random - natural", "solved - natural", "solved-curriculum - natural",
        "solved - uniform", "solved - random",
    ):  # fmt: skip
        (line,) = [line for line in text.splitlines() if line.startswith(f"{label} ")]
        assert "+- 0.0" in line and "[" in line
    assert "natural is the reference: held-out loss " in text
    assert "trainings per arm: 3" in text
    assert "\noverall " in text and "realised per unit of predicted" in text


def test_without_a_natural_arm_the_solved_mix_is_still_judged_against_others():
    found = performance({"uniform": 0.0, "solved": 0.2})
    counts = {arm: [UNEVEN[arm]] for arm in ("uniform", "solved")}
    summary = full_summary(
        found, forecast=ArmForecast(predictor=predictor(), counts=counts, unit=NATS)
    )
    assert [(p["arm"], p["reference"]) for p in summary["predictions"]] == [("solved", "uniform")]
    assert summary["prediction"] is None
    assert "solved - uniform" in prediction_tables(summary)


def evaluated(tmp_path, summary: dict) -> str:
    run_dir = RunDir(str(tmp_path))
    storage.write_json(str(tmp_path / "eval" / "x" / "summary.json"), summary)
    record = StageRecord(
        stage="evaluate", fingerprint="x", inputs={}, counts={}, lines=(), seconds=1.0,
        outputs={"summary": "eval/x/summary.json"}, finished="2030-01-01T00:00:00+00:00",
        versions={},
    )  # fmt: skip
    run_dir.commit(STAGE_FOLDERS["evaluate"], record)
    return str(tmp_path)


def test_the_advice_names_the_true_reason_why_nothing_is_predicted(tmp_path):
    found = performance({"natural": 0.0, "solved": 0.2})
    no_answers = full_summary(found, forecast=forecast(ANSWERS, {}))
    with pytest.raises(ConfigError, match=r"raise evaluate\.accuracy_rows"):
        describe_prediction(evaluated(tmp_path / "answers", no_answers))
    alone = ArmForecast(predictor=predictor(), counts={"natural": [NATURAL]}, unit=NATS)
    no_arms = full_summary(performance({"natural": 0.0}), forecast=alone)
    with pytest.raises(ConfigError, match=r"evaluate\.arms"):
        describe_prediction(evaluated(tmp_path / "arms", no_arms))


def test_the_optimiser_s_question_can_be_asked_again_after_the_run(tmp_path):
    run = RunBuilder(categories=CATEGORIES[:6], directions=("add", "remove"))
    view = RunView.open(run.write(str(tmp_path / "run")).uri)
    config = RunConfig.model_validate(view.config)
    context = StageContext(
        config=config, run_dir=RunDir(str(tmp_path / "run")), attempt="", upstream=view.records,
        progress=Progress(is_terminal=False), cluster=Cluster(config.cluster),
    )  # fmt: skip
    asked, _ = measured_problem(context, config.solve)
    assert view.mix is not None and view.mix.moved > 0
    base = [{item.category: item.base for item in view.mix.categories}]
    weights = {target.target: target.importance for target in view.mix.targets}
    found = MixPredictor(asked, mix_options(config.solve, is_believed=True))
    promise = found.gain([view.mix.counts()], base, weights)
    assert promise.value == pytest.approx(view.mix.expected_gain)
    assert promise.se == pytest.approx(view.mix.expected_gain_se)


def test_the_shipped_configuration_closes_the_loop_with_two_settings():
    config = load_config(
        "configs/real_cpu.yaml",
        ["evaluate.arms=[natural,uniform,random,solved]", "evaluate.seeds=5"],
    )
    assert config.evaluate.arms == ("natural", "uniform", "random", "solved")
    assert config.evaluate.seeds == 5
