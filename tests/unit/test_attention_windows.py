"""Sliding windows and other habits of attention: honoured, or left to transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strict_kernels import strict_varlen
from torch.nn.attention import varlen
from training_builders import build_model, build_small_plan
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from system.training import attention
from system.training.attention import build_segments, declared_windows, segment_attention
from system.training.layout import training_layout
from system.training.microbatch import build_microbatch
from system.training.objective import Objective

WINDOW = 7
"""Shorter than most rows of the plan, which have 8 to 59 tokens."""
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def build(name: str, window: int | None = WINDOW):
    torch.manual_seed(0)
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()
    config, model = {
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
        "cohere2": (Cohere2Config, Cohere2ForCausalLM),
    }[name]
    return model(config(**SIZES, sliding_window=window, layer_types=ALTERNATING)).eval()


def own_losses(model, plan, rows) -> dict[int, np.ndarray]:
    """Row by row through transformers' eager attention."""
    model.set_attn_implementation("eager")
    found = {}
    for row in rows:
        part = slice(plan.offsets[row], plan.offsets[row + 1])
        ids = torch.from_numpy(plan.input_ids[part].astype(np.int64))[None]
        mask = torch.from_numpy(plan.response_mask[part])[1:]
        logits = model(ids).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        found[row] = nll[mask].detach().numpy()
    return found


@pytest.mark.parametrize("name", ["mistral", "gemma3", "cohere2"])
def test_flat_rows_longer_than_the_window_get_transformers_own_losses(name):
    plan = build_small_plan()
    rows = np.arange(8)
    assert plan.lengths(rows).max() > 3 * WINDOW
    expected = own_losses(build(name), plan, rows)
    model = build(name)
    objective = Objective(model, torch.float32)
    with training_layout(objective) as layout:
        assert layout.is_flat
        batch = build_microbatch(plan, rows, layout=layout, device=CPU)
        nll_M = objective(batch)[1].numpy()
    wide = own_losses(build(name, 200), plan, rows)
    for row in rows:
        np.testing.assert_allclose(nll_M[batch.label_rows == row], expected[row], atol=2e-4)
    assert max(np.abs(wide[row] - expected[row]).max() for row in rows) > 0.1, "windows matter"


@pytest.mark.parametrize("window", [1, 3, 6, 7, 8, 50])
@pytest.mark.parametrize("has_flash", [False, True], ids=["buckets", "flash"])
def test_window_equals_its_definition(monkeypatch, window, has_flash):
    monkeypatch.setattr(varlen, "varlen_attn", strict_varlen)
    dtype = torch.bfloat16 if has_flash else torch.float32
    lengths = np.array([8, 7, 3, 1])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 19, 8, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, 19, 8, generator=generator).to(dtype) for _ in range(2))
    out, _ = segment_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        segments=build_segments(lengths, CPU, has_flash=has_flash),
        scaling=0.5,
        sliding_window=window,
    )
    owner = torch.from_numpy(np.repeat(np.arange(4), lengths))
    place = torch.arange(19)
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    seen &= place[:, None] - place < window
    keys, values = (s.float().repeat_interleave(2, dim=1) for s in (key, value))
    scores = (query.float() @ keys.transpose(2, 3) * 0.5).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(
        out.float(), expected, atol=2e-2 if has_flash else 1e-5, rtol=1e-2 if has_flash else 1e-5
    )


@pytest.mark.parametrize("window", [WINDOW, 5000], ids=["short", "longer-than-any-probe"])
def test_window_that_never_reaches_attention_is_noticed(monkeypatch, window):
    own = attention.segment_attention
    objective = Objective(build("mistral", window), torch.float32)
    monkeypatch.setattr(
        "transformers.models.mistral.modeling_mistral.ALL_ATTENTION_FUNCTIONS",
        Deaf(own),
    )
    with training_layout(objective) as layout:
        assert not layout.is_flat


class Deaf:
    """Attention functions of a model that forgets to pass its window on."""

    def __init__(self, own):
        self.own = own

    def get_interface(self, name, default):
        from transformers import AttentionInterface

        found = AttentionInterface().get_interface(name, default)
        if name != attention.NAME:
            return found
        return lambda *args, **kwargs: found(*args, **{**kwargs, "sliding_window": None})


def test_chunked_attention_takes_padded_rows():
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **{**SIZES, "num_hidden_layers": 2},
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=64,  # longer than the probe
        layer_types=["chunked_attention", "full_attention"],
    )
    objective = Objective(Llama4ForCausalLM(config).eval(), torch.float32)
    with training_layout(objective) as layout:
        assert not layout.is_flat


def test_declared_windows():
    assert declared_windows(build_model().config) == [None, None]
    assert declared_windows(MistralConfig(**SIZES, sliding_window=5)) == [5] * 4
    assert declared_windows(MistralConfig(**SIZES, sliding_window=None)) == [None] * 4
    assert declared_windows(build("gemma3").config) == [7, None, 7, None]


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"softcap": 50.0}, "uses softcap"),
        ({"s_aux": torch.ones(2)}, "uses s_aux"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_that_asks_for_more_is_refused(keyword, message):
    states = torch.ones(1, 2, 5, 8)
    segments = build_segments(np.array([3, 2]), CPU, has_flash=False)
    with pytest.raises(NotImplementedError, match=message):
        segment_attention(
            torch.nn.Identity(), *[states] * 3, None, segments=segments, use_cache=False, **keyword
        )
