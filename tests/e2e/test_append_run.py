"""A category comes after the influence stage is done: one more run, and the mix says so."""

import json
import re
from pathlib import Path

import pytest
from influence_corpus import TASKS, build_inputs
from ingest_builders import write_lines
from small_job import run_job

from system.config import RunConfig, SourceConfig
from system.examples.planted import planted_world

# Six commands, each with a Ray of its own; their parts are shown by the tests of the parts.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
FOURTH = "place"


def test_a_run_appends_to_the_result_of_its_run_directory(tmp_path: Path) -> None:
    config = build_inputs(tmp_path)
    settings = {"append": True, "keep_checkpoints": True, "replications": 1}
    influence = config.influence.model_copy(update=settings)
    first = write(tmp_path, config.model_copy(update={"influence": influence}))
    result = run_job("run", str(first), "--until", "solve")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    earlier = json.loads((run / "influence/record.json").read_text())["fingerprint"]
    assert json.loads((run / "mix/mix.json").read_text())["appended"] == []

    (task,) = [task for task in planted_world(0).tasks if task.name == FOURTH]
    write_lines(tmp_path / "data" / f"{FOURTH}.jsonl", planted_world(0).rows(task, 160))
    sources = (*config.sources, SourceConfig(path=f"{FOURTH}.jsonl", category=FOURTH))
    config = config.model_copy(update={"influence": influence, "sources": sources})
    second = write(tmp_path, config)
    result = run_job("run", str(second), "--until", "tag")
    assert result.returncode == 0, result.stderr
    result = run_job("check", str(second), "--no-probe")
    assert f"append to influence/{earlier}: {FOURTH}" in result.stdout, result.stderr
    assert re.search(r"influence +1 training on up to", result.stdout), result.stdout
    result = run_job("run", str(second), "--until", "solve")
    assert result.returncode == 0, result.stderr
    record = json.loads((run / "influence/record.json").read_text())
    assert record["inputs"]["append.to"] == earlier
    line = f"appended to influence/{earlier}: {FOURTH}; 1 training, "
    assert any(item.startswith(line) for item in record["lines"]), record["lines"]
    mix = json.loads((run / "mix/mix.json").read_text())
    assert mix["appended"] == [FOURTH] and any("were appended" in note for note in mix["notes"])
    assert {item["category"] for item in mix["categories"]} == {*TASKS, FOURTH}
    result = run_job("run", str(second), "--until", "solve")
    assert "influence: already finished" in result.stdout + result.stderr
    changed = run_job("check", str(second), "--no-probe", "--set", "influence.dose_rows=16")
    assert changed.returncode == 2 and "influence.dose_rows 32 -> 16" in changed.stderr


def write(folder: Path, config: RunConfig) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path
