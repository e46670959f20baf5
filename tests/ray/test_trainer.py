"""Real training workers under Ray Train, killed in the middle: the weights are the same bits."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_world import (
    LONG,
    LONG_STEPS,
    SAME_WAY,
    build_context,
    build_model,
    build_world,
    difference,
    newest_commit,
    records,
    resumed_steps,
    steps_logged,
    strayed,
    wait_for_checkpoint,
    wait_until_gone,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.cluster import Cluster
from actors.fit import fit
from actors.stage import StageResult
from actors.trainer import make_job, run
from system.errors import ClusterError, ConfigError, StageError
from system.models.base import load_model
from system.training.plan import read_plan
from system.training.settings import TrainSettings
from system.training.train import Training

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.ray

BEST = {"keep_best": True, "export": "best"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    context = build_context(tmp_path_factory.mktemp("cluster"), "none")
    context.cluster.connect()
    yield context.cluster
    context.cluster.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    build_world(root)
    return root


@pytest.fixture(scope="module")
def trained(world: Path, cluster: Cluster) -> StageResult:
    """The stage itself, its best checkpoint delivered."""
    return run(build_context(world, "train/a", cluster, **BEST))


@pytest.fixture(scope="module")
def failed(world: Path, cluster: Cluster, trained: StageResult) -> StageError:
    """What comes of two jobs for one group of workers, of which the second diverges."""
    settings = {
        "lora": {"lora": {"rank": 4}, "parallel": "fsdp"},
        "diverged": {"learning_rate": 1e30, "warmup_share": 0.0},
    }
    jobs = []
    for name, train in settings.items():
        context = build_context(world, f"train/{name}", cluster, **train)
        plan_uri = str(world / "train/a/plan.arrow")
        jobs.append(make_job(name, plan_uri, context.attempt, context, seed=0))
    with pytest.raises(StageError) as raised:
        fit(jobs, build_context(world, "train/jobs", cluster))
    return raised.value


@pytest.mark.slow
def test_workers_train_what_one_process_trains_and_the_export_loads(world, trained):
    plan = read_plan(str(world / "train/a/plan.arrow"))
    assert trained.counts["steps"] == plan.num_steps == 8
    assert trained.counts["response_tokens"] == plan.denominators.sum()
    assert steps_logged(world, "train/a") == list(range(8))
    exported = AutoModelForCausalLM.from_pretrained(world / "train/a/model")
    tokenizer = AutoTokenizer.from_pretrained(world / "train/a/model")
    assert tokenizer.chat_template and exported.config.use_cache
    alone = load_model(world / "model/m/model")
    config = build_context(world, "none").config
    settings = TrainSettings.from_train(config.train, config.model, seed=0)
    with Training(alone, plan, settings) as training:
        for step in range(trained.counts["exported_step"]):
            training.step(step)
    assert difference(dict(exported.named_parameters()), dict(alone.named_parameters())) < 2e-4


@pytest.mark.slow
def test_adapters_are_saved_alone_and_merged_into_the_export(world, failed):
    from peft import PeftModel

    base = load_model(world / "model/m/model")
    merged = load_model(world / "train/lora/model")
    assert difference(dict(base.named_parameters()), dict(merged.named_parameters())) > 1e-4
    adapted = PeftModel.from_pretrained(base, str(world / "train/lora/adapter"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_best_weights_are_delivered_with_their_loss_and_the_card_names_its_sources(world, trained):
    measured = {
        record["step"] + 1: record["heldout_loss"]
        for record in records(world, "train/a")
        if "heldout_loss" in record
    }
    assert list(measured) == [3, 6, 8]
    assert trained.counts["heldout_loss"] == min(measured.values())
    assert measured[trained.counts["exported_step"]] == min(measured.values())
    heldout = read_plan(str(world / "train/a/heldout.arrow"))
    assert heldout.table.num_rows == 24
    plan = read_plan(str(world / "train/a/plan.arrow"))
    assert not set(heldout.table["id"].to_pylist()) & set(plan.table["id"].to_pylist())
    card = (world / "train/a/model/README.md").read_text()
    for path in ("tags/t/manifest.json", "mix/m/mix.json", "curriculum/c/curriculum.json"):
        digest = hashlib.sha256((world / path).read_bytes()).hexdigest()
        assert f"SHA-256 of {Path(path).name}: `{digest}`" in card
    for hashed in (plan.sha256, heldout.sha256):
        assert hashed in card


def test_killed_worker_changes_nothing(long_world, cluster, undisturbed):
    attempt = long_world / "train/killed"

    def kill() -> None:
        pid = wait_for_checkpoint(attempt, 10)["pid"]
        committed.append(newest_commit(attempt))
        os.kill(pid, signal.SIGKILL)

    committed: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=kill)
    thread.start()
    run(build_context(long_world, "train/killed", cluster, **LONG))
    thread.join()
    assert resumed_steps(long_world, "train/killed")[0] >= committed[0] >= 10
    assert signal.getsignal(signal.SIGINT) is handler, "Ray Train's, which would outlive it"
    assert strayed(long_world, "train/killed", undisturbed) == 0.0
    assert steps_logged(long_world, "train/killed") == list(range(LONG_STEPS))


def start_driver(root: Path, attempt: str) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, with a Ray of its own."""
    code = (
        f"import signal, sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from trainer_world import build_context\n"
        "from actors.trainer import run\n"
        "try:\n"
        f"    run(build_context(Path({str(root)!r}), {attempt!r}, **{LONG!r}))\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


@pytest.mark.slow
def test_ctrl_c_reaches_the_command_and_another_number_of_workers_goes_on(
    long_world, cluster, undisturbed
):
    """Ray Train's own handler would end it with exit code 0, as if it had finished."""
    attempt = long_world / "train/stopped"
    driver = start_driver(long_world, "train/stopped")
    worker = wait_for_checkpoint(attempt, 10)["pid"]
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=120) == 130
    wait_until_gone(worker)
    assert not (attempt / "done.json").exists()
    run(build_context(long_world, "train/stopped", cluster, **LONG, num_workers=1))
    assert strayed(long_world, "train/stopped", undisturbed) < SAME_WAY
    assert steps_logged(long_world, "train/stopped") == list(range(LONG_STEPS))
    sizes = [line["world_size"] for line in records(long_world, "train/stopped")]
    assert sizes[0] == 2 and sizes[-1] == 1 and sizes.index(1) % 10 == 0


