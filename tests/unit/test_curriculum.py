"""Curriculum: exact totals and sizes, floors, presets, refusals."""

import doctest
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import system.curriculum.plan
from system.curriculum import Curriculum, plan_curriculum
from system.curriculum.flow import StageTable, nearest_table
from system.errors import ConfigError

PRESETS = ("tilted", "sequential", "natural", "reversed")


@st.composite
def mixes(draw, max_categories=8, max_count=60):
    num = draw(st.integers(1, max_categories))
    counts = draw(st.lists(st.integers(0, max_count), min_size=num, max_size=num))
    if sum(counts) == 0:
        counts[0] = draw(st.integers(1, max_count))
    levels = draw(st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=num, max_size=num))
    return counts, levels


@settings(max_examples=200, deadline=None)
@given(
    mix=mixes(),
    preset=st.sampled_from(PRESETS),
    num_stages=st.integers(1, 7),
    epochs=st.integers(1, 4),
    tilt=st.floats(0, 1),
    rehearsal=st.floats(0, 1),
    data=st.data(),
)
def test_totals_sizes_and_floors_are_exact(mix, preset, num_stages, epochs, tilt, rehearsal, data):
    counts, levels = mix
    total = sum(counts) * epochs
    num_stages = min(num_stages, total)
    sizes = None
    if data.draw(st.booleans()):
        cuts = sorted(
            data.draw(
                st.lists(
                    st.integers(1, total - 1),
                    min_size=num_stages - 1,
                    max_size=num_stages - 1,
                    unique=True,
                )
            )
            if num_stages > 1
            else []
        )
        sizes = [b - a for a, b in itertools.pairwise([0, *cuts, total])]
    plan = plan_curriculum(
        counts,
        levels,
        preset=preset,
        num_stages=num_stages,
        epochs=epochs,
        tilt=tilt,
        rehearsal=rehearsal,
        stage_sizes=sizes,
    )
    table = plan.counts_TS
    assert table.sum(axis=0).tolist() == [n * epochs for n in counts]
    assert [s.size for s in plan.stages] == table.sum(axis=1).tolist()
    if sizes is not None:
        assert table.sum(axis=1).tolist() == sizes
    elif preset != "sequential":
        assert np.ptp(table.sum(axis=1)) <= 1
    for t, s in itertools.product(range(num_stages), range(len(counts))):
        natural = counts[s] * epochs * int(table[t].sum()) / total
        assert table[t, s] >= math.floor(rehearsal * natural - 1e-6)
    lacking = {
        (plan.stages[t].name, str(s))
        for t, s in np.argwhere(table == 0)
        if rehearsal > 0 and counts[s] * epochs >= num_stages
    }
    assert lacking == set(plan.missed)
