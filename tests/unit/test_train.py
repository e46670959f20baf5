from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference_training import loop_gradient, reference_gradient, trained
from training_builders import (
    build_model,
    build_settings,
    build_small_plan,
    build_tokens,
    largest_difference,
    weights_of,
)
from transformers import GPT2Config, GPT2LMHeadModel

from system.config import LoraConfig
from system.errors import ModelError, StageError
from system.training.attention import build_segments, segment_attention
from system.training.layout import training_layout
from system.training.loss import block_bytes, head_loss
from system.training.microbatch import Layout, build_microbatch
from system.training.objective import Objective
from system.training.optim import learning_rate
from system.training.train import Training, train_on_plan


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 200, 100_000])
def test_gradient_equals_the_row_by_row_definition(tied, packing, micro_batch_tokens):
    plan = build_small_plan(packing=packing)
    expected = reference_gradient(build_model(tied=tied), plan, 1)
    found = loop_gradient(build_model(tied=tied), plan, 1, micro_batch_tokens=micro_batch_tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=2e-5)


def test_packed_training_ends_in_the_weights_of_unpacked_training():
    packed = trained(build_small_plan(packing=True))
    plan = build_small_plan(packing=False)
    loose = trained(plan, packing=False)
    with Training(build_model(), plan, build_settings(packing=False)) as training:
        assert [len(rows) for rows, _ in training.passes(plan, 0)] == [1] * len(plan.rows(0, 0, 1))
    assert largest_difference(packed, loose) < 2e-6
    assert largest_difference(packed, weights_of(build_model())) > 1e-3


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_that_of_torch(max_norm):
    """AdamW hardly notices the size of a gradient, so trained weights would not show it."""
    plan = build_small_plan()
    gradient = loop_gradient(build_model(), plan, 0)
    model = build_model()
    for name, parameter in model.named_parameters():
        parameter.grad = gradient[name]
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    clipped = build_model()
    with Training(clipped, plan, build_settings(max_grad_norm=max_norm)) as training:
        training._accumulate(0)
        norm = training.parallel.clip_gradient(max_norm)
        assert norm == pytest.approx(float(expected), rel=1e-5)
        assert (norm > max_norm) == (max_norm < 1)
        wanted = dict(model.named_parameters())
        for name, parameter in clipped.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-9, rtol=1e-4)


def test_rows_do_not_see_their_neighbours_in_a_pass():
    plan = build_small_plan()
    model = build_model()
    objective = Objective(model, torch.float32)
    device = torch.device("cpu")
    with training_layout(objective) as layout:
        assert layout == Layout(is_flat=True, head="blocks")

        def losses(rows: list[int]) -> dict[int, np.ndarray]:
            batch = build_microbatch(plan, np.array(rows), layout=layout, device=device)
            nll_M = objective(batch)[1].numpy()
            return {row: nll_M[batch.label_rows == row] for row in rows}

        together = losses([3, 0, 7, 5])
        for row, found in together.items():
            np.testing.assert_allclose(found, losses([row])[row], atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_masked_rows_leave_the_gradient_of_all_others_untouched():
    plan = build_small_plan()
    active = np.arange(plan.table.num_rows) % 3 != 0
    rows = plan.rows(1)
    expected = reference_gradient(build_model(), plan, 1, rows[active[rows]])
    found = loop_gradient(build_model(), plan, 1, active=active)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=2e-5)


def test_step_without_active_rows_still_moves_by_momentum_alone():
    plan = build_small_plan()
    active = np.ones(plan.table.num_rows, dtype=bool)
    active[plan.rows(1)] = False
    model = build_model()
    with Training(model, plan, build_settings(weight_decay=0.0), active=active) as training:
        training.step(0)
        before = weights_of(model)
        stats = training.step(1)
    assert stats.num_labels == 0 and stats.loss == 0.0 and stats.grad_norm == 0.0
    assert 0.0 < largest_difference(before, weights_of(model)) < 2e-2


