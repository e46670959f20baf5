"""The whole job, from raw files to the report, on a real Ray, vLLM, HiGHS and Ray Train."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from disturbance import started, wait_until
from small_job import WholeRun, job_config, run_job

from system import storage
from system.config.load import load_config
from system.rundir import RunDir
from system.stages import STAGE_FOLDERS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


@pytest.fixture
def config(whole_run: WholeRun) -> Path:
    return whole_run.config


@pytest.fixture
def run_dir(whole_run: WholeRun) -> Path:
    return whole_run.run_dir


def test_every_stage_left_its_record(run_dir: Path) -> None:
    for name, folder in STAGE_FOLDERS.items():
        record = RunDir(str(run_dir)).read_record(folder)
        assert record is not None, name
        assert record.versions["ray"]


def test_every_row_read_is_accounted_for(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "corpus/manifest.json").read_text())
    kept, rejected = manifest["kept"], sum(manifest["rejected"].values())
    assert manifest["read"] == kept + manifest["duplicates"] + rejected
    assert manifest["rejected"] == {"bad-json": 1}
    assert kept == sum(shard["rows"] for shard in manifest["shards"])


def test_rows_without_category_got_one(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "tags/manifest.json").read_text())
    assert manifest["categories"] == ["addition", "chat", "counting", "spelling"]
    assert all(shard["category"] for shard in manifest["shards"])
    accuracy = json.loads((run_dir / "tags/accuracy.json").read_text())
    assert 0 <= accuracy["accuracy"]["value"] <= 1


def test_the_matrix_has_every_pair_with_errors(run_dir: Path) -> None:
    rows = pq.read_table(run_dir / "influence/matrix.parquet").to_pylist()
    rows = [row for row in rows if row["unit"] == "examples"]
    assert len(rows) == (4 + 1) * 4, "the target of its own has a row and no column"
    assert all(row["effect_se"] > 0 for row in rows)
    assert {row["gamma"] for row in rows if row["target"] == row["source"]} <= {1.0, None}
    own = np.mean([row["effect"] for row in rows if row["target"] == row["source"]])
    assert own > 0, "a category's own data must help it"


def test_the_mix_adds_up_and_the_stages_hold_it(run_dir: Path) -> None:
    mix = json.loads((run_dir / "mix/mix.json").read_text())
    counts = {item["category"]: item["count"] for item in mix["categories"]}
    assert sum(counts.values()) == 200
    curriculum = json.loads((run_dir / "curriculum/curriculum.json").read_text())
    for category, count in counts.items():
        assert sum(stage["counts"][category] for stage in curriculum["stages"]) == count
    files = sorted((run_dir / "selection/parts").glob("*.parquet"))
    selected = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [row["position"] for row in selected] == list(range(200))
    assert {c: sum(row["category"] == c for row in selected) for c in counts} == counts


def test_the_model_loads_and_learned(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run_dir / "train/model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "train/model")
    assert tokenizer.chat_template
    assert model.num_parameters() > 10_000
    summary = json.loads((run_dir / "eval/summary.json").read_text())
    assert summary["confidence"] == 0.95


def test_models_are_judged_on_rows_of_the_further_target_that_chose_no_mix(run_dir: Path) -> None:
    losses = pq.read_table(run_dir / "eval/losses.parquet").to_pylist()
    judged = {row["id"] for row in losses if row["category"] == "long sums"}
    (heldout,) = (run_dir / "influence").rglob("heldout.arrow")
    measured = storage.read_table(str(heldout))
    measured = measured.filter(pc.equal(measured["category"], "long sums"))["id"].to_pylist()
    assert len(judged) == len(measured) == 12 and judged.isdisjoint(measured)
    summary = json.loads((run_dir / "eval/summary.json").read_text())
    assert summary["importance"]["long sums"] == pytest.approx(1 / 5)
    assert summary["importance_note"] == ""
    (solved,) = (p for p in summary["predictions"] if (p["arm"], p["reference"]) == SOLVED)
    assert "long sums" in {row["target"] for row in solved["targets"]}
    assert "long sums" in {row["category"] for row in summary["accuracy"]}


SOLVED = ("solved", "natural")


def test_the_report_names_every_category(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    for category in ("addition", "chat", "counting", "spelling", "long sums"):
        assert category in page


def test_a_second_run_does_nothing(config: Path, run_dir: Path) -> None:
    before = (run_dir / "train/record.json").read_bytes()
    result = run_job("run", str(config))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("already finished") == len(STAGE_FOLDERS)
    assert (run_dir / "train/record.json").read_bytes() == before


def test_files_copied_anew_are_read_again_and_repeat_no_later_stage(
    config: Path, run_dir: Path
) -> None:
    before = (run_dir / "corpus/record.json").read_bytes()
    for name in ("addition.json", "words.jsonl", "chat.json", "untagged.jsonl"):
        os.utime(run_dir.parent / "data" / name)
    result = run_job("run", str(config))
    assert result.returncode == 0, result.stderr
    assert (run_dir / "corpus/record.json").read_bytes() != before
    assert result.stderr.count("already finished") == len(STAGE_FOLDERS) - len(("ingest", "report"))


def test_a_changed_value_is_named_and_only_later_stages_run(config: Path, run_dir: Path) -> None:
    result = run_job(
        "run", str(config), "--set", "solve.move=0.1", "--from", "solve", "--until", "curriculum"
    )
    assert result.returncode == 0, result.stderr
    assert "solve.move 0.2 -> 0.1" in result.stderr
    back = run_job("run", str(config), "--until", "solve")
    assert "earlier attempt with these settings" in back.stderr


def test_looks_at_a_finished_run(config: Path, run_dir: Path) -> None:
    status = run_job("status", str(run_dir))
    assert status.returncode == 0, status.stderr
    assert status.stdout.count("done") == len(STAGE_FOLDERS)
    check = run_job("check", str(config))
    assert check.returncode == 0, check.stderr
    verify = run_job("verify", str(run_dir))
    assert verify.returncode == 0, verify.stderr
    assert "overall" in verify.stdout


@pytest.mark.parametrize("trainer", ["hf", "trl", "llama-factory", "axolotl"])
def test_exports_keep_the_order(run_dir: Path, tmp_path: Path, trainer: str) -> None:
    result = run_job("export", str(run_dir), "--format", trainer, "--out", str(tmp_path / "x"))
    assert result.returncode == 0, result.stderr
    files = sorted((run_dir / "selection/parts").glob("*.parquet"))
    first = pq.read_table(files[0]).to_pylist()[0]["messages"][-1]["content"]
    if trainer == "hf":
        from datasets import load_from_disk

        dataset = load_from_disk(str(tmp_path / "x"))
        assert len(dataset) == 200
        assert dataset[0]["messages"][-1]["content"] == first
        return
    (lines,) = (tmp_path / "x").glob("*.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 200
    assert first in json.dumps(rows[0], ensure_ascii=False)


def test_the_resolved_configuration_runs_again_as_it_is(config: Path, run_dir: Path) -> None:
    assert load_config(str(run_dir / "config.json")) == load_config(str(config))


@pytest.mark.slow
def test_sigterm_ends_a_run_in_order(tmp_path: Path) -> None:
    """`ray job stop` and Kubernetes send it; Ray's own answer to it has another exit code."""
    config = job_config(tmp_path)
    with started("run", str(config)) as (process, log):
        assert wait_until(lambda: "tag ..." in log.read_text(), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
        assert "Finished work is kept" in log.read_text()
    assert not (tmp_path / "run/lease.json").exists()
