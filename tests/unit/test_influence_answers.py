"""Effects on right answers, where a model can do none of a target's questions, or all."""

from dataclasses import replace

import numpy as np
import pytest
from influence_world import AnswerWorld

from system.influence.estimate.matrix import estimate_effects
from system.influence.estimate.measurements import Measurements
from system.influence.estimate.noise import moderate
from system.influence.estimate.returns import worth


def without_target(measured: Measurements, row: int) -> Measurements:
    return replace(
        measured,
        targets=tuple(name for place, name in enumerate(measured.targets) if place != row),
        differences=tuple(d for place, d in enumerate(measured.differences) if place != row),
    )


@pytest.mark.parametrize("replications", [1, 2, 3])
def test_a_target_without_a_right_answer_is_not_known_exactly(replications):
    """Thirty questions that all runs answer wrongly: a zero with the error of half a case."""
    measured = AnswerWorld(num_silent=1).measure(replications)
    np.testing.assert_array_equal(measured.unresponsive_T, [True] + [False] * 7)
    matrix = estimate_effects(measured).matrix
    for name in ("effect_se_TS", "shrunk_se_TS"):
        np.testing.assert_allclose(getattr(matrix, name)[0], 1.0 / 32.0)
    assert (matrix.effect_low_TS[0] < -0.05).all() and (matrix.effect_high_TS[0] > 0.05).all()
    np.testing.assert_array_equal(matrix.shrunk_TS[0], 0.0)
    assert not matrix.identifiable_TS[0].any()


def test_all_targets_without_a_right_answer_still_have_an_error():
    matrix = estimate_effects(AnswerWorld(num_silent=8).measure(2)).matrix
    assert matrix.effect_se_TS.min() > 0.03
    assert np.isfinite(matrix.shrunk_TS).all() and np.isfinite(matrix.shrunk_se_TS).all()


def test_a_silent_target_takes_nothing_from_the_others():
    """Their pooled errors, degrees of freedom and prior are those that they have without it."""
    measured = AnswerWorld(num_silent=1, seed=3).measure(2)
    alone = estimate_effects(without_target(measured, 0))
    beside = estimate_effects(measured)
    for name in ("effect_se_TS", "effect_df_TS", "shrunk_TS", "shrunk_se_TS"):
        expected = getattr(alone.matrix, name)
        np.testing.assert_allclose(getattr(beside.matrix, name)[1:], expected, rtol=1e-9)
    assert beside.shrunken.others == alone.shrunken.others
    assert beside.errors.training is not None
    assert beside.errors.training.row_prior_df > 2.0


def test_what_only_its_own_category_changes_is_silent_but_has_its_own_effect():
    measured = AnswerWorld(num_silent=1).measure(3)
    measured.differences[0][:, 0, :12] = 1.0
    assert measured.unresponsive_T[0]
    matrix = estimate_effects(measured).matrix
    assert matrix.effect_TS[0, 0] == pytest.approx(0.4)
    assert np.isfinite(matrix.effect_se_TS).all() and matrix.effect_low_TS[0, 0] > 0.0


@pytest.mark.parametrize("num_silent", [0, 1])
def test_intervals_of_right_answers_cover_the_truth(num_silent):
    covered = []
    for seed in range(30):
        world = AnswerWorld(num_silent=num_silent, seed=seed)
        matrix, truth_TS = estimate_effects(world.measure(2)).matrix, world.truth_TS()
        inside = (matrix.effect_low_TS <= truth_TS) & (truth_TS <= matrix.effect_high_TS)
        covered.append(inside[num_silent:][~matrix.own_TS[num_silent:]].mean())
    assert 0.93 < np.mean(covered) < 0.995


def test_the_worth_of_sources_knows_the_floor_too():
    silent = worth(AnswerWorld(num_silent=8).measure(2))
    np.testing.assert_allclose(silent.se, np.sqrt(8 * (1.0 / 32.0) ** 2) / 8)


def test_variances_of_exactly_zero_do_not_undo_the_pooling_of_the_others():
    rng = np.random.default_rng(1)
    samples = rng.chisquare(2, 20) / 2
    _, _, prior = moderate(samples, 2.0, 0.0)
    moderated, _, beside = moderate(np.append(samples, 0.0), 2.0, 0.0)
    assert beside == pytest.approx(prior)
    assert moderated[-1] > 0.2
