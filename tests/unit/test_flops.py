"""The arithmetic of a step, against torch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_builders import build_model, build_small_plan
from transformers import GPT2Config

from system.training.flops import peak_flops, step_flops


@pytest.fixture(scope="module")
def plan():
    return build_small_plan()


def test_needed_operations_are_those_that_torch_counts(plan):
    """Layers from torch's count of each row's forward pass, times three for the backward one."""
    model = build_model()
    model.set_attn_implementation("eager")  # the counter does not know every fused attention
    config = model.config
    query = config.num_attention_heads * config.head_dim
    needed_S = step_flops(plan, config)
    assert needed_S is not None and len(needed_S) == plan.num_steps
    for step in range(plan.num_steps):
        layers, squares = 0.0, 0.0
        for length in plan.lengths(plan.rows(step)).tolist():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.zeros((1, length), dtype=torch.long))
            counted = counter.get_total_flops()
            head = 2 * config.vocab_size * config.hidden_size * length
            attention = 4 * config.num_hidden_layers * query * length**2
            layers += counted - head - attention
            squares += length**2
        expected = 3 * layers + 6 * config.num_hidden_layers * query * squares
        expected += 6 * config.vocab_size * config.hidden_size * plan.denominators[step]
        assert needed_S[step] == pytest.approx(expected)


def test_frozen_weights_need_no_gradient_of_their_own(plan):
    config = build_model().config
    whole, adapters = step_flops(plan, config), step_flops(plan, config, is_lora=True)
    assert whole is not None and adapters is not None
    assert np.all(adapters < whole) and np.all(adapters > 0.6 * whole)


def test_other_architectures_get_no_figure_rather_than_a_wrong_one(plan):
    assert step_flops(plan, GPT2Config()) is None


def test_the_peak_is_a_rate_that_a_product_reaches():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
