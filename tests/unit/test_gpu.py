"""What only a GPU can show: bf16, FlashAttention, fused AdamW, FSDP2 on a device, equal bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from training_builders import (
    build_model,
    build_settings,
    build_small_plan,
    largest_difference,
    weights_of,
)

from system.training.attention import build_segments, segment_attention
from system.training.checkpoint import CheckpointWriter, find_checkpoints, load_checkpoint
from system.training.layout import training_layout
from system.training.microbatch import Layout, build_microbatch
from system.training.objective import Objective
from system.training.train import Training, train_on_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

GPU = torch.device("cuda")
IDENTITY = {"plan": "p", "settings": "s", "model": "m"}
HALF = {"dtype": "bfloat16", "micro_batch_tokens": 300}


def gpu_model(**changes):
    """Weights as large as a model's, in float32 on the GPU; head size 64, shared heads."""
    return build_model(hidden_size=256, spread=0.05, **changes).to(GPU)


@pytest.fixture
def group(tmp_path):
    """A group of this process alone, as Ray Train makes it on a GPU."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("window", [None, 1, 17, 64, 1000])
@pytest.mark.parametrize("head_size", [64, 128])
def test_flash_attention_equals_rows_apart_in_float32(window, head_size):
    lengths = np.array([130, 64, 17, 2, 1])
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [(1, heads, lengths.sum(), head_size) for heads in (8, 2, 2)]
    exact = [
        torch.randn(shape, generator=generator, device=GPU).requires_grad_() for shape in shapes
    ]
    half = [states.detach().bfloat16().requires_grad_() for states in exact]
    found, _ = segment_attention(
        torch.nn.Identity(),
        *half,
        None,
        segments=build_segments(lengths, GPU, has_flash=True),
        sliding_window=window,
    )
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(GPU)
    place = torch.arange(len(owner), device=GPU)
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    query, key, value = exact
    key, value = (states.repeat_interleave(4, dim=1) for states in (key, value))
    scores = (query @ key.transpose(2, 3) / head_size**0.5).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=2e-2)
    direction = torch.randn(expected.shape, generator=generator, device=GPU)
    gradients = torch.autograd.grad((found.float() * direction).sum(), half)
    references = torch.autograd.grad((expected * direction).sum(), exact)
    for gradient, reference in zip(gradients, references, strict=True):
        gap = (gradient.float() - reference).norm() / reference.norm()
        assert float(gap) < 0.02


def test_training_in_half_precision_takes_flash_attention_and_stays_near_float32():
    plan = build_small_plan()
    rows = np.arange(12)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        objective = Objective(gpu_model(), dtype)
        with training_layout(objective) as layout:
            assert layout == Layout(
                is_flat=True, head="blocks", has_flash=dtype == torch.bfloat16
            ), str(layout)
            batch = build_microbatch(plan, rows, layout=layout, device=GPU)
            losses[dtype] = objective(batch)[1].cpu().numpy()
    np.testing.assert_allclose(losses[torch.bfloat16], losses[torch.float32], atol=0.05)


def test_half_precision_training_learns_what_float32_learns():
    plan = build_small_plan()
    start = weights_of(gpu_model())
    trained = {}
    for dtype in ("float32", "bfloat16"):
        model = gpu_model()
        train_on_plan(model, plan, build_settings(dtype=dtype, learning_rate=1e-3))
        trained[dtype] = weights_of(model)
    moved = sum(float((trained["float32"][n] - start[n]).square().sum()) for n in start) ** 0.5
    apart = sum(
        float((trained["float32"][n] - trained["bfloat16"][n]).square().sum()) for n in start
    )
    assert apart**0.5 < 0.3 * moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_work_gives_the_same_bits(dtype):
    results = []
    for _ in range(2):
        model = gpu_model()
        train_on_plan(model, build_small_plan(), build_settings(dtype=dtype))
        results.append(weights_of(model))
    assert largest_difference(*results) == 0.0


def test_sharded_training_on_one_device_is_fused_and_equals_the_replicated_one(group):
    plan = build_small_plan()
    trained, losses = {}, {}
    for parallel in ("ddp", "fsdp"):
        model = gpu_model()
        settings = build_settings(parallel=parallel, learning_rate=1e-3)
        with Training(model, plan, settings, group=group) as training:
            optimizer = training.parallel.optimizer
            assert optimizer.defaults["fused"] is True
            assert {state["step"].device.type for state in optimizer.state.values()} == {"cuda"}
            losses[parallel] = [training.step(step).loss for step in range(plan.num_steps)]
            state = training.state()
            trained[parallel] = {
                name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
                for name, value in state.items()
                if name.startswith("weight.")
            }
    np.testing.assert_allclose(losses["ddp"], losses["fsdp"], atol=1e-4)
    assert largest_difference(trained["ddp"], trained["fsdp"]) < 1e-4


def test_sharded_half_precision_training_takes_flash_attention(group):
    with Training(
        gpu_model(), build_small_plan(), build_settings(parallel="fsdp", **HALF), group=group
    ) as training:
        stats = training.step(0)
    assert "FlashAttention" in stats.layout and np.isfinite(stats.loss)


def test_training_resumes_to_the_same_bits(tmp_path):
    plan = build_small_plan()
    whole = gpu_model()
    train_on_plan(whole, plan, build_settings(**HALF))
    with Training(gpu_model(), plan, build_settings(**HALF)) as training:
        writer = CheckpointWriter(str(tmp_path), IDENTITY, keep=2, is_async=True)
        training.step(0)
        writer.save(training, 1, {})
        training.step(1)  # while the checkpoint is written
        writer.finish()
    resumed = gpu_model(seed=1)
    with Training(resumed, plan, build_settings(**HALF)) as training:
        (newest,) = find_checkpoints(str(tmp_path), IDENTITY)
        load_checkpoint(newest, training, None)
        for step in range(newest.step, plan.num_steps):
            training.step(step)
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0
