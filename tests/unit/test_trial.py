"""Which design `auto` goes on with."""

from dataclasses import asdict, replace

import pytest
from influence_world import World
from report_builder import RunBuilder

from system import storage
from system.auto.rounds import Round, reason_to_stop
from system.auto.trial import Trial, cheapest, describe_choice, typical_error
from system.config import InfluenceConfig
from system.influence.estimate.matrix import estimate_effects
from system.report.influence_section import influence_section
from system.report.view import RunView

TRIAL = Trial(
    design="branch", precision=0.01, token_equivalents=2e6, trained_tokens=1000, tuner_hours=1.0
)


def test_the_price_of_an_error_decides_not_its_size():
    """Twice the error at a fifth of the cost is the cheaper design."""
    rough = replace(TRIAL, design="random-design", precision=0.02, token_equivalents=4e5)
    assert cheapest([TRIAL, rough]) is rough
    assert cheapest([TRIAL, replace(rough, token_equivalents=6e5)]) is TRIAL
    assert cheapest([TRIAL, replace(TRIAL, design="retrain")]) is TRIAL, "ties go to the first"


def test_the_choice_is_said_with_what_the_others_would_cost():
    worse = replace(TRIAL, design="retrain", precision=0.02)
    text = describe_choice([worse, TRIAL], "nats")
    assert text.startswith("the design is branch (retrain: typical error 0.0200 nats for 2.00 M")
    assert "4.0 times the price" in text and text.count("times the price") == 1
    assert "times" not in describe_choice([replace(TRIAL, precision=0.0), worse], "answers")


def test_the_error_is_that_of_a_dose_in_the_worse_direction():
    quiet = estimate_effects(World().measure(3)).matrix
    loud = estimate_effects(World(run_noise=0.1).measure(3)).matrix
    assert typical_error({"add": quiet, "remove": loud}) == typical_error({"add": loud})
    assert typical_error({"add": loud}) > 2 * typical_error({"add": quiet})


def test_the_report_says_what_was_tried(tmp_path):
    run = RunBuilder(until="influence").write(str(tmp_path / "run"))
    view = RunView.open(run.uri)
    assert "Several designs were tried" not in str(influence_section(view))
    uri = run.output_uri(view.records["influence"], "summary")
    trials = [asdict(TRIAL), asdict(replace(TRIAL, design="random-design", precision=0.02))]
    storage.write_json(uri, storage.read_json(uri) | {"trial": trials})
    section = str(influence_section(RunView.open(run.uri)))
    assert "Several designs were tried for one round: the design is branch" in section
    assert "4.0 times the price" in section


@pytest.mark.parametrize("designs", [[], ["branch", "branch"], ["gradient"]])
def test_designs_are_different_ones_that_train(designs):
    with pytest.raises(ValueError, match="designs"):
        InfluenceConfig.model_validate({"estimator": "auto", "auto": {"designs": designs}})


def test_budgets_count_designs_that_were_left_once_not_every_round():
    last = Round(
        replications=2, trained_tokens=1500, tuner_hours=3.0, precision=0.01, gain=0.02,
        regret=0.01, regret_error=0.0, undecided={},
    )  # fmt: skip
    auto = InfluenceConfig(estimator="auto").auto
    tokens = auto.model_copy(update={"max_tokens": 2000})
    assert reason_to_stop([last], tokens, spent_tokens=500) is None, "a round takes 500"
    assert "max_tokens" in (reason_to_stop([last], tokens) or ""), "a round takes 750"
    hours = auto.model_copy(update={"max_tuner_hours": 4.0})
    assert reason_to_stop([last], hours, spent_hours=1.0) is None
    assert "max_tuner_hours" in (reason_to_stop([last], hours) or "")