def test_same_work_gives_the_same_bits():
    plan = build_small_plan()
    assert largest_difference(trained(plan), trained(plan)) == 0.0


def test_activation_checkpointing_changes_memory_only():
    plan = build_small_plan()
    assert largest_difference(trained(plan), trained(plan, activation_checkpointing=True)) < 1e-6


def test_losses_are_means_over_response_tokens_by_category():
    plan = build_small_plan()
    model = build_model()
    with Training(model, plan, build_settings()) as training:
        stats = training.step(0)
    assert stats.num_labels == plan.denominators[0]
    assert stats.num_tokens == plan.lengths(plan.rows(0)).sum()
    total = sum(nll for nll, _ in stats.category_nll.values())
    assert math.isclose(total / stats.num_labels, stats.loss)
    assert sum(count for _, count in stats.category_nll.values()) == stats.num_labels
    assert sorted(stats.category_nll) == ["code", "math", "poem"]


def test_losses_are_read_once_a_step_however_many_passes_it_has(monkeypatch):
    reads = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(1) or own(self))
    counts = {}
    for micro_batch_tokens in (1, 100_000):
        settings = build_settings(micro_batch_tokens=micro_batch_tokens)
        with Training(build_model(), build_small_plan(), settings) as training:
            assert len(list(training.passes(training.plan, 0))) == {1: 16}.get(
                micro_batch_tokens, 1
            )
            reads.clear()
            training.step(0)
            counts[micro_batch_tokens] = len(reads)
    assert len(set(counts.values())) == 1


def test_model_that_is_not_flat_safe_trains_in_the_padded_layout_to_the_same_weights():
    def model():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()

    plan = build_small_plan()
    expected = reference_gradient(model(), plan, 0)
    flat = loop_gradient(model(), plan, 0)
    padded = model()
    padded._supports_attention_backend = False
    slow = loop_gradient(padded, plan, 0)
    for name, gradient in expected.items():
        torch.testing.assert_close(flat[name], gradient, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(slow[name], gradient, atol=2e-6, rtol=2e-5)


def test_contaminating_attention_is_noticed_and_not_used(monkeypatch):
    from system.training import attention

    def leaky(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr(attention, "segment_attention", leaky)
    objective = Objective(build_model(), torch.float32)
    with training_layout(objective) as layout:
        assert not layout.is_flat
    monkeypatch.undo()
    attention.register()


def test_attention_dropout_that_flash_attention_lacks_is_refused():
    lengths = np.array([3, 2])
    segments = build_segments(lengths, torch.device("cpu"), has_flash=False)
    flash = replace(segments, buckets=())  # as on a GPU in bfloat16
    states = torch.ones(1, 2, 5, 8)
    with pytest.raises(ModelError, match="attention_dropout to 0"):
        segment_attention(torch.nn.Identity(), *[states] * 3, None, segments=flash, dropout=0.1)
    out, _ = segment_attention(
        torch.nn.Identity(), *[states] * 3, None, segments=segments, dropout=0.1
    )
    assert out.shape == (1, 5, 2, 8)


def test_lora_trains_only_adapters_and_merges_them():
    plan = build_small_plan()
    model = build_model()
    before = weights_of(model)
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    train_on_plan(model, plan, build_settings(lora=lora))
    after = weights_of(model)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 2)[-2] for name in moved} == {"q_proj", "down_proj"}
    assert all(p.requires_grad for p in model.parameters())
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 4


def test_lora_start_does_not_depend_on_the_state_of_the_generator():
    plan = build_small_plan()
    settings = build_settings(lora=LoraConfig(rank=2))
    results = []
    for noise in (1, 2):
        model = build_model()
        torch.manual_seed(noise)
        train_on_plan(model, plan, settings)
        results.append(weights_of(model))
    assert largest_difference(*results) == 0.0


@pytest.mark.parametrize("targets", [("no_such_layer",), ("lm_head",)])
def test_lora_on_layers_that_cannot_be_adapted_is_refused(targets):
    settings = build_settings(lora=LoraConfig(targets=targets))
    with pytest.raises(ModelError, match=targets[0]):
        train_on_plan(build_model(), build_small_plan(), settings)


