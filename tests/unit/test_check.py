"""`instructmix check`: the plan and its cost at every point of a run, without Ray."""

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import torch
from check_runs import Run

from actors.cluster import Cluster
from actors.influence.precheck import check_before_influence
from actors.overview import describe_plan
from actors.pipeline import STAGES, stage_inputs
from actors.stage import StageContext
from system import storage
from system.config import InfluenceConfig, RunConfig
from system.data.corpus import Corpus
from system.errors import ConfigError
from system.forecast import describe
from system.influence.design.external_targets import read_targets
from system.models.base import CHATML
from system.progress import Progress
from system.rundir import RunDir, fingerprint


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("tagged"))
    run.ingest()
    run.model()
    run.tag()
    return run


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)} {path.lstat().st_mtime_ns}\n".encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def test_before_ingest_it_says_what_is_not_known_yet(run: Run, capsys) -> None:
    assert run.check() == 0
    text = capsys.readouterr().out
    assert "one reference run and one run per category and direction" in text
    assert "known after stage ingest" in text
    assert not (run.root / "run").exists(), "check writes nothing"


def test_gpus_that_the_configuration_leaves_idle_are_noted(run: Run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.check("--no-probe") == 0
    assert "note: this machine has 2 GPUs" in capsys.readouterr().out
    given = [f"--set=cluster.{kind}_gpus=1" for kind in ("tuner", "scorer", "train")]
    assert run.check("--no-probe", *given) == 0
    assert "GPU" not in capsys.readouterr().out


def test_several_doses_are_part_of_the_plan(run: Run, capsys) -> None:
    assert run.check("--set", "influence.dose_rows=[32, 8, 16]") == 0
    shown = capsys.readouterr().out
    assert "one run per category and direction (remove), at doses of 8, 16 and 32 rows" in shown
    assert run.check("--set", "influence.dose_rows=[8, 49]") == 2
    assert "dose_rows 49 is more than rows_per_category 48" in capsys.readouterr().err


def test_another_text_in_the_chat_template_runs_the_model_stage_again(run: Run, capsys) -> None:
    template = run.root / "template.jinja"
    template.write_text(CHATML)
    model = run.config.model.model_copy(update={"chat_template": str(template)})
    run.config = run.config.model_copy(update={"model": model})
    run.ingest()
    run.model()
    assert run.check("--no-probe") == 0
    assert "  model       done" in capsys.readouterr().out
    template.write_text("{{ '' }}" + CHATML)
    assert run.check("--no-probe") == 0
    assert "  model       to do again: file.model.chat_template" in capsys.readouterr().out
    template.unlink()
    assert run.check("--no-probe") == 2
    assert f"model.chat_template '{template}'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-tokens", "--max-hours"])
def test_a_budget_that_nothing_is_known_for_is_no_silent_pass(run: Run, capsys, flag) -> None:
    assert run.check(flag, "1e12") == 2
    error = capsys.readouterr().err
    assert f"{flag} cannot be checked" in error and "known after stage ingest" in error


def test_after_ingest_a_sample_comes_near_what_is_known_after_tagging(run: Run, capsys) -> None:
    run.ingest()
    assert run.check("--no-probe") == 0
    text = capsys.readouterr().out
    assert "estimated from a sample of the rows, +-" in text
    sampled = trained_tokens(text)
    run.model()
    run.tag()
    assert run.check("--no-probe") == 0
    text = capsys.readouterr().out
    assert trained_tokens(text) == run.cost().trained_tokens
    assert sampled == pytest.approx(run.cost().trained_tokens, rel=0.1)


def trained_tokens(text: str) -> int:
    (line,) = [line for line in text.splitlines() if line.startswith("  influence") and ":" in line]
    return int(line.split(":")[1].split("tokens trained")[0].replace("about", "").replace(",", ""))


def test_the_probe_gives_hours_and_leaves_the_run_directory_as_it_was(tagged: Run, capsys) -> None:
    before = digest(tagged.root / "run")
    assert tagged.check("--max-hours", "9") == 0
    text = capsys.readouterr().out
    assert f"{tagged.cost().trained_tokens:,} tokens trained" in text
    assert "estimated from a probe" in text and "Not included:" in text
    assert text.count("tokens/s") == 2
    assert digest(tagged.root / "run") == before
    assert not ray.is_initialized()


