import pytest
from report_builder import CATEGORIES, RunBuilder

from system.report.verdict import give_verdict, headline_comparison
from system.report.view import RunView


def verdict_of(tmp_path, **choices):
    settings = {"categories": CATEGORIES[:8], **choices}
    view = RunView.open(RunBuilder(**settings).write(str(tmp_path / "run")).uri)
    return view, give_verdict(view)


def answer(verdict, question):
    return " ".join(next(p.answer for p in verdict.points if p.question.startswith(question)))


def test_a_kept_promise_is_called_better_with_its_interval(tmp_path):
    view, verdict = verdict_of(tmp_path, kept=1.0)
    row = headline_comparison(view.evaluation)
    assert row["low"] > 0
    assert verdict.outcome == "better"
    assert f"by {row['value']:.4f} nats" in verdict.headline
    assert f"+{row['low']:.4f} to +{row['high']:.4f}" in verdict.headline


def test_a_broken_promise_is_called_worse(tmp_path):
    view, verdict = verdict_of(tmp_path, kept=-1.0)
    assert headline_comparison(view.evaluation)["high"] < 0
    assert verdict.outcome == "worse"
    assert "is worse than the natural mix" in verdict.headline
    assert "The prediction was too high." in answer(verdict, "Was the prediction right")


def test_a_promise_with_a_wide_error_is_not_called_broken(tmp_path):
    view, _ = verdict_of(tmp_path, kept=-1.0)
    view.evaluation.summary["prediction"]["overall"]["predicted_se"] = 1.0
    text = answer(give_verdict(view), "Was the prediction right")
    assert "within the errors of both numbers" in text


def test_a_tie_is_called_a_tie(tmp_path):
    view, verdict = verdict_of(tmp_path, kept=0.0, arms=("natural", "solved"))
    row = headline_comparison(view.evaluation)
    assert row["low"] < 0 < row["high"]
    assert verdict.outcome == "tie"
    assert "tied" in verdict.headline and "contains zero" in verdict.headline


def test_one_training_per_arm_is_said_aloud(tmp_path):
    _, verdict = verdict_of(tmp_path, seeds=1)
    assert "Each arm was trained once" in answer(verdict, "What was gained")


def test_one_replication_leaves_the_base_mix_and_says_why(tmp_path):
    view, verdict = verdict_of(tmp_path, replications=1)
    assert view.mix.moved == 0
    changes = answer(verdict, "What does the mix change")
    assert changes.startswith("Nothing: the mix is the base mix.")
    assert "one replication" in changes
    assert answer(verdict, "Is the effect matrix reproducible").startswith("Unknown")


def test_the_report_says_what_agreement_of_first_order_effects_is_worth(tmp_path):
    view, verdict = verdict_of(tmp_path)
    assert "first-order" not in answer(verdict, "Is the effect matrix reproducible").lower()
    view.influence.summary["estimator"] = "gradient"
    text = answer(give_verdict(view), "Is the effect matrix reproducible")
    assert "First-order estimates are predictions, not measurements" in text


def test_worth_that_could_not_be_compared_is_reported(tmp_path):
    view, _ = verdict_of(tmp_path)
    for part in view.influence.summary["directions"].values():
        part["agreement_heldout_split"]["worth"] = None
    text = answer(give_verdict(view), "Is the effect matrix reproducible")
    assert "could not be checked whether a new measurement" in text


def test_the_order_is_judged_only_where_it_was_measured(tmp_path):
    _, verdict = verdict_of(tmp_path, arms=("natural", "solved"))
    assert answer(verdict, "Does the order matter").startswith("Not measured")


def test_an_evaluation_without_a_natural_arm_is_no_verdict(tmp_path):
    _, verdict = verdict_of(tmp_path, arms=("solved",), seeds=2)
    assert verdict.outcome == "open"
    assert "gain of the solved mix is not known" in verdict.headline


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ({"value": 0.78, "low": 0.6}, "Mostly yes"),
        ({"value": 0.45, "low": 0.2}, "Partly"),
        ({"value": 0.2, "low": 0.05}, "Hardly for single pairs"),
        ({"value": 0.5, "low": -0.1}, "Not shown for single pairs"),
        ({"value": None, "low": None}, "Unknown"),
    ],
)
def test_agreement_is_read_from_the_correlation_and_its_lower_end(rank, words):
    from system.report.verdict import _belief

    assert _belief(rank).startswith(words)
