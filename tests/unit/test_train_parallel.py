"""Two real processes over gloo: every training equals the one of a single process."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from training_builders import (
    build_model,
    build_settings,
    build_small_plan,
    build_tokens,
    largest_difference,
    weights_of,
)

from system.config import LoraConfig
from system.training.checkpoint import CheckpointWriter, find_checkpoints, load_checkpoint
from system.training.export import whole_state
from system.training.heldout import held_out_loss
from system.training.train import Training

pytestmark = pytest.mark.slow

IDENTITY = {"plan": "p", "settings": "s", "model": "m"}
LORA = LoraConfig(rank=2, targets=("q_proj", "up_proj"))
CASES = {
    "ddp": {"parallel": "ddp"},
    "ddp-lora": {"parallel": "ddp", "lora": LORA},
    "fsdp": {"parallel": "fsdp"},
    "fsdp-lora": {"parallel": "fsdp", "lora": LORA},
    "fsdp-small-passes": {"parallel": "fsdp", "micro_batch_tokens": 40},
    "fsdp-recomputed": {"parallel": "fsdp", "activation_checkpointing": True},
}
if shutil.which("g++") or shutil.which("clang++"):
    CASES["fsdp-compiled"] = {"parallel": "fsdp", "compile": True}
HELD_OUT = build_small_plan(build_tokens(13, seed=7), batch_size=5)
"""An odd number of rows, so that ranks differ in their number of passes."""
MASKED = np.arange(48) % 5 != 0


def plan_of_six_steps():
    return build_small_plan(build_tokens(48), batch_size=8)


def train(case: str, group, root: Path, *, start: int = 0, save_at: int | None = None):
    """The training of a case from `start`, its weights gathered and its losses."""
    model = build_model()
    settings = build_settings(**CASES[case])
    losses = []
    with Training(model, plan_of_six_steps(), settings, active=MASKED, group=group) as training:
        writer = CheckpointWriter(str(root), IDENTITY, keep=2, group=group)
        if start:
            (newest,) = find_checkpoints(str(root), IDENTITY)
            assert newest.step == start
            load_checkpoint(newest, training, group)
        for step in range(start, 6):
            stats = training.step(step)
            heldout = held_out_loss(training, HELD_OUT)
            losses.append((stats.loss, stats.grad_norm, stats.num_tokens, heldout))
            if step + 1 == save_at:
                writer.save(training, step + 1, {})
        weights = whole_state(training)
    return weights, losses


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=world_size
    )
    for case in CASES:
        result = train(case, dist.group.WORLD, root / f"{case}-2", save_at=3)
        if rank == 0:
            torch.save(result, root / f"{case}-2.pt")
    for case in ("ddp", "fsdp"):  # written by one process, resumed by two
        result = train(case, dist.group.WORLD, root / f"{case}-1", start=3)
        if rank == 0:
            torch.save(result, root / f"{case}-1-to-2.pt")
    result = train(
        "fsdp", dist.group.WORLD, root / "ddp-2", start=3
    )  # saved whole, resumed sharded
    if rank == 0:
        torch.save(result, root / "ddp-to-fsdp.pt")
    dist.destroy_process_group()


def run_one_of_four(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous-4", rank=rank, world_size=4
    )
    for case in ("ddp", "fsdp"):
        result = train(case, dist.group.WORLD, root / f"{case}-4")
        if rank == 0:
            torch.save(result, root / f"{case}-4.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(train(case, None, root / f"{case}-1", save_at=3), root / f"{case}-1.pt")
    multiprocessing.spawn(run_rank, args=(2, str(root)), nprocs=2)
    return root


def loaded(folder: Path, name: str):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_model_of_one(folder, case):
    alone, losses_alone = loaded(folder, f"{case}-1")
    together, losses = loaded(folder, f"{case}-2")
    assert largest_difference(alone, together) < 5e-6
    assert np.allclose(losses_alone, losses, rtol=1e-5)
    start = weights_of(build_model())  # adapters that do the work start from zero
    moved = {name: value - start.get(name, 0.0) for name, value in together.items()}
    assert max(float(v.abs().max()) for n, v in moved.items() if "lora_A" not in n) > 1e-3


def test_four_ranks_train_the_model_of_one(folder):
    multiprocessing.spawn(run_one_of_four, args=(str(folder),), nprocs=4)
    for case in ("ddp", "fsdp"):
        alone, losses_alone = loaded(folder, f"{case}-1")
        together, losses = loaded(folder, f"{case}-4")
        assert largest_difference(alone, together) < 5e-6
        assert np.allclose(losses_alone, losses, rtol=1e-5)


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_training_resumes_with_more_ranks(folder, case):
    alone, losses_alone = loaded(folder, f"{case}-1")
    resumed, losses = loaded(folder, f"{case}-1-to-2")
    assert largest_difference(alone, resumed) < 5e-6
    assert np.allclose(losses_alone[3:], losses, rtol=1e-5)


@pytest.mark.parametrize("case", ["ddp", "ddp-lora", "fsdp", "fsdp-lora"])
def test_training_resumes_with_fewer_ranks(folder, case):
    together, losses_together = loaded(folder, f"{case}-2")
    resumed, losses = train(case, None, folder / f"{case}-2", start=3)
    assert largest_difference(together, resumed) < 5e-6
    assert np.allclose(losses_together[3:], losses, rtol=1e-5)


def test_whole_checkpoint_resumes_sharded(folder):
    together, _ = loaded(folder, "ddp-2")
    resumed, _ = loaded(folder, "ddp-to-fsdp")
    assert largest_difference(together, resumed) < 5e-6
