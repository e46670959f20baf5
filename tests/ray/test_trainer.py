"""Real training workers under Ray Train, killed in the middle: the weights are the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_world import (
    LONG,
    LONG_STEPS,
    build_context,
    build_model,
    build_world,
    difference,
    records,
    steps_logged,
    wait_for_checkpoint,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.cluster import Cluster
from actors.fit import fit
from actors.trainer import make_job, run
from system.errors import ClusterError, ConfigError, StageError
from system.models.base import load_model
from system.training.plan import read_plan
from system.training.settings import TrainSettings
from system.training.train import train_on_plan

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
def long_world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("long")
    build_world(root, num_rows=4 * LONG_STEPS, hidden_size=192)
    return root


@pytest.fixture(scope="module")
def undisturbed(long_world: Path, cluster: Cluster) -> dict[str, torch.Tensor]:
    run(build_context(long_world, "train/undisturbed", cluster, **LONG))
    return weights(long_world, "train/undisturbed")


def test_workers_train_what_one_process_trains_and_the_export_loads(world, cluster):
    context = build_context(world, "train/a", cluster)
    result = run(context)
    plan = read_plan(str(world / "train/a/plan.arrow"))
    assert result.counts["steps"] == plan.num_steps == 8
    assert result.counts["response_tokens"] == plan.denominators.sum()
    assert steps_logged(world, "train/a") == list(range(8))
    exported = AutoModelForCausalLM.from_pretrained(world / "train/a/model")
    tokenizer = AutoTokenizer.from_pretrained(world / "train/a/model")
    assert tokenizer.chat_template and exported.config.use_cache
    alone = load_model(world / "model/m/model")
    settings = TrainSettings.from_train(context.config.train, context.config.model, seed=0)
    train_on_plan(alone, plan, settings)
    assert difference(dict(exported.named_parameters()), dict(alone.named_parameters())) < 2e-4


def test_adapters_are_saved_alone_and_merged_into_the_export(world, cluster):
    from peft import PeftModel

    run(build_context(world, "train/lora", cluster, lora={"rank": 4}, parallel="fsdp"))
    base = load_model(world / "model/m/model")
    merged = load_model(world / "train/lora/model")
    assert difference(dict(base.named_parameters()), dict(merged.named_parameters())) > 1e-4
    adapted = PeftModel.from_pretrained(base, str(world / "train/lora/adapter"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_best_weights_are_delivered_with_their_loss_and_the_card_names_its_sources(world, cluster):
    result = run(build_context(world, "train/best", cluster, keep_best=True, export="best"))
    measured = {
        record["step"] + 1: record["heldout_loss"]
        for record in records(world, "train/best")
        if "heldout_loss" in record
    }
    assert list(measured) == [3, 6, 8]
    assert result.counts["heldout_loss"] == min(measured.values())
    assert measured[result.counts["exported_step"]] == min(measured.values())
    heldout = read_plan(str(world / "train/best/heldout.arrow"))
    assert heldout.table.num_rows == 24
    plan = read_plan(str(world / "train/best/plan.arrow"))
    assert not set(heldout.table["id"].to_pylist()) & set(plan.table["id"].to_pylist())
    card = (world / "train/best/model/README.md").read_text()
    for path in ("tags/t/manifest.json", "mix/m/mix.json", "curriculum/c/curriculum.json"):
        digest = hashlib.sha256((world / path).read_bytes()).hexdigest()
        assert f"SHA-256 of {Path(path).name}: `{digest}`" in card
    for hashed in (plan.sha256, heldout.sha256):
        assert hashed in card


def test_killed_worker_changes_nothing(long_world, cluster, undisturbed):
    attempt = long_world / "train/killed"

    def kill() -> None:
        os.kill(wait_for_checkpoint(attempt, 10)["pid"], signal.SIGKILL)
        killed.append(True)

    killed: list[bool] = []
    thread = threading.Thread(target=kill)
    thread.start()
    run(build_context(long_world, "train/killed", cluster, **LONG))
    thread.join()
    assert killed
    assert difference(weights(long_world, "train/killed"), undisturbed) == 0.0
    assert steps_logged(long_world, "train/killed") == list(range(LONG_STEPS))


def test_killed_driver_resumes_with_one_worker_from_damaged_storage(
    long_world, cluster, undisturbed
):
    """SIGKILL of the driver, newest checkpoint truncated, world size 2 -> 1."""
    attempt = long_world / "train/driver"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from trainer_world import build_context\n"
        "from actors.trainer import run\n"
        f"run(build_context(Path({str(long_world)!r}), 'train/driver', **{LONG!r}))\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for_checkpoint(attempt, 30)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    commits = sorted(attempt.glob("checkpoints/*/COMMIT.json"))
    for _ in range(100):  # orphaned workers notice the death of their Ray within seconds
        time.sleep(0.2)
        again = sorted(attempt.glob("checkpoints/*/COMMIT.json"))
        if again == commits:
            break
        commits = again
    assert not (attempt / "done.json").exists()
    data = next(commits[-1].parent.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    run(build_context(long_world, "train/driver", cluster, **LONG, num_workers=1))
    assert difference(weights(long_world, "train/driver"), undisturbed) < 1e-3
    lines = (attempt / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(LONG_STEPS))
    sizes = [json.loads(line)["world_size"] for line in lines]
    assert sizes[0] == 2 and sizes[-1] == 1 and sizes.index(1) % 10 == 0


def test_finished_jobs_are_kept_and_start_no_ray(world, tmp_path):
    context = build_context(world, "train/a", Cluster(build_context(world, "x").config.cluster))
    plan_uri = str(world / "train/a/plan.arrow")
    job = make_job("train", plan_uri, str(world / "train/a"), context, seed=0)
    (model,) = fit([job], context)
    assert model.num_steps == 8
    assert not context.cluster._is_connected


def test_divergence_is_told_once_and_not_retried(world, cluster):
    started = time.monotonic()
    with pytest.raises(StageError, match="not finite"):
        run(build_context(world, "train/diverged", cluster, learning_rate=1e30, warmup_share=0.0))
    assert time.monotonic() - started < 150
    assert not (world / "train/diverged" / "model").exists()


def test_workers_that_never_fit_are_an_error_at_once(world, cluster):
    with pytest.raises(ClusterError, match="3 training workers with 1 CPUs"):
        run(build_context(world, "train/many", cluster, num_workers=3))


def test_tracker_that_is_not_installed_is_refused_before_training(world, cluster):
    with pytest.raises(ConfigError, match="mlflow"):
        run(build_context(world, "train/tracked", cluster, log_to=["mlflow"]))


def test_base_model_is_untouched(world):
    expected = build_model(vocab_size=load_model(world / "model/m/model").config.vocab_size)
    found = dict(load_model(world / "model/m/model").named_parameters())
    assert difference(found, dict(expected.named_parameters())) == 0.0
