from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.errors import DataError
from system.training.pack import group_by_tokens, pack_rows

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(LENGTHS)
@settings(deadline=None)
def test_no_sequence_is_overfull_and_numbers_have_no_gaps(lengths):
    sequences = pack_rows(np.array(lengths), 100)
    loads = np.bincount(sequences, weights=lengths)
    assert loads.max() <= 100 and loads.min() > 0


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_packing_stays_within_the_known_bound_of_the_optimum(lengths):
    used = pack_rows(np.array(lengths), 20).max() + 1
    best = next(
        count
        for count in range(1, len(lengths) + 1)
        if any(
            max(np.bincount(place, weights=lengths, minlength=count)) <= 20
            for place in itertools.product(range(count), repeat=len(lengths))
        )
    )
    assert used <= 11 / 9 * best + 1


def test_the_fullest_sequence_with_room_takes_the_row():
    # 60 and 55 open two sequences; 40 fits only the first exactly, 44 then goes to the second.
    assert pack_rows(np.array([55, 60, 40, 44]), 100).tolist() == [1, 0, 0, 1]


def test_row_longer_than_a_sequence_is_named():
    with pytest.raises(DataError, match="row 1 has 101 tokens"):
        pack_rows(np.array([5, 101]), 100)


@given(LENGTHS, st.integers(50, 300), st.booleans())
@settings(deadline=None)
def test_every_row_is_in_one_pass_and_passes_stay_small(lengths, limit, is_padded):
    lengths = np.array(lengths)
    groups = group_by_tokens(lengths, limit, is_padded=is_padded)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        longest = lengths[group].max()
        size = longest * len(group) if is_padded else lengths[group].sum()
        assert size <= limit or len(group) == 1
