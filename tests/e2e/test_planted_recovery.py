"""Interactions that are known by construction come out of real trainings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from bench_influence import Bench, Measured
from influence_worlds import planted

from system.influence.estimate.matrix import EffectMatrix, estimate_effects

pytestmark = pytest.mark.slow

TASKS = ("colour", "colour-reworded", "colour-contradicted", "weather")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("planted")
    before = torch.get_num_threads()
    # Products this small gain nothing from a second thread, and lose where cores are shared.
    torch.set_num_threads(1)
    yield Bench(folder, planted(folder, 0, TASKS))
    torch.set_num_threads(before)


def entry(values_TS: np.ndarray, matrix: EffectMatrix, target: str, source: str) -> float:
    return float(values_TS[matrix.targets.index(target), matrix.sources.index(source)])


@pytest.fixture(scope="module")
def retrainings(bench) -> Measured:
    return bench.measure("retrain", 3, run_seed=1)


@pytest.fixture(scope="module")
def retrained(retrainings) -> EffectMatrix:
    return estimate_effects(retrainings.measurements).matrix


def check_signs(matrix: EffectMatrix) -> None:
    for one, other in (("colour", "colour-reworded"), ("colour-reworded", "colour")):
        assert entry(matrix.effect_TS, matrix, one, other) > 0
    for one, other in (("colour", "colour-contradicted"), ("colour-contradicted", "colour")):
        assert entry(matrix.effect_TS, matrix, one, other) < 0
    for name in TASKS[:3]:
        assert entry(matrix.effect_TS, matrix, name, name) > 0
    # What helps, what has nothing to do with it, what contradicts: in this order.
    for target, twin in (("colour", "colour-reworded"), ("colour-reworded", "colour")):
        order = [target, twin, "weather", "colour-contradicted"]
        effects = [entry(matrix.effect_TS, matrix, target, source) for source in order[1:]]
        assert effects == sorted(effects, reverse=True), (target, effects)


def check_intervals(matrix: EffectMatrix) -> None:
    """What is known beyond doubt: its own data helps, contradictions harm."""
    assert entry(matrix.effect_low_TS, matrix, "colour", "colour") > 0
    assert entry(matrix.effect_high_TS, matrix, "colour", "colour-contradicted") < 0


def test_retraining_recovers_planted_signs_beyond_its_errors(retrained):
    check_signs(retrained)
    check_intervals(retrained)


def test_the_same_questions_in_other_words_are_worth_about_as_much(retrained):
    """Duplicates under another template: gamma near 1, and its interval holds 1."""
    for one, other in (("colour", "colour-reworded"), ("colour-reworded", "colour")):
        gamma = entry(retrained.gamma_TS, retrained, one, other)
        low = entry(retrained.gamma_low_TS, retrained, one, other)
        high = entry(retrained.gamma_high_TS, retrained, one, other)
        assert 0.3 < gamma < 1.7 and low < 1 < high, (low, gamma, high)


def test_a_random_design_recovers_the_same_signs(bench):
    matrix = estimate_effects(bench.measure("random-design", 3, run_seed=1).measurements).matrix
    check_signs(matrix)
    check_intervals(matrix)


@pytest.mark.long
def test_branches_recover_the_same_signs(bench):
    matrix = estimate_effects(bench.measure("branch", 3, run_seed=1).measurements).matrix
    check_signs(matrix)
    check_intervals(matrix)


@pytest.mark.long
def test_gradients_recover_the_same_signs_at_a_lower_cost(bench, retrainings):
    """Each costs less than a replication of `retrain`; first order is noisier, so more of them."""
    found = bench.measure("gradient", 6, run_seed=1)
    matrix = estimate_effects(found.measurements).matrix
    check_signs(matrix)
    for target, source in (("colour", "colour"), ("colour", "colour-reworded")):
        assert entry(matrix.effect_low_TS, matrix, target, source) > 0
    assert entry(matrix.effect_high_TS, matrix, "colour", "colour-contradicted") < 0
    # Four categories: retraining takes a base run and four more; its cost grows with them.
    assert found.equivalents / 6 < 0.75 * retrainings.equivalents / 3


def test_nothing_helps_noise(retrained):
    for source in TASKS[:3]:
        low = entry(retrained.effect_low_TS, retrained, "weather", source)
        high = entry(retrained.effect_high_TS, retrained, "weather", source)
        assert low <= 0 <= high
    own = entry(retrained.effect_TS, retrained, "weather", "weather")
    assert own < 0.5 * entry(retrained.effect_TS, retrained, "colour", "colour")