@pytest.mark.slow
def test_killed_driver_resumes_from_damaged_storage_with_the_same_bits(
    long_world, cluster, undisturbed
):
    """SIGKILL of the driver, newest checkpoint truncated: the one before it."""
    attempt = long_world / "train/driver"
    driver = start_driver(long_world, "train/driver")
    worker = wait_for_checkpoint(attempt, 30)["pid"]
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_until_gone(worker)  # rank 0, which alone commits, notices the death of its Ray
    assert not (attempt / "done.json").exists()
    newest = max(attempt.glob("checkpoints/*/COMMIT.json"))
    data = next(newest.parent.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    committed = newest_commit(attempt)
    run(build_context(long_world, "train/driver", cluster, **LONG))
    assert resumed_steps(long_world, "train/driver") == [committed - LONG["checkpoint_every"]]
    assert strayed(long_world, "train/driver", undisturbed) == 0.0
    assert steps_logged(long_world, "train/driver") == list(range(LONG_STEPS))


@pytest.mark.slow
def test_finished_jobs_are_kept_and_start_no_ray(world, trained):
    context = build_context(
        world, "train/a", Cluster(build_context(world, "x").config.cluster), **BEST
    )
    plan_uri, heldout_uri = (str(world / f"train/a/{name}.arrow") for name in ("plan", "heldout"))
    job = make_job(
        "train", plan_uri, context.attempt, context,
        seed=0, heldout_uri=heldout_uri, export="best",
    )  # fmt: skip
    (model,) = fit([job], context)
    assert model.num_steps == 8
    assert not context.cluster._is_connected


@pytest.mark.slow
def test_divergence_is_told_and_not_retried(world, failed):
    """A worker that raised it would be started again, and the error would be Ray Train's."""
    assert "not finite" in str(failed)
    assert not (world / "train/diverged" / "model").exists()


@pytest.mark.slow
def test_workers_that_never_fit_are_an_error_at_once(world, cluster):
    with pytest.raises(ClusterError, match="3 training workers with 1 CPUs"):
        run(build_context(world, "train/many", cluster, num_workers=3))


@pytest.mark.slow
def test_tracker_that_is_not_installed_is_refused_before_training(world, cluster):
    with pytest.raises(ConfigError, match="mlflow"):
        run(build_context(world, "train/tracked", cluster, log_to=["mlflow"]))


@pytest.mark.slow
def test_base_model_is_untouched(world):
    expected = build_model(vocab_size=load_model(world / "model/m/model").config.vocab_size)
    found = dict(load_model(world / "model/m/model").named_parameters())
    assert difference(found, dict(expected.named_parameters())) == 0.0
