"""The earlier influence result that `influence.append` adds to: choice, checks and files.

    record.json of the stage  ──> appends_to    ──> name of an attempt, part of the new fingerprint
    files of that attempt     ──> EarlierResult ──> its design, schedules, held-out rows, scores

An appended result is itself a finished result, so appends may follow each other.  Checkpoints that
an attempt does not have are looked up in the attempt before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pyarrow as pa

from system import storage
from system.config import InfluenceConfig
from system.data.corpus import Corpus
from system.errors import ConfigError
from system.influence.append.append import (
    CategoryStatus,
    category_status,
    earlier_run,
    measured_ids,
)
from system.influence.design.design import Design, InterventionRun
from system.rundir import RunDir, StageRecord, describe_change, fingerprint, flatten
from system.stages import STAGE_FOLDERS
from system.training.plan import TrainPlan, read_plan

APPENDS_TO = "append.to"
"""Name of the stage input that contains the name of the earlier attempt."""
_FOLDER = STAGE_FOLDERS["influence"]
_FREE = {
    "influence.confidence", "influence.gamma_floor", "influence.gamma_max_width",
    "influence.min_agreement", APPENDS_TO,
}  # fmt: skip
"""Inputs that may differ from the earlier result: they change only the analysis."""


def appends_to(run_dir: RunDir, inputs: Mapping[str, Any], model_path: str) -> dict[str, str]:
    """The result that an influence stage appends to, as one more input of the stage.

    If the committed result, or one before it, was made from the same inputs, its choice is kept.
    Otherwise the stage appends to the committed result.  Without a committed result the answer is
    empty, and everything is measured.

    Args:
        run_dir: the run directory.
        inputs: all other inputs of the stage.
        model_path: `model.path`.

    Raises:
        ConfigError: the committed result was measured with other settings.
    """
    committed = run_dir.read_record(_FOLDER)
    record, own_fingerprint = committed, fingerprint(inputs)
    while record is not None:
        own_inputs = {k: v for k, v in record.inputs.items() if k != APPENDS_TO}
        if fingerprint(own_inputs) == own_fingerprint:
            return _input(record.inputs.get(APPENDS_TO))
        before = record.inputs.get(APPENDS_TO)
        record = None if before is None else run_dir.read_attempt_record(_FOLDER, before)
    if committed is None:
        return {}
    _check_same_way(run_dir, committed, inputs, model_path)
    return _input(committed.fingerprint)


def _input(name: str | None) -> dict[str, str]:
    return {} if name is None else {APPENDS_TO: name}


def _check_same_way(
    run_dir: RunDir, record: StageRecord, inputs: Mapping[str, Any], model_path: str
) -> None:
    """Checks that new runs and those of the earlier result may be combined in one matrix."""
    defaults = flatten("influence", InfluenceConfig().model_dump(mode="json"))
    before = _what_measures({**defaults, **record.inputs})
    now = _what_measures({**defaults, **inputs})
    changes = [describe_change(before, now)] if before != now else []
    folder, name = STAGE_FOLDERS["model"], "after.model"
    if record.inputs[name] != inputs[name]:
        models = [
            run_dir.read_attempt_record(folder, value[name]) for value in (record.inputs, inputs)
        ]
        files = [_what_measures({} if model is None else model.inputs) for model in models]
        if model_path.startswith("builtin:"):
            changes.append(f"{model_path} is built from the corpus, which changed")
        elif not all(files) or files[0] != files[1]:
            changes.append(f"the model: {describe_change(*files)}")
    if changes:
        raise ConfigError(
            "influence.append: expected the settings with which the earlier result "
            f"{_FOLDER}/{record.fingerprint} was measured, found changes ({'; '.join(changes)}), "
            "so new runs cannot be compared with the earlier ones. Undo the change, or set "
            "influence.append to false to measure all categories again."
        )


def _what_measures(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in inputs.items()
        if not name.startswith(("after.", "solve.importance")) and name not in _FREE
    }


class EarlierResult:
    """The files of a finished influence attempt.

    Args:
        attempts_uri: directory of all attempts of the stage.
        name: of the attempt.
    """

    def __init__(self, attempts_uri: str, name: str) -> None:
        self._attempts_uri = attempts_uri
        self.name = name
        self.uri = storage.join(attempts_uri, name)
        uri = storage.join(self.uri, "design.json")
        if not storage.is_whole(uri):
            raise ConfigError(
                f"influence.append: expected the earlier result at {self.uri}, found no "
                "design.json there. Set influence.append to false to measure all categories again."
            )
        self.design = Design.from_json(storage.read_json(uri), uri)

    @cached_property
    def before(self) -> EarlierResult | None:
        """The result that this one was appended to, if any."""
        append = self.design.append
        return None if append is None else EarlierResult(self._attempts_uri, append.earlier)

    def heldout(self) -> pa.Table:
        """Its held-out rows; their category is the name of the target."""
        return storage.read_table(storage.join(self.uri, "heldout.arrow"))

    def plans(self, replication: int) -> dict[str, TrainPlan]:
        """Its schedules of a replication: `main`, and if they exist `warm` and `append`."""
        record = self.design.replications[replication]
        kinds = {"main": True, "warm": record.warm_sha256, "append": record.append_sha256}
        folder = storage.join(self.uri, "plans")
        return {
            kind: read_plan(storage.join(folder, f"r{replication:02d}-{kind}.arrow"))
            for kind, is_there in kinds.items()
            if is_there
        }

    def category_status(self, corpus: Corpus) -> CategoryStatus:
        """Which of its categories are still valid for a corpus.

        Raises:
            DataError: none is.
        """
        plans = [
            plan
            for replication in self.design.replications
            for plan in self.plans(replication.index).values()
        ]
        return category_status(
            self.design, measured_ids(self.design, plans, self.heldout()), corpus
        )

    def scores(self, run: InterventionRun) -> pa.Table:
        """The scores of one of its runs."""
        return storage.read_table(storage.join(self.uri, "scores", f"{run.name}.parquet"))

    def training(self, run: InterventionRun) -> dict[str, Any]:
        """Statistics of the training of one of its runs."""
        return storage.read_json(storage.join(self.uri, "units", f"{run.name}.json"))

    def checkpoint(self, run: InterventionRun) -> str | None:
        """URI of the checkpoint of one of its runs (`influence.keep_checkpoints`), if it exists."""
        uri = storage.join(self.uri, "checkpoints", run.name)
        if storage.exists(uri):
            return uri
        before = self.before
        known = None if before is None else earlier_run(self.design, before.design, run)
        return None if before is None or known is None else before.checkpoint(known)