def test_too_many_hours_are_refused_with_what_lowers_them(tagged: Run, capsys) -> None:
    assert tagged.check("--max-hours", "0.001") == 2
    out, error = capsys.readouterr()
    assert "tokens trained" in out, "the plan is shown before it is refused"
    assert "--max-hours allows 0.00 hours" in error and "evaluate.seeds" in error


def test_hours_need_a_probe_or_finished_runs(tagged: Run, capsys) -> None:
    assert tagged.check("--max-hours", "9", "--no-probe") == 2
    assert "--no-probe" in capsys.readouterr().err


def test_a_device_that_was_not_measured_gets_no_hours(tagged: Run, capsys) -> None:
    assert tagged.check("--max-hours", "9", "--set", "cluster.train_gpus=1") == 2
    out, error = capsys.readouterr()
    assert "no time for some stages: stages train and evaluate" in out
    assert "cluster.train_gpus" in error


def test_a_disk_that_is_too_small_is_noted(tagged: Run) -> None:
    forecast = describe_plan(tagged.config).forecast
    assert "disk is too small" not in "\n".join(describe(forecast))
    full = dataclasses.replace(forecast, free_bytes=forecast.peak_bytes - 1)
    assert "note: the disk is too small" in "\n".join(describe(full))


def test_a_plan_at_the_budget_passes_and_one_token_less_is_refused(tagged: Run, capsys) -> None:
    assert tagged.check("--no-probe") == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  total:")
    )
    total = int(line.split(":")[2].split("token equivalents")[0].replace(",", ""))
    assert total > tagged.cost().token_equivalents, "train and evaluate are in it"
    assert tagged.check("--no-probe", "--max-tokens", str(total + 1)) == 0
    assert tagged.check("--no-probe", "--max-tokens", str(total - 1)) == 2
    error = capsys.readouterr().err
    assert "The largest parts: " in error and "influence.replications" in error


@pytest.mark.parametrize("flag", ["--max-tokens", "--max-hours"])
def test_a_budget_of_nothing_is_refused_as_an_argument(tagged: Run, capsys, flag) -> None:
    with pytest.raises(SystemExit) as ended:
        tagged.check(flag, "0")
    assert ended.value.code == 2
    assert "above 0" in capsys.readouterr().err


def context(run: Run, limit: int | None) -> StageContext:
    influence = run.config.influence.model_copy(update={"max_token_equivalents": limit})
    config = run.config.model_copy(update={"influence": influence})
    return StageContext(
        config=config,
        run_dir=RunDir(config.run_dir),
        attempt=str(run.root / "attempt"),
        upstream=run.records,
        progress=Progress(is_terminal=False),
        cluster=Cluster(config.cluster),
    )


def test_run_refuses_a_design_above_its_budget_before_it_trains(tagged: Run) -> None:
    needed = int(tagged.cost().token_equivalents) + 1
    check_before_influence(context(tagged, needed))
    check_before_influence(context(tagged, None))
    with pytest.raises(ConfigError, match=r"max_token_equivalents is .* Nothing was trained"):
        check_before_influence(context(tagged, needed - 1))
    assert not ray.is_initialized()


def test_check_refuses_what_run_refuses_for_its_budget(tagged: Run, capsys) -> None:
    assert tagged.check("--no-probe", "--set", "influence.max_token_equivalents=1000") == 2
    assert "influence.max_token_equivalents is 1,000" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["ingest", "tag"])
