import numpy as np
import pytest

from system.influence.design.random_design import dose_patterns, effect_weights, runs_needed


@pytest.mark.parametrize("sources", [2, 3, 7, 9, 11, 14, 19, 28])
def test_enough_runs_give_uncorrelated_doses_in_half_of_the_runs(sources):
    runs = runs_needed(sources)
    assert sources < runs <= sources + 8
    pattern = dose_patterns(3, runs, sources)
    signs = np.where(pattern, 1, -1)
    np.testing.assert_array_equal(signs.T @ signs, runs * np.eye(sources, dtype=int))
    np.testing.assert_array_equal(signs.sum(axis=0), 0)


def test_other_seeds_give_other_patterns():
    assert not np.array_equal(dose_patterns(0, 12, 9), dose_patterns(1, 12, 9))
    np.testing.assert_array_equal(dose_patterns(0, 12, 9), dose_patterns(0, 12, 9))


def test_additive_effects_are_recovered_exactly():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=9)
    for runs in (12, 14):
        pattern = dose_patterns(5, runs, 9)
        loss = 2.0 + pattern @ effect
        np.testing.assert_allclose(effect_weights(pattern) @ loss, effect, atol=1e-12)


def test_noise_falls_as_the_weighing_design_promises():
    rng = np.random.default_rng(1)
    pattern = dose_patterns(2, 16, 15)
    noise = rng.normal(size=(16, 4000))
    variance = (effect_weights(pattern) @ noise).var(axis=1)
    np.testing.assert_allclose(variance, 4 / 16, rtol=0.12)


def test_fewer_runs_than_doses_still_give_correlated_estimates():
    rng = np.random.default_rng(2)
    agreement = []
    for seed in range(20):
        effect = rng.normal(size=24)
        pattern = dose_patterns(seed, 16, 24)
        agreement.append(np.corrcoef(effect_weights(pattern) @ (pattern @ effect), effect)[0, 1])
    assert np.mean(agreement) > 0.6
