from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from train_jobs import (
    CPU,
    base,  # noqa: F401  (a fixture)
    build_job,
    metrics,
    run_killed,
    weights,
    without_times,
)
from training_builders import (
    CHATML,
    build_model,
    build_settings,
    build_small_plan,
    build_tokenizer,
    build_tokens,
    largest_difference,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from system import storage
from system.config import LoraConfig
from system.errors import ConfigError, DataError, StageError
from system.training.job import Ranks, run_job
from system.training.log import lost_trackers
from system.training.plan import write_plan
from system.training.trackers import Trackers, check_trackers


@pytest.mark.parametrize("damage", ["none", "truncated", "garbage", "metrics ahead"])
def test_killed_job_ends_as_if_nothing_had_happened(tmp_path, base, damage):
    whole, broken = (build_job(tmp_path / name, base) for name in ("whole", "broken"))
    expected = run_job(whole, Ranks(), CPU)
    run_killed(broken, at_step=4)
    newest = max((Path(broken.output_uri) / "checkpoints").iterdir())
    data = next(newest.glob("*.distcp"))
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "garbage":
        data.write_bytes(b"\xff" * data.stat().st_size)
    elif damage == "metrics ahead":  # a part that was written just before its checkpoint failed
        part = Path(broken.output_uri) / "metrics" / "part-00000004.jsonl"
        part.write_text('{"step": 4, "loss": -1}\n')
    found = run_job(broken, Ranks(), CPU)
    assert largest_difference(weights(whole), weights(broken)) == 0.0
    assert without_times(metrics(broken)) == without_times(metrics(whole))
    counted = ("num_steps", "num_tokens", "num_labels", "first_loss", "last_loss")
    assert all(getattr(found, name) == getattr(expected, name) for name in counted)


@pytest.mark.parametrize("damage", ["none", "truncated", "uncommitted"])
def test_killed_job_on_an_object_store_ends_as_if_nothing_had_happened(tmp_path, base, damage):
    """Checkpoints, metrics and export go straight to an fsspec file system, here one in memory."""
    whole = build_job(tmp_path, base)
    run_job(whole, Ranks(), CPU)
    root = f"memory://bucket/{damage}/out"
    broken = dataclasses.replace(whole, output_uri=root)
    run_killed(broken, at_step=4)
    names = storage.list_names(storage.join(root, "checkpoints"))
    newest = storage.join(root, "checkpoints", max(n for n in names if n.startswith("step-")))
    data = storage.join(newest, "__0_0.distcp")
    if damage == "truncated":
        storage.write_bytes(data, storage.read_bytes(data)[:-1])
    elif damage == "uncommitted":
        storage.delete(storage.join(newest, "COMMIT.json"))
    run_job(broken, Ranks(), CPU)
    steps = [json.loads(line) for line in storage.read_bytes(f"{root}/metrics.jsonl").splitlines()]
    resumed = [record["step"] for record in steps if record["attempt"] != steps[0]["attempt"]]
    assert resumed[0] == (4 if damage == "none" else 2)
    found = load_bytes(storage.read_bytes(storage.join(root, "model", "model.safetensors")))
    assert largest_difference(weights(whole), found) == 0.0
    assert without_times(steps) == without_times(metrics(whole))


def test_an_attempt_that_was_taken_over_delivers_nothing(tmp_path, base):
    """Workers that outlive their driver within the last interval of the training."""
    job = build_job(tmp_path, base)
    attempt = Path(job.output_uri) / "checkpoints" / "attempt.json"

    def take_over(report: dict) -> None:
        if report["step"] == 4:  # the last checkpoint of six steps
            attempt.write_text('{"attempt": "another"}')

    with pytest.raises(StageError, match="taken over"):
        run_job(job, Ranks(), CPU, take_over)
    assert not (Path(job.output_uri) / "model").exists()
    assert not (Path(job.output_uri) / "done.json").exists()


def test_finished_job_is_not_trained_again(tmp_path, base):
    job = build_job(tmp_path, base)
    first = run_job(job, Ranks(), CPU)
    marker = Path(job.output_uri) / "model" / "model.safetensors"
    before = marker.stat().st_mtime_ns
    assert run_job(job, Ranks(), CPU) == first
    assert marker.stat().st_mtime_ns == before


def test_directory_of_another_job_is_refused(tmp_path, base):
    job = build_job(tmp_path, base)
    run_job(job, Ranks(), CPU)
    other = dataclasses.replace(job, settings=build_settings(learning_rate=2e-2))
    with pytest.raises(DataError, match=r"another training \(settings differ\)"):
        run_job(other, Ranks(), CPU)


def test_a_training_goes_on_with_another_layout_of_the_work(tmp_path, base):
    """As after it ran out of memory: smaller passes, activations computed again."""
    whole = build_job(tmp_path / "whole", base)
    run_job(whole, Ranks(), CPU)
    job = build_job(tmp_path / "stopped", base)
    run_killed(job, at_step=2)
    layout = {"micro_batch_tokens": 64, "activation_checkpointing": True}
    steps = []
    run_job(
        dataclasses.replace(job, settings=build_settings(**layout)), Ranks(), CPU,
        lambda report: steps.append(report["step"]),
    )  # fmt: skip
    assert steps == [4], "it went on after the checkpoint before step 2"
    assert largest_difference(weights(whole), weights(job)) < 1e-5


@pytest.mark.parametrize("changed", ["model", "tokenizer", "plan", "settings"])
def test_checkpoint_of_another_training_is_refused_and_only_the_difference_named(
    tmp_path,
    base,
    changed,
):
    job = build_job(tmp_path, base)
    run_killed(job, at_step=2)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    if changed == "model":
        tokenizer = build_tokenizer(CHATML)
        build_model(vocab_size=len(tokenizer), seed=5).save_pretrained(other)
    elif changed == "tokenizer":
        (other / "chat_template.jinja").write_text(CHATML + " ")
    elif changed == "plan":
        write_plan(job.plan_uri, build_small_plan(build_tokens(48, seed=1), batch_size=8))
    else:
        job = dataclasses.replace(job, settings=build_settings(learning_rate=2e-2))
    with pytest.raises(
        DataError,
        match=rf"another training.*\({changed}: [^;]* in the checkpoint, .* in this training\)",
    ):
        run_job(dataclasses.replace(job, model_dir=str(other)), Ranks(), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_export_is_a_complete_model_directory(tmp_path, base, lora, dtype):
    job = build_job(
        tmp_path, base, settings=build_settings(lora=lora), export_dtype=dtype, keep_checkpoints=0,
        base_model="tiny", hashes={"select": "abc"},
    )  # fmt: skip
    run_job(job, Ranks(), CPU)
    folder = Path(job.output_uri) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert model.config.use_cache and model.config.tie_word_embeddings
    assert "lm_head.weight" not in weights(job)
    before = AutoModelForCausalLM.from_pretrained(base)
    assert (
        largest_difference(
            {n: p.float() for n, p in model.named_parameters()}, dict(before.named_parameters())
        )
        > 1e-3
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    card = (folder / "README.md").read_text()
    for text in ("`tiny`", "| math | 16 |", "first, second", "select: `abc`", "training plan: `"):
        assert text in card
    assert (Path(job.output_uri) / "adapter").exists() == (lora is not None)
    assert not (Path(job.output_uri) / "checkpoints").exists()


def tensorboard_scalars(folder: Path) -> dict[str, list[int]]:
    """Steps by tag; an event file is a row of (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[str, list[int]] = {}
    (path,) = folder.glob("events.*")
    data = path.read_bytes()
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        place += length + 16
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append(event.step)
    return scalars


def test_tensorboard_gets_every_step(tmp_path, base):
    job = build_job(tmp_path, base, log_to=("tensorboard",))
    run_job(job, Ranks(), CPU)
    scalars = tensorboard_scalars(Path(job.output_uri) / "tensorboard")
    assert scalars["loss"] == list(range(6))
    assert {"loss/code", "loss/math", "grad_norm"} <= scalars.keys()


class Run:
    """A curve of a tracker that goes away at a step."""

    def __init__(self, gone_at: int) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.gone_at = gone_at
        self.is_finished = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == self.gone_at:
            raise ConnectionError("the server is away")
        self.points[step] = metrics

    def finish(self) -> None:
        self.is_finished = True


@pytest.mark.parametrize("gone_at", [-1, 3])
def test_a_tracker_that_goes_away_ends_no_training(tmp_path, base, monkeypatch, gone_at):
    run = Run(gone_at)
    wandb = SimpleNamespace(init=lambda **settings: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    job = build_job(tmp_path, base, log_to=("wandb",))
    model = run_job(job, Ranks(), CPU)
    assert model.num_steps == 6
    lost = lost_trackers(model.metrics_uri)
    if gone_at < 0:
        assert list(run.points) == list(range(6)) and run.is_finished and lost == {}
        assert {"loss", "loss/math", "grad_norm"} <= run.points[0].keys()
    else:
        assert list(run.points) == [0, 1, 2]
        assert "at step 3" in lost["wandb"] and "the server is away" in lost["wandb"]


def test_a_tracker_that_cannot_be_opened_is_an_error_only_before_the_first_step(
    tmp_path, monkeypatch
):
    def init(**settings):
        raise ConnectionError("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match=r"train\.log_to: wandb cannot be opened.*no key"):
        Trackers(["wandb"], str(tmp_path), "train", is_resumed=False)
    assert "no key" in Trackers(["wandb"], str(tmp_path), "train", is_resumed=True).lost["wandb"]


def test_mlflow_continues_its_run_and_takes_every_name(tmp_path, monkeypatch):
    """MLflow refuses a metric whose name has other than these characters."""
    taken, started = {}, []

    def log_metrics(metrics, step):
        assert all(re.fullmatch(r"[\w./ -]+", name) for name in metrics), metrics
        taken[step] = metrics

    def start_run(**settings):
        started.append(settings)
        return contextlib.nullcontext()

    found: list[Any] = []
    mlflow = SimpleNamespace(
        set_experiment=lambda name: None, search_runs=lambda **query: found,
        start_run=start_run, log_metrics=log_metrics,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    record = {
        "step": 7, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "mfu": None,
        "tokens_per_second": 5.0, "memory_bytes": 1, "heldout_loss": 1.5,
        "category_loss": {"c++": 1.0, "c#$": 2.0, "Q&A": 3.0, "math": 4.0},
    }  # fmt: skip
    Trackers(["mlflow"], str(tmp_path), "train", is_resumed=False).write(record)
    found.append(SimpleNamespace(info=SimpleNamespace(run_id="r1")))
    Trackers(["mlflow"], str(tmp_path), "train", is_resumed=True).write({**record, "step": 8})
    assert started[0]["run_name"] == "train" and started[1] == {"run_id": "r1"}
    assert taken[7] == taken[8] and "mfu" not in taken[7] and taken[7]["heldout_loss"] == 1.5
    of_categories = {name: value for name, value in taken[7].items() if name.startswith("loss/")}
    assert sorted(of_categories.values()) == [1.0, 2.0, 3.0, 4.0]
    assert of_categories["loss/math"] == 4.0


def test_tracker_that_cannot_be_used_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="pip install mlflow"):
        check_trackers(["mlflow"], str(tmp_path))
    with pytest.raises(ConfigError, match="needs a run directory on a local disk"):
        check_trackers(["tensorboard"], "s3://bucket/run")


def test_damaged_plan_is_refused(tmp_path, base):
    job = build_job(tmp_path, base)
    other = build_small_plan(build_tokens(48, seed=3), batch_size=8)
    table = other.table.replace_schema_metadata(
        {"instructmix.plan": "1", "instructmix.sha256": "0" * 64}
    )
    storage.write_table(job.plan_uri, table)
    with pytest.raises(DataError, match="was changed"):
        run_job(job, Ranks(), CPU)


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond that, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("place", ["checkpoint", "model"])
def test_full_disk_is_told_and_a_rerun_ends_in_the_same_bits(tmp_path, base, place):
    every = 2 if place == "checkpoint" else 100
    whole, broken = (
        build_job(tmp_path / name, base, checkpoint_every=every) for name in ("whole", "broken")
    )
    run_job(whole, Ranks(), CPU)
    size = (Path(whole.output_uri) / "model" / "model.safetensors").stat().st_size
    what = "the checkpoint before step 2" if place == "checkpoint" else "the trained model"
    with (
        files_of_at_most(size // 2),
        pytest.raises(StageError, match=rf"room for {what}.*run again"),
    ):
        run_job(broken, Ranks(), CPU)
    assert not list(Path(broken.output_uri).glob("checkpoints/step-*"))
    assert not (Path(broken.output_uri) / "done.json").exists()
    run_job(broken, Ranks(), CPU)
    assert largest_difference(weights(whole), weights(broken)) == 0.0
    assert without_times(metrics(broken)) == without_times(metrics(whole))
