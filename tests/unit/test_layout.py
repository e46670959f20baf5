"""Layouts of a pass: which one a model gets, and that FlashAttention is fed what it can take.

There is no GPU in these tests: a stand-in takes the place of torch's variable-length attention,
as strict about its inputs, and bf16 comes from autocast on the CPU.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from strict_kernels import strict_varlen
from torch.nn.attention import varlen
from torch.utils import deterministic
from training_builders import build_model, build_settings, build_small_plan

from system.errors import ModelError
from system.training import attention
from system.training import layout as layout_module
from system.training.layout import training_layout
from system.training.microbatch import Layout, build_microbatch
from system.training.objective import Objective
from system.training.train import Training


@pytest.fixture
def flash(monkeypatch):
    """Lets the CPU take the way of a GPU; the dtypes that reached the operator."""
    seen: list[tuple[torch.dtype, ...]] = []

    def watched(query, key, value, *args, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        return strict_varlen(query, key, value, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    monkeypatch.setattr(attention, "may_use_flash", lambda device, dtype: dtype == torch.bfloat16)
    return seen


def losses(objective, layout):
    batch = build_microbatch(
        build_small_plan(), torch.arange(6).numpy(), layout=layout, device=torch.device("cpu")
    )
    return objective(batch)


def test_flash_attention_gets_half_precision_from_float32_weights_under_autocast(flash):
    model = build_model(spread=0.05)
    exact = Objective(model, torch.float32)
    with training_layout(exact) as layout:
        assert not layout.has_flash
        _, expected = losses(exact, layout)
    assert not flash
    objective = Objective(model, torch.bfloat16)
    with training_layout(objective) as layout:
        assert layout.is_flat and layout.has_flash
        total, found = losses(objective, layout)
        total.backward()
    assert {dtype for call in flash for dtype in call} == {torch.bfloat16}
    assert float((found - expected).abs().mean()) < 0.02
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None and bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0.0


class Strictness(torch.autograd.Function):
    """The values as they are; notes how strict torch is when their gradient passes."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, *grads):
        Strictness.seen.append(strictness())
        return grads[0]


def strictness() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_backward_of_flash_attention_alone_is_strictly_deterministic(flash, monkeypatch):
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda *a, **k: Strictness.apply(strict_varlen(*a, **k))
    )
    Strictness.seen.clear()
    model = build_model(spread=0.05)
    before = strictness()
    settings = build_settings(dtype="bfloat16")
    training = Training(model, build_small_plan(), settings)
    training.objective.compute_dtype = training.compute_dtype = torch.bfloat16  # as on a GPU
    with training:
        assert training.objective.layout.has_flash
        assert not deterministic.fill_uninitialized_memory
        Strictness.seen.clear()
        training.step(0)
        assert strictness() == (True, True)
    assert Strictness.seen and set(Strictness.seen) == {(True, False)}
    assert strictness() == before and deterministic.fill_uninitialized_memory


def test_device_without_flash_attention_falls_back_to_buckets(flash, monkeypatch):
    def too_old(*_args, **_kwargs):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(varlen, "varlen_attn", too_old)
    objective = Objective(build_model(spread=0.05), torch.bfloat16)
    with training_layout(objective) as layout:
        assert layout.is_flat and not layout.has_flash
        assert str(layout) == (
            "flat rows, SDPA over buckets, head in blocks "
            "(because FlashAttention only supports Ampere GPUs or newer.)"
        )
        assert bool(torch.isfinite(losses(objective, layout)[1]).all())


def test_flash_attention_that_lets_rows_see_one_another_is_not_used(flash, monkeypatch):
    def leaky(query, key, value, starts, starts_k, *args, **kwargs):
        whole = starts[[0, -1]]
        return strict_varlen(query, key, value, whole, whole, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", leaky)
    objective = Objective(build_model(spread=0.2), torch.bfloat16)
    with training_layout(objective) as layout:
        assert layout.is_flat and not layout.has_flash


def test_memory_that_runs_out_while_layouts_are_tried_is_not_taken_for_an_answer(
    flash, monkeypatch
):
    def hungry(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(varlen, "varlen_attn", hungry)
    with (
        pytest.raises(torch.OutOfMemoryError),
        training_layout(Objective(build_model(), torch.bfloat16)),
    ):
        pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ],
)
def test_memory_that_runs_out_in_the_flat_layout_is_not_taken_for_an_answer(monkeypatch, error):
    def hungry(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(attention, "segment_attention", hungry)
    model = build_model()
    with pytest.raises(type(error)), training_layout(Objective(model, torch.float32)):
        pass
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    attention.register()


def test_layout_and_the_reason_for_a_slow_one_are_part_of_every_step(caplog):
    layout_module._log_once.cache_clear()
    with Training(build_model(), build_small_plan(), build_settings()) as training:
        stats = training.step(0)
    assert stats.layout == "flat rows, SDPA over buckets, head in blocks" and not caplog.text
    model = build_model()
    model._supports_attention_backend = False
    with Training(model, build_small_plan(), build_settings()) as training:
        stats = training.step(0)
    told = "padded rows, transformers' attention, head in blocks (because its attention cannot"
    assert stats.layout.startswith(told) and told in caplog.text


def test_large_losses_do_not_cost_the_fast_layout():
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight *= 100.0  # losses of hundreds of nats, rounded to hundred-thousandths
    with training_layout(Objective(model, torch.float32)) as layout:
        assert layout == Layout(is_flat=True, head="blocks")


def as_rank(monkeypatch, rank: int, sent: list) -> None:
    """This process as a rank of a group; what the first rank sends is in `sent`."""

    def broadcast(box, **_):
        if rank == 0:
            sent.append(box[0])
        else:
            box[0] = sent[0]

    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: rank)
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda *_: 0)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)


def test_other_ranks_take_the_layout_of_the_first(monkeypatch):
    sent: list = []
    group: Any = object()
    as_rank(monkeypatch, 0, sent)
    slow = build_model()
    slow._supports_attention_backend = False
    with training_layout(Objective(slow, torch.float32), group) as layout:
        assert not layout.is_flat and sent == [layout]
    as_rank(monkeypatch, 1, sent)
    with training_layout(Objective(build_model(), torch.float32), group) as layout:
        assert layout is sent[0], "alone it would have found a faster one"
    model = build_model()
    sent[:] = [Layout(is_flat=True, head="blocks")]
    with training_layout(Objective(model, torch.float32), group):
        assert model.config._attn_implementation == attention.NAME


def test_every_rank_hears_that_the_first_one_failed(monkeypatch):
    sent: list = []
    group: Any = object()
    broken = build_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    for rank in (0, 1):
        as_rank(monkeypatch, rank, sent)
        with (
            pytest.raises(ModelError, match="not finite"),
            training_layout(Objective(broken, torch.float32), group),
        ):
            pass
    sent[:] = [None]
    with (
        pytest.raises(RuntimeError, match="rank 0 failed while it probed"),
        training_layout(Objective(build_model(), torch.float32), group),
    ):
        pass
