"""Which finished result an append adds to, and when it may not."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from system.config import InfluenceConfig
from system.errors import ConfigError
from system.influence.append.earlier import APPENDS_TO, appends_to
from system.rundir import RunDir, StageRecord, fingerprint


def record(inputs: dict[str, object]) -> StageRecord:
    return StageRecord(
        stage="influence", fingerprint=fingerprint(inputs), inputs=inputs, outputs={}, counts={},
        lines=(), seconds=0.0, finished="", versions={},
    )  # fmt: skip


def influence_inputs(tag: str = "1", model: str = "m", **changed: object) -> dict[str, object]:
    values = {"stage": "influence", "revision": 3, "influence.learning_rate": 1e-3, "seed": 0}
    return {**values, "after.tag": tag, "after.model": model, **changed}


def test_what_is_appended_to_is_settled_by_the_record_and_stays_settled(tmp_path):
    run_dir = RunDir(str(tmp_path))
    first = influence_inputs()
    assert appends_to(run_dir, first, "some/model") == {}, "nothing there: all is measured"
    run_dir.commit("influence", record(first))
    assert appends_to(run_dir, first, "some/model") == {}, "it is the result"
    second = influence_inputs(tag="2")
    found = appends_to(run_dir, second, "some/model")
    assert found == {APPENDS_TO: fingerprint(first)}
    run_dir.commit("influence", record({**second, **found}))
    assert appends_to(run_dir, second, "some/model") == found, "the finished one stays itself"
    assert appends_to(run_dir, first, "some/model") == {}, "and so does the one before"
    wider = influence_inputs(tag="2", **{"influence.confidence": 0.9})
    third = appends_to(run_dir, wider, "some/model")
    assert third == {APPENDS_TO: fingerprint({**second, **found})}


@pytest.mark.parametrize(
    "changed", [{"influence.learning_rate": 2e-3}, {"seed": 1}, {"influence.dose_rows": 64}]
)
def test_runs_of_other_settings_are_not_put_together(tmp_path, changed):
    run_dir = RunDir(str(tmp_path))
    run_dir.commit("influence", record(influence_inputs()))
    (name,) = changed
    with pytest.raises(ConfigError, match=rf"{name} .*influence.append to false"):
        appends_to(run_dir, influence_inputs(tag="2", **changed), "some/model")


def test_another_model_is_refused_and_the_same_files_are_not(tmp_path):
    run_dir = RunDir(str(tmp_path))

    def model(corpus: str, stamp: str) -> str:
        inputs = {"stage": "model", "file.weights": stamp, "after.ingest": corpus}
        run_dir.commit("model", replace(record(inputs), stage="model"))
        return fingerprint(inputs)

    run_dir.commit("influence", record(influence_inputs(model=model("1", "a"))))
    same = influence_inputs(tag="2", model=model("2", "a"))
    assert appends_to(run_dir, same, "some/model")
    with pytest.raises(ConfigError, match="built from the corpus"):
        appends_to(run_dir, same, "builtin:tiny")
    with pytest.raises(ConfigError, match=r"the model: file\.weights"):
        appends_to(run_dir, influence_inputs(tag="2", model=model("2", "b")), "some/model")


@pytest.mark.parametrize("estimator", ["random-design", "gradient", "auto"])
def test_estimators_without_single_runs_say_that_they_cannot_append(estimator):
    with pytest.raises(ValidationError, match="append needs estimator retrain or branch"):
        InfluenceConfig(estimator=estimator, append=True)