def test_divergence_names_the_step_and_its_rows():
    plan = build_small_plan()
    with pytest.raises(StageError, match=r"step [12] of 3.*row-0"):
        train_on_plan(build_model(), plan, build_settings(learning_rate=1e30, warmup_share=0.0))


def test_damaged_weights_are_refused_before_the_first_step():
    model = build_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        train_on_plan(model, build_small_plan(), build_settings())


def test_weights_in_half_precision_are_refused():
    with pytest.raises(ModelError, match="float32"):
        train_on_plan(build_model().bfloat16(), build_small_plan(), build_settings())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup-stable-decay"])
def test_learning_rate_rises_peaks_and_falls_to_its_floor(schedule):
    settings = build_settings(
        lr_schedule=schedule, learning_rate=1.0, warmup_share=0.1, min_lr_share=0.1
    )
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 <= rates[-1] < 0.16
    if schedule == "warmup-stable-decay":
        assert rates[10:80] == pytest.approx([1.0] * 70)


@pytest.mark.parametrize("with_bias", [True, False])
def test_blockwise_head_loss_equals_autograd(monkeypatch, with_bias):
    monkeypatch.setattr("system.training.loss.BLOCK_BYTES", 4 * 50 * 7)  # 7 labels a block
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float32).requires_grad_()
        for shape in ((23, 16), (50, 16), (50,))
    )
    targets = torch.randint(0, 50, (23,), generator=generator)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    total, nll_M = head_loss(hidden, weight, bias if with_bias else None, targets)
    found = torch.autograd.grad(total * 0.3, inputs)
    logits = torch.nn.functional.linear(hidden, weight, bias if with_bias else None)
    reference = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = torch.autograd.grad(reference.sum() * 0.3, inputs)
    torch.testing.assert_close(nll_M, reference.detach())
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_head_loss_in_half_precision_and_small_blocks_stays_near_float32(monkeypatch):
    monkeypatch.setattr("system.training.loss.BLOCK_BYTES", 4 * 50 * 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.randint(0, 50, (23,), generator=generator)
    exact = torch.autograd.grad(head_loss(hidden, weight, None, targets)[0], [hidden, weight])
    total, _ = head_loss(hidden, weight, None, targets, torch.bfloat16)
    found = torch.autograd.grad(total, [hidden, weight])
    for left, right in zip(found, exact, strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right, atol=0.05, rtol=0.05)


def test_backward_of_the_head_loss_makes_no_second_gradient_of_the_head():
    weight = torch.randn(50, 16, requires_grad=True)
    total, _ = head_loss(torch.randn(23, 16), weight, None, torch.arange(23))
    assert total.grad_fn is not None
    saved = total.grad_fn.saved_tensors[1]
    (gradient,) = torch.autograd.grad(total, [weight], retain_graph=True)
    assert gradient.data_ptr() == saved.data_ptr()
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(total, [weight])


def test_blocks_of_a_gpu_follow_its_memory(monkeypatch):
    def blocks(gib: float) -> int:
        found = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        return block_bytes(torch.device("cuda"))

    assert blocks(139) == blocks(80) == 2**30
    assert blocks(24) == 24 * 2**24
    assert blocks(1) == block_bytes(torch.device("cpu")) == 64 * 2**20


def test_loss_of_huge_logits_stays_finite():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    total, nll_M = head_loss(hidden, torch.eye(2), None, torch.tensor([0, 0]))
    assert nll_M.tolist() == [0.0, 1e4] and float(total) == 1e4


def test_tokens_of_a_plan_longer_than_the_default_block_train_alike(monkeypatch):
    plan = build_small_plan(build_tokens(24, longest=120))
    whole = trained(plan)
    monkeypatch.setattr("system.training.loss.BLOCK_BYTES", 4 * 200 * 11)
    assert largest_difference(whole, trained(plan)) < 1e-5
