from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from training_builders import (
    build_model,
    build_settings,
    build_small_plan,
    build_tokens,
    largest_difference,
    weights_of,
)

from system import storage
from system.config import LoraConfig
from system.errors import DataError, StageError
from system.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_checkpoints,
    load_checkpoint,
    resumable,
)
from system.training.train import Training

IDENTITY = {"plan": "a" * 64, "settings": "b" * 64, "model": "c" * 64}
LORA = LoraConfig(rank=2, dropout=0.2, targets=("q_proj", "v_proj"))


def plan_of_six_steps():
    return build_small_plan(build_tokens(48), batch_size=8)


def run_all(root: Path | str | None, *, keep: int = 2, is_async: bool = False, **changes):
    """Six steps without a break, saving after steps 2 and 4."""
    model = build_model()
    with Training(model, plan_of_six_steps(), build_settings(**changes)) as training:
        if root is None:
            writer = None
        else:
            writer = CheckpointWriter(str(root), IDENTITY, keep=keep, is_async=is_async)
        for step in range(6):
            training.step(step)
            if writer is not None:
                if step in (1, 3):
                    writer.save(training, step + 1, {"tokens": step})
                writer.poll()
        if writer is not None:
            writer.finish()
    return weights_of(model)


def resume(root: Path, **changes):
    """A new model, continued from the newest checkpoint to the end."""
    model = build_model(seed=99)
    newest = find_checkpoints(str(root), IDENTITY)[0]
    with Training(model, plan_of_six_steps(), build_settings(**changes)) as training:
        if changes.get("lora") is not None:  # frozen weights come from the base model
            frozen = dict(build_model().named_parameters())
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    parameter.data.copy_(frozen[name.replace(".base_layer", "")])
        load_checkpoint(newest, training)
        for step in range(newest.step, 6):
            training.step(step)
    return weights_of(model), newest


def load_into(model, checkpoint: Checkpoint) -> None:
    with Training(model, plan_of_six_steps(), build_settings()) as training:
        load_checkpoint(checkpoint, training)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_resumed_training_ends_in_the_same_bits(tmp_path, lora, is_async):
    whole = run_all(tmp_path, lora=lora, is_async=is_async)
    resumed, newest = resume(tmp_path, lora=lora)
    assert newest.step == 4 and newest.counters == {"tokens": 3}
    assert largest_difference(whole, resumed) == 0.0


def test_saving_does_not_disturb_the_training(tmp_path):
    assert largest_difference(run_all(tmp_path), run_all(None)) == 0.0


@pytest.mark.parametrize(
    "damage", ["truncate", "remove", "uncommitted", "torn commit", "{}", "[]", "null", "stray"]
)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    whole = run_all(tmp_path)
    newest = Path(find_checkpoints(str(tmp_path), IDENTITY)[0].uri)
    data = newest / "__0_0.distcp"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "remove":
        (newest / ".metadata").unlink()
    elif damage == "uncommitted":
        (newest / "COMMIT.json").unlink()
    elif damage == "torn commit":
        commit = newest / "COMMIT.json"
        commit.write_bytes(commit.read_bytes()[:-20])
    elif damage in ("{}", "[]", "null"):
        (newest / "COMMIT.json").write_text(damage)
    else:
        data.unlink()
        (tmp_path / "step-00000006-dead00").mkdir()
    resumed, used = resume(tmp_path)
    assert used.step == 2
    assert largest_difference(whole, resumed) == 0.0


def test_unreadable_checkpoint_of_the_right_size_is_taken_out_of_the_way(tmp_path):
    run_all(tmp_path)
    newest = find_checkpoints(str(tmp_path), IDENTITY)[0]
    metadata = Path(newest.uri) / ".metadata"
    metadata.write_bytes(b"\0" * metadata.stat().st_size)
    with pytest.raises(StageError, match="marked as unusable"):
        resume(tmp_path)
    assert resume(tmp_path)[1].step == 2


def test_an_unreachable_storage_costs_no_checkpoint(tmp_path, monkeypatch):
    """Else an outage during a resume would throw one checkpoint after the other away."""
    root = f"memory://outage/{tmp_path.name}"
    run_all(root)
    newest = find_checkpoints(root, IDENTITY)[0]

    def unreachable(self, path, mode="rb", **_):
        raise ConnectionError("the object store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", unreachable)
        with pytest.raises(ConnectionError, match="does not answer"):
            load_into(build_model(), newest)
    assert [c.step for c in find_checkpoints(root, IDENTITY)] == [4, 2]


@pytest.mark.parametrize("error", [MemoryError("none left"), torch.OutOfMemoryError("none left")])
def test_too_little_memory_to_load_costs_no_checkpoint(tmp_path, monkeypatch, error):
    run_all(tmp_path)

    def no_memory(self, *_, **__):
        raise error

    newest = find_checkpoints(str(tmp_path), IDENTITY)[0]
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.FileSystemReader.read_data", no_memory)
        with pytest.raises(type(error), match="none left"):
            load_into(build_model(), newest)
    assert find_checkpoints(str(tmp_path), IDENTITY)[0] == newest