def test_check_refuses_a_budget_above_the_train_rows(run: Run, capsys, last: str) -> None:
    """As soon as the rows are counted; before that nobody knows."""
    assert run.check("--no-probe", "--set", "solve.budget=1000000") == 0
    run.ingest()
    if last == "tag":
        run.model()
        run.tag()
    capsys.readouterr()
    train_rows = sum(Corpus.open(run.output(last, "manifest")).counts("train").values())
    assert run.check("--no-probe", "--set", f"solve.budget={train_rows + 1}") == 2
    error = capsys.readouterr().err
    assert f"expected at most the {train_rows:,} train rows" in error
    assert f"found {train_rows + 1:,}" in error
    assert run.check("--no-probe", "--set", f"solve.budget={train_rows}") == 0
    assert "equals the number of train rows" in capsys.readouterr().out
    many = (f"solve.budget={train_rows + 1}", "solve.max_epochs=2")
    assert run.check("--no-probe", "--set", many[0], "--set", many[1]) == 0


def test_a_saved_data_set_is_a_target_as_it_is_a_source(run: Run, tmp_path, capsys) -> None:
    """Its stamp is that of its files; a directory was refused where a file was expected."""
    import datasets

    rows = [{"prompt": f"bench question {k}", "completion": f"answer {k}"} for k in range(40)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    run.ingest()
    run.model()
    run.tag()
    assert run.check("--no-probe", "--set", f"influence.targets.bench={tmp_path / 'saved'}") == 0
    assert "influence" in capsys.readouterr().out
    target = InfluenceConfig(targets={"bench": str(tmp_path / "saved")})
    config = run.config.model_copy(update={"influence": target})
    tables, _ = read_targets(config, "estimate")
    assert tables["bench"].num_rows + read_targets(config, "test")[0]["bench"].num_rows == 40


def test_stages_that_are_done_are_within_any_budget(tagged: Run) -> None:
    everything = frozenset(stage.name for stage in STAGES)
    forecast = describe_plan(tagged.config).forecast
    assert forecast.left and forecast.peak_bytes > 0
    done = dataclasses.replace(forecast, done=everything, why_no_rates="")
    done.refuse(max_hours=1e-6, max_tokens=1)
    assert "all of these stages are done" in "\n".join(describe(done))
    assert done.peak_bytes == 0


def test_first_order_estimates_are_not_forecast_without_what_they_are(tagged):
    forecast = describe_plan(tagged.config).forecast
    assert "first-order" not in "\n".join(describe(forecast))
    influence = tagged.config.influence.model_copy(update={"estimator": "gradient"})
    config = tagged.config.model_copy(update={"influence": influence})
    asked = dataclasses.replace(forecast, config=config)
    assert "confirm them with estimator retrain" in "\n".join(describe(asked))


def test_the_budget_is_no_part_of_what_the_matrix_depends_on(tagged: Run) -> None:
    stage = next(stage for stage in STAGES if stage.name == "influence")
    plain = stage_inputs(stage, tagged.config, tagged.records)
    assert stage_inputs(stage, context(tagged, 5).config, tagged.records) == plain


def test_finished_runs_tell_the_speed_instead_of_a_probe(run: Run, capsys) -> None:
    run.ingest()
    run.model()
    run.tag()
    stage = next(stage for stage in STAGES if stage.name == "influence")
    attempt = RunDir(run.config.run_dir).attempt_uri(
        stage.folder, fingerprint(stage_inputs(stage, run.config, run.records))
    )
    assert isinstance(run.config, RunConfig)
    heldout = pa.table({"input_ids": [list(range(30)), list(range(70))]})
    storage.write_table(storage.join(attempt, "heldout.arrow"), heldout)
    for number, seconds in enumerate((1.0, 2.0, 4.0)):
        unit = {"trained_tokens": 2000, "seconds": seconds}
        storage.write_json(storage.join(attempt, "units", f"r00-remove-{number:03d}.json"), unit)
        scores = pa.table({"nll": [1.0]}, metadata={"instructmix.seconds": str(seconds)})
        uri = storage.join(attempt, "scores", f"r00-remove-{number:03d}.parquet")
        storage.write_table(uri, scores)
    assert run.check() == 0
    text = capsys.readouterr().out
    assert "3 trainings and 3 scorings of this run directory" in text
    assert "one tuner 857 tokens/s (750 to 1,500)" in text
    assert "one scorer 43 tokens/s (38 to 75)" in text
    assert "probe" not in text
