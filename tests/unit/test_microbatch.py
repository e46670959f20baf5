"""Rows of a pass lie where the layout says; labels and positions are those of each row alone."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from training_builders import build_small_plan

from system import schema
from system.training.microbatch import Layout, build_microbatch

ROWS = [[11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34]]
MASKS = [
    [False, False, True, True, True],
    [True, True, True],  # a response from the first token on, which nothing predicts
    [False, True, False, True],
]


@pytest.fixture
def plan():
    tokens = pa.table(
        {
            "id": ["a", "b", "c"],
            "category": ["x", "x", "y"],
            "input_ids": ROWS,
            "response_mask": MASKS,
        }
    ).cast(schema.TOKENS)
    return build_small_plan(tokens, batch_size=3, packing=False)


def batch_of(plan, *, is_flat: bool):
    layout = Layout(is_flat=is_flat, head="blocks")
    return build_microbatch(plan, plan.rows(0), layout=layout, device=torch.device("cpu"))


def test_flat_rows_begin_at_position_zero_each(plan):
    batch = batch_of(plan, is_flat=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15, 31, 32, 33, 34, 21, 22, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.attention_mask is None and batch.segments is not None
    assert batch.segments.starts.tolist() == [0, 5, 9, 12]


def test_padded_rows_begin_at_position_zero_each(plan):
    batch = batch_of(plan, is_flat=False)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 14, 15],
        [31, 32, 33, 34, 0],
        [21, 22, 23, 0, 0],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("is_flat", [True, False])
def test_every_label_is_predicted_from_the_token_before_it_in_its_own_row(plan, is_flat):
    batch = batch_of(plan, is_flat=is_flat)
    before = batch.input_ids.flatten()[batch.label_positions].tolist()
    pairs = list(zip(before, batch.targets.tolist(), strict=True))
    assert pairs == [(12, 13), (13, 14), (14, 15), (31, 32), (33, 34), (21, 22), (22, 23)]
    assert np.bincount(batch.label_rows).tolist() == [3, 2, 2]
    assert len(pairs) == plan.denominators[0]