def test_checkpoint_with_other_tensors_is_refused_and_stays(tmp_path):
    """The same plan, settings and model by their hashes, but other libraries make other names."""
    run_all(tmp_path)
    newest = find_checkpoints(str(tmp_path), IDENTITY)[0]
    with pytest.raises(
        DataError,
        match=r"the first is 'exp_avg\..*\(200, 32\) in the checkpoint, \(200, 64\) in this",
    ):
        load_into(build_model(hidden_size=64), newest)
    with pytest.raises(DataError, match=r"'exp_avg\.lm_head\.weight': shape none in the"):
        load_into(build_model(tied=False), newest)
    assert find_checkpoints(str(tmp_path), IDENTITY)[0] == newest


@pytest.mark.parametrize("field", ["plan", "settings", "model"])
def test_checkpoint_of_another_training_is_refused_with_the_difference(tmp_path, field):
    run_all(tmp_path)
    with pytest.raises(DataError, match=rf"{field}: .*0000000000000000 in this training"):
        find_checkpoints(str(tmp_path), IDENTITY | {field: "0" * 64})


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_checkpoints_stay(tmp_path, keep):
    run_all(tmp_path, keep=keep)
    assert [c.step for c in find_checkpoints(str(tmp_path), IDENTITY)] == [4, 2][:keep]
    assert len(list(tmp_path.glob("step-*"))) == keep


def test_failed_save_leaves_the_older_checkpoints_usable(tmp_path, monkeypatch):
    model = build_model()
    with Training(model, plan_of_six_steps(), build_settings()) as training:
        writer = CheckpointWriter(str(tmp_path), IDENTITY, keep=1)
        training.step(0)
        writer.save(training, 1, {})

        def no_space(uri, value):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage, "write_json", no_space)
        training.step(1)
        with pytest.raises(StageError, match=r"storage full.*No space.*run again"):
            writer.save(training, 2, {})
    assert [c.step for c in find_checkpoints(str(tmp_path), IDENTITY)] == [1]


def test_commit_says_what_the_checkpoint_is(tmp_path):
    run_all(tmp_path)
    newest = Path(find_checkpoints(str(tmp_path), IDENTITY)[0].uri)
    commit = json.loads((newest / "COMMIT.json").read_text())
    assert commit["identity"] == IDENTITY and commit["step"] == 4
    assert commit["versions"]["torch"] == torch.__version__
    assert set(commit["files"]) == {"__0_0.distcp", ".metadata"}


def test_an_attempt_that_was_taken_over_commits_nothing_more(tmp_path):
    model = build_model()
    with Training(model, plan_of_six_steps(), build_settings()) as training:
        orphan = CheckpointWriter(str(tmp_path), IDENTITY, keep=1)
        orphan.save(training, 1, {})
        successor = CheckpointWriter(str(tmp_path), IDENTITY, keep=1)
        successor.save(training, 2, {})
        with pytest.raises(StageError, match="taken over"):
            orphan.save(training, 3, {})
    assert [c.step for c in find_checkpoints(str(tmp_path), IDENTITY)] == [2]


def test_the_best_checkpoint_stays_however_old_and_without_it_none_after_it_is_used(tmp_path):
    model = build_model()
    with Training(model, plan_of_six_steps(), build_settings()) as training:
        writer = CheckpointWriter(str(tmp_path), IDENTITY, keep=1)
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
            writer.save(training, step, {}, best)
    found = find_checkpoints(str(tmp_path), IDENTITY)
    assert [c.step for c in found] == [4, 2]
    assert [c.step for c in resumable(found)] == [4, 2]
    assert resumable([c for c in found if c.step != 2]) == []


class Program:
    """A pickle that calls a function when it is read."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("function", [os.mkdir, eval, os.system, torch.load])
def test_metadata_of_a_checkpoint_runs_no_code(tmp_path, place, function):
    root = str(tmp_path / "c") if place == "local" else f"memory://code/{tmp_path.name}"
    run_all(root)
    newest = find_checkpoints(root, IDENTITY)[0]
    mark = tmp_path / "mark"
    mark_it = {eval: f"__import__('os').mkdir({str(mark)!r})", os.system: f"mkdir {mark}"}
    planted = pickle.dumps({"metadata": Program(function, mark_it.get(function, str(mark)))})
    storage.write_bytes(f"{newest.uri}/.metadata", planted)
    commit = storage.read_json(f"{newest.uri}/COMMIT.json")
    commit["files"][".metadata"] = len(planted)
    storage.write_json(f"{newest.uri}/COMMIT.json", commit)
    newest = find_checkpoints(root, IDENTITY)[0]
    with pytest.raises(StageError, match=r"names \w+\.[\w.]+, which no checkpoint needs"):
        load_into(build_model(), newest)
    assert not mark.exists()
    assert find_checkpoints(root, IDENTITY)[0].step == 2


def test_metadata_of_a_checkpoint_names_no_file_outside(tmp_path):
    run_all(tmp_path)
    newest = find_checkpoints(str(tmp_path), IDENTITY)[0]
    path = Path(newest.uri) / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(StageError, match="outside"):
        load_into(build_model(), newest)
