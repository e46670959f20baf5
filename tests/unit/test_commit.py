"""The driver commits what is written, and repeats a stage when anything that decides it changes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from actors.cluster import Cluster
from actors.pipeline import STAGES, Stage, _execute, stage_inputs
from actors.stage import StageContext, StageResult
from system import storage
from system.config import RunConfig
from system.config.load import parse_config
from system.errors import StageError
from system.progress import Progress
from system.rundir import RunDir, StageRecord, fingerprint


def run_config(run_dir: Path | str = "r") -> RunConfig:
    value = {
        "run_dir": str(run_dir),
        "sources": [{"path": "rows.jsonl"}],
        "model": {"path": "builtin:tiny"},
        "solve": {"budget": 10},
    }
    return parse_config(value, "run.yaml")


def record(name: str = "aa", **changes: Any) -> StageRecord:
    values: dict[str, Any] = {
        "stage": "s", "fingerprint": name, "inputs": {}, "outputs": {}, "counts": {}, "lines": (),
        "seconds": 0.0, "finished": "", "versions": {},
    }  # fmt: skip
    return StageRecord(**(values | changes))


def run_stage(folder: Path, monkeypatch, *, writes: bool) -> RunDir:
    """The solve stage with a module of its own, which says that it wrote `mix.json`."""

    def run(context: StageContext) -> StageResult:
        assert context.run_dir.read_record("mix") is None, "nothing is committed before the end"
        if writes:
            storage.write_bytes(storage.join(context.attempt, "mix.json"), b"{}")
        return StageResult(outputs={"mix": "mix.json"}, counts={}, lines=())

    module = ModuleType("stage_of_this_test")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    stage = Stage(name="solve", module=module.__name__, reads=("solve",))
    inputs = {"stage": "solve", "solve.budget": 10}
    run_dir = RunDir(str(folder))
    context = StageContext(
        config=run_config(folder),
        run_dir=run_dir,
        attempt=run_dir.attempt_uri("mix", fingerprint(inputs)),
        upstream={},
        progress=Progress(),
        cluster=cast(Cluster, None),
    )
    _execute(stage, context, inputs)
    return run_dir


def test_a_stage_that_wrote_its_outputs_is_committed(tmp_path, monkeypatch):
    run_dir = run_stage(tmp_path, monkeypatch, writes=True)
    committed = run_dir.read_record("mix")
    assert committed is not None and storage.exists(run_dir.output_uri(committed, "mix"))


def test_a_stage_is_not_committed_while_an_output_is_missing(tmp_path, monkeypatch):
    with pytest.raises(StageError, match=r"expected the output .*mix\.json, found nothing"):
        run_stage(tmp_path, monkeypatch, writes=False)
    assert RunDir(str(tmp_path)).read_record("mix") is None
    assert not list(tmp_path.rglob("record.json"))


def test_everything_that_decides_a_stage_is_in_its_fingerprint():
    stage = next(stage for stage in STAGES if stage.name == "curriculum")
    stage = replace(stage, identity=lambda config: {"rows.jsonl": "7 bytes"})
    records = {name: record() for name in stage.after}
    config = run_config()
    known = fingerprint(stage_inputs(stage, config, records))
    assert known == fingerprint(stage_inputs(stage, config, dict(records)))
    others = {
        "files": stage_inputs(replace(stage, identity=lambda c: {"f": "8 bytes"}), config, records),
        "code": stage_inputs(replace(stage, revision=stage.revision + 1), config, records),
        "seed": stage_inputs(stage, config.model_copy(update={"seed": 7}), records),
        "name": stage_inputs(replace(stage, name="select"), config, records),
    }
    for name in stage.after:
        others[name] = stage_inputs(stage, config, records | {name: record("bb")})
    assert len({known, *(fingerprint(inputs) for inputs in others.values())}) == 1 + len(others)


def test_a_stage_whose_inputs_came_out_the_same_is_not_repeated():
    """Another fingerprint with the same result: later stages see the result."""
    stage = next(stage for stage in STAGES if stage.name == "curriculum")
    first, second = (
        stage_inputs(stage, run_config(), {name: record(key, result="r") for name in stage.after})
        for key in ("aa", "bb")
    )
    assert fingerprint(first) == fingerprint(second)
