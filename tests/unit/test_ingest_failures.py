"""What breaks an ingest in the middle, and what is left of it."""

from __future__ import annotations

import gzip
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from ingest_builders import (
    Ingested,
    chained_rows,
    ingest,
    messy_rows,
    numbered,
    run_config,
    write_lines,
)

from system import storage
from system.config import SourceConfig
from system.data.ingest.ingest import (
    STEPS,
    finish_ingest,
    ingest_chunk,
    ingest_local,
    plan_ingest,
    read_outcome,
)
from system.errors import DataError, StageError


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", numbered(30))
    plan = plan_ingest(run_config(tmp_path), str(tmp_path / "attempt"))
    with path.open("ab") as file:
        file.write(b'{"prompt": "late", "completion": "row"}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        ingest_chunk(plan, 0)
    assert read_outcome(plan, 0) is None


def test_a_truncated_archive_leaves_no_manifest(tmp_path):
    whole = write_lines(tmp_path / "plain.jsonl", numbered(3000)).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(whole)[:-2000])
    with pytest.raises(DataError, match="cut off"):
        ingest(tmp_path, SourceConfig(path="rows.jsonl.gz"))
    left = [path.name for path in (tmp_path / "attempt").rglob("*.json")]
    assert left == ["plan.json"]


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_an_interrupted_ingest_goes_on_and_ends_with_the_same_bytes(
    tmp_path, monkeypatch, deduplicate
):
    write_lines(tmp_path / "rows.jsonl", [*messy_rows(7), *chained_rows(6, 4)])
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 20_000)
    monkeypatch.setattr("system.data.ingest.shards.UNIT_BYTES", 1)
    config = run_config(
        tmp_path, max_chars=4500, chunk_bytes=10_000, deduplicate=deduplicate, shard_rows=50
    )
    whole = Ingested(config, tmp_path / "whole")
    plan = plan_ingest(config, "")
    units = {
        "read": len(plan.chunks),
        "reduce": plan.num_buckets,
        "write": len(whole.manifest.shards),
    }
    if deduplicate == "near":
        steps = ("sign", "share", "send", "match", "match-again")
        units |= dict.fromkeys(steps, plan.num_buckets)
    assert min(units.values()) > 3
    calls = dict.fromkeys(units, 0)

    def interrupted(step):
        def do(*args):
            calls[step.name] += 1
            if calls[step.name] == 3:
                raise KeyboardInterrupt
            return step.do(*args)

        return replace(step, do=do)

    for name in units:
        monkeypatch.setitem(STEPS, name, interrupted(STEPS[name]))
    for _ in units:
        with pytest.raises(KeyboardInterrupt):
            ingest_local(config, str(tmp_path / "again"))
    ingest_local(config, str(tmp_path / "again"))
    assert calls == {name: count + 1 for name, count in units.items()}
    found = {
        str(path.relative_to(tmp_path / "again")): path.read_bytes()
        for path in sorted((tmp_path / "again").rglob("*"))
        if path.is_file()
    }
    assert found == whole.files()


def stop_at(step, call):
    """The step, which is stopped in that call of it."""
    calls = []

    def do(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step.do(*args)

    return replace(step, do=do)


def test_an_ingest_goes_on_with_the_buckets_it_began_with(tmp_path, monkeypatch):
    write_lines(tmp_path / "rows.jsonl", numbered(200) * 2)
    config = run_config(tmp_path, chunk_bytes=4000)
    whole = Ingested(config, tmp_path / "whole")
    monkeypatch.setitem(STEPS, "read", stop_at(STEPS["read"], 4))
    with pytest.raises(KeyboardInterrupt):
        ingest_local(config, str(tmp_path / "again"))
    monkeypatch.setattr("system.data.ingest.plan.BUCKET_BYTES", 500)
    again = Ingested(config, tmp_path / "again")
    assert again.files() == whole.files()
    assert again.manifest.kept == again.manifest.duplicates == 200


def test_an_ingest_does_not_go_on_with_other_files_or_settings(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", numbered(200))
    monkeypatch.setitem(STEPS, "read", stop_at(STEPS["read"], 2))
    with pytest.raises(KeyboardInterrupt):
        ingest_local(run_config(tmp_path, chunk_bytes=4000), str(tmp_path / "again"))
    with pytest.raises(StageError, match=r"plan.json.*ingest.max_chars 200000 -> 900.*--redo"):
        ingest_local(run_config(tmp_path, chunk_bytes=4000, max_chars=900), str(tmp_path / "again"))
    with path.open("ab") as file:
        file.write(b"{}")
    with pytest.raises(StageError, match=r"files.0 .*rows.jsonl"):
        ingest_local(run_config(tmp_path, chunk_bytes=4000), str(tmp_path / "again"))


def test_a_data_set_of_unknown_size_is_cut_into_many_buckets(tmp_path, monkeypatch):
    monkeypatch.setattr("system.data.read.sources.stat", lambda uri: (0, "version"))
    config = run_config(tmp_path, SourceConfig(path="hf://owner/name"))
    assert plan_ingest(config, "").num_buckets == 256


def test_lost_spill_rows_fail_the_stage_instead_of_the_counts(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(20))
    plan = plan_ingest(run_config(tmp_path), str(tmp_path / "attempt"))
    outcome = ingest_chunk(plan, 0)
    storage.write_bytes(str(tmp_path / "attempt" / "work" / "keep"), b"")
    with pytest.raises(StageError, match="20 rows were read"):
        finish_ingest(plan, [outcome], [], [])


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path):
    write_lines(tmp_path / "rows.jsonl", numbered(3))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        ingest_local(run_config(tmp_path), str(tmp_path / "file" / "attempt"))


def test_a_full_disk_leaves_no_manifest_and_a_rerun_completes(tmp_path):
    """The file-size limit stands for the disk: a write fails in the middle of a file."""
    write_lines(tmp_path / "rows.jsonl", numbered(3000))
    config = run_config(tmp_path, chunk_bytes=30_000)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        "import sys, pathlib; from system.config import RunConfig; "
        "from system.data.ingest.ingest import ingest_local; "
        "ingest_local(RunConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text()), "
        "sys.argv[2])"
    )
    attempt = tmp_path / "full"
    full = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.json"), str(attempt)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000)),
        capture_output=True,
        text=True,
    )
    assert full.returncode != 0
    assert "File too large" in full.stderr
    assert not (attempt / "manifest.json").exists()
    assert not [path for path in attempt.rglob(".*") if path.is_file()]
    ingest_local(config, str(attempt))
    whole = Ingested(config, tmp_path / "whole")
    found = {name: (attempt / name).read_bytes() for name in whole.files()}
    assert found == whole.files()


def test_categories_are_counted_before_a_shard_of_each_is_written(tmp_path):
    write_lines(
        tmp_path / "rows.jsonl", [{**row, "c": f"id-{k}"} for k, row in enumerate(numbered(200))]
    )
    source = SourceConfig(path="rows.jsonl", category_column="c")
    with pytest.raises(DataError, match=r"too few rows in 'id-0'.*and 190 more of 200 categories"):
        ingest(tmp_path, source, min_train_rows=2)
    assert not (tmp_path / "attempt" / "shards").exists()
