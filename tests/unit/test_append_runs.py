"""The runs of an append with real trainings and losses, in this process: no Ray, no engine."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from append_corpus import FOURTH, Grown, source
from influence_corpus import TASKS

from actors.influence.analysis import analyse
from actors.influence.appender import AppendRunner
from actors.influence.designer import draw_design
from actors.influence.influencer import _trainings
from actors.influence.intervention_runner import InterventionRunner
from actors.stage import StageContext
from system import storage
from system.influence.append.append_summary import append_summary
from system.influence.design.design import Design
from system.influence.design.interventions import active_rows
from system.influence.measure.ledger import Ledger
from system.influence.measure.proxy import ProxyModel
from system.models.base import load_model
from system.scoring.score import score_reference

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Ends the driver as a signal would."""


class Here:
    """Trains and scores with what the actors hold, one run after the other."""

    left = 1_000
    """Scorings before the driver dies."""

    def _drain(self: Any, ledger: Ledger, bar: Any) -> None:
        proxy = ProxyModel(
            self.context.input("model", "model"), device="cpu", trust_remote_code=False
        )
        while not ledger.is_done:
            run = ledger.next_to_score()
            if run is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
                start = time.perf_counter()
                model = load_model(self._checkpoint(run))
                scored = score_reference(model, self._scored_on(run))
                self._keep_scores(run, scored, time.perf_counter() - start)
                ledger.scored(run)
                continue
            run = ledger.next_to_train()
            assert run is not None
            branches = self.design.estimator == "branch" and run.kind != "warm"
            storage.delete(self._file("units", run, ".json"))
            plan = self._plan(run)
            start = self._warm_uri(run) if branches else None
            active = active_rows(plan, run, self.design)
            stats = proxy.tune(plan, active, self._settings(run), start)
            proxy.save(self._file("checkpoints", run))
            written = self._training_stats(run, asdict(stats))
            storage.write_json(self._file("units", run, ".json"), written)
            ledger.trained(run)


class MeasuringHere(Here, InterventionRunner):
    """All runs of a design."""


class AppendingHere(Here, AppendRunner):
    """The runs of an appended one."""


class Trained(Grown):
    """Two replications of really trained runs, their checkpoints kept."""

    def make_up(self, context: StageContext, design: Design) -> None:
        runs = MeasuringHere if context.appends_to is None else AppendingHere
        runs(context, design).run()

    def keeping(self, keep: bool) -> None:
        influence = self.config.influence.model_copy(update={"keep_checkpoints": keep})
        self.config = self.config.model_copy(update={"influence": influence})


@pytest.fixture(scope="module", params=["retrain", "branch"])
def trained(request, tmp_path_factory) -> Trained:
    torch.set_num_threads(1)
    sizes = {"rows_per_category": 16, "dose_rows": 8, "heldout_rows": 8}
    path = tmp_path_factory.mktemp(request.param)
    run = Trained(path, estimator=request.param, keep_checkpoints=True, **sizes)
    run.prepare(*map(source, (*TASKS, FOURTH)))
    return run


def effects(run: Trained, context: StageContext) -> np.ndarray:
    design = Design.from_json(
        storage.read_json(storage.join(context.attempt, "design.json")), "design"
    )
    return analyse(context, design).largest.estimates["examples"]["remove"].matrix.effect_TS


def summary(context: StageContext) -> dict[str, Any]:
    design = Design.from_json(
        storage.read_json(storage.join(context.attempt, "design.json")), "design"
    )
    found = append_summary(design, _trainings(context, design))
    assert found is not None
    return found


def test_kept_checkpoints_repeats_and_a_killed_driver_give_the_same_bits(trained: Trained):
    trained.keeping(True)
    kept = trained.measure()
    uri = trained.earlier().uri.rpartition("/")[0]
    whole = replace(trained.context(storage.join(uri, kept)), appends_to=trained.first)
    assert (summary(whole)["trainings"], summary(whole)["repeated"]) == (2, 0)
    own = {path.name for path in Path(whole.attempt, "checkpoints").iterdir()}
    assert own == {"r00-append-002", "r01-append-002"}

    trained.keeping(False)
    shutil.move(storage.join(trained.earlier().uri, "checkpoints"), storage.join(uri, "aside"))
    stopped = replace(whole, attempt=storage.join(uri, "stopped"), config=trained.config)
    storage.delete(whole.shared_uri)  # or their scores would be found there
    design = design_like(whole, stopped)
    first = AppendingHere(stopped, design)
    first.left = 3
    with pytest.raises(Killed):
        first.run()
    scored = {path: path.stat().st_mtime_ns for path in Path(stopped.attempt, "scores").iterdir()}
    assert len(scored) == 3
    AppendingHere(stopped, design).run()
    for path, stamp in scored.items():
        assert path.stat().st_mtime_ns == stamp
    found, warm = summary(stopped), trained.config.influence.estimator == "branch"
    assert (found["trainings"], found["repeated"]) == (2 * (5 + warm), 2 * (4 + warm))
    assert found["repeated_otherwise"] == 0
    np.testing.assert_array_equal(effects(trained, whole), effects(trained, stopped))
    assert np.ptp(effects(trained, whole)[:, 2]) > 0
    shutil.move(storage.join(uri, "aside"), storage.join(trained.earlier().uri, "checkpoints"))


def design_like(whole: StageContext, other: StageContext) -> Design:
    """The drawn files of one attempt in another."""
    for name in ("plans", "design.json", "heldout.arrow"):
        source_path, target = Path(whole.attempt, name), Path(other.attempt, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source_path.is_dir() else shutil.copy)(source_path, target)
    return draw_design(other)
