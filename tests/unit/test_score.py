from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from system import schema
from system.errors import DataError
from system.scoring.parity import token_log_probs
from system.scoring.score import NOT_FINITE, score_reference


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(rows: list[list[int]], masks: list[list[bool]]) -> pa.Table:
    return pa.table(
        {
            "id": [f"r{n}" for n in range(len(rows))],
            "category": ["c"] * len(rows),
            "input_ids": rows,
            "response_mask": masks,
        },
        schema=schema.TOKENS,
    )


def test_a_token_is_scored_by_the_state_before_it(model):
    row = [3, 7, 9, 11]
    found = token_log_probs(model, row)
    with torch.no_grad():
        for place in range(1, 4):
            logits = model(torch.tensor([row[:place]])).logits[0, -1].double()
            expected = logits[row[place]] - torch.logsumexp(logits, 0)
            assert found[place - 1] == pytest.approx(float(expected), abs=1e-5)


def test_only_response_tokens_count_and_never_the_first(model):
    rows = [[3, 7, 9, 11, 2], [3, 7, 9, 11, 2]]
    masks = [[False, False, True, False, True], [True] * 5]
    scored = score_reference(model, tokens(rows, masks))
    values = token_log_probs(model, rows[0])
    assert scored.table["nll"].to_pylist() == pytest.approx(
        [-(values[1] + values[3]), -values.sum()]
    )
    assert scored.table["num_tokens"].to_pylist() == [2, 4]
    assert scored.rejected == {}


def test_a_row_without_finite_loss_is_rejected_by_name(model):
    table = tokens([[3, 7], [4, 8]], [[False, True]] * 2)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        kept = weight[3].clone()
        weight[3] = float("nan")
        try:
            scored = score_reference(model, table)
        finally:
            weight[3] = kept
    assert scored.rejected == {"r0": NOT_FINITE}
    assert scored.table["id"].to_pylist() == ["r1"]
    assert np.isfinite(scored.table["nll"][0].as_py())


def test_a_row_without_response_is_an_error(model):
    with pytest.raises(DataError, match="r0 has no response token"):
        score_reference(model, tokens([[3, 7]], [[True, False]]))


def test_a_mask_of_another_length_is_an_error(model):
    with pytest.raises(DataError, match="2 tokens but 3 mask values"):
        score_reference(model, tokens([[3, 7]], [[False, True, True]]))
