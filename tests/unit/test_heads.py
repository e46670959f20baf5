"""What models do to their logits: the same gradient, without the logits of a pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_training import loop_gradient, reference_gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_builders import build_model, build_small_plan
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from system.training.layout import training_layout
from system.training.loss import LogitForm, head_loss, logit_form
from system.training.microbatch import build_microbatch
from system.training.objective import Objective

VOCABULARY = 1009
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class OddHead(LlamaForCausalLM):
    """Does to its logits what no configuration says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3.0 * torch.sin(output.logits)
        return output


def build(name: str):
    torch.manual_seed(0)
    if name == "odd":
        return OddHead(build_model(vocab_size=VOCABULARY).config).eval()
    config, model = {
        "cohere": (CohereConfig(**SIZES, logit_scale=0.25), CohereForCausalLM),
        "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), GraniteForCausalLM),
        "gemma2": (
            Gemma2Config(
                **SIZES,
                head_dim=8,
                sliding_window=9,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                attn_implementation="eager",
            ),
            Gemma2ForCausalLM,
        ),
    }[name]
    return model(config).eval()


LAYOUTS = {
    "cohere": "flat rows, SDPA over buckets, head in blocks",
    "granite": "flat rows, SDPA over buckets, head in blocks",
    "gemma2": "padded rows, transformers' attention, head in blocks "
    "(because its attention uses softcap)",
    "odd": "flat rows, SDPA over buckets, the model's own head at labels",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_equals_the_definition(name):
    plan = build_small_plan()
    expected = reference_gradient(build(name), plan, 0)
    found = loop_gradient(build(name), plan, 0)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=2e-5, rtol=2e-4)


class WidestLogits(TorchDispatchMode):
    """Most rows of logits that any tensor made within has; the head's own weights do not count."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weights = weight.untyped_storage().data_ptr()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or tensor.shape[-1:] != (VOCABULARY,):
                continue
            if tensor.untyped_storage().data_ptr() != self.weights:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_of_a_pass_are_never_held(monkeypatch, name):
    monkeypatch.setattr("system.training.loss.BLOCK_BYTES", 4 * VOCABULARY * 5)
    plan = build_small_plan()
    objective = Objective(build(name), torch.float32)
    with training_layout(objective) as layout:
        assert str(layout).startswith(LAYOUTS[name])
        batch = build_microbatch(plan, np.arange(8), layout=layout, device=torch.device("cpu"))
        with WidestLogits(objective.model.lm_head.weight) as widest:
            objective(batch)[0].backward()
    num_labels = len(batch.targets)
    assert num_labels < batch.input_ids.numel()
    assert widest.rows == (num_labels if name == "odd" else 5)


@pytest.mark.parametrize(
    "form", [LogitForm(0.25), LogitForm(1.0, 3.0), LogitForm(4.0, 2.0)], ids=str
)
def test_shaped_head_loss_equals_autograd(monkeypatch, form):
    monkeypatch.setattr("system.training.loss.BLOCK_BYTES", 4 * 50 * 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.randint(0, 50, (23,), generator=generator)
    total, nll_M = head_loss(hidden, weight, None, targets, form=form)
    found = torch.autograd.grad(total * 0.3, [hidden, weight])
    logits = form.scale * (hidden @ weight.T)
    if form.cap is not None:
        logits = form.cap * torch.tanh(logits / form.cap)
    reference = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll_M, reference.detach())
    expected = torch.autograd.grad(reference.sum() * 0.3, [hidden, weight])
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_form_of_logits_is_read_from_the_configuration():
    assert logit_form(build_model().config) == LogitForm()
    assert logit_form(build("cohere").config) == LogitForm(0.25)
    assert logit_form(build("granite").config) == LogitForm(0.25)
    assert logit_form(build("gemma2").config) == LogitForm(1.0, 3.0)
