from dataclasses import replace

import numpy as np
import pytest
from influence_world import FITTED, World
from scipy import stats

from system.config import InfluenceConfig
from system.errors import DataError
from system.influence.estimate.agreement import (
    compare,
    left_out_prediction,
    replications_to_halve,
    split_half,
)
from system.influence.estimate.fieller import fieller_interval
from system.influence.estimate.matrix import MATRIX_FILE, EffectMatrix, estimate_effects
from system.influence.estimate.measurements import own_mask
from system.influence.estimate.noise import fit_errors, heldout_covariance, moderate
from system.schema import MATRIX, check_table


def coverage(replications, worlds=60, **knobs):
    """Share of true effects (off the diagonal, own) and true gammas inside their intervals."""
    off, own, gamma = [], [], []
    for seed in range(worlds):
        world = World(seed=seed, **knobs)
        matrix = estimate_effects(world.measure(replications)).matrix
        truth = world.truth_TS() / world.dose_S
        inside = (matrix.effect_low_TS <= truth) & (truth <= matrix.effect_high_TS)
        off.append(inside[~matrix.own_TS].mean())
        own.append(inside[matrix.own_TS].mean())
        ratio = truth / np.diag(truth)[:, None]
        known = np.isfinite(matrix.gamma_TS) & ~matrix.own_TS
        if known.any():
            held = (matrix.gamma_low_TS <= ratio) & (ratio <= matrix.gamma_high_TS)
            gamma.append(held[known].mean())
    return np.mean(off), np.mean(own), np.mean(gamma)


@pytest.mark.parametrize("replications", [2, 3, 5])
def test_intervals_cover_the_truth_at_the_nominal_rate(replications):
    for rate in coverage(replications):
        assert rate == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_categories": 14},
        {"alike_over_targets": 0.95},
        {"relative_noise": 0.3},
        {"relative_noise": 0.0},
        {"duplicate": True},
        {"run_noise": 0.002, "shared_noise": 0.002, "relative_noise": 0.0},
    ],
    ids=[
        "more categories",
        "targets move together",
        "noise grows with effects",
        "noise alike everywhere",
        "duplicates",
        "held-out only",
    ],
)
def test_coverage_holds_in_other_worlds_with_two_replications(knobs):
    off, own, gamma = coverage(2, worlds=40, **knobs)
    assert off == pytest.approx(0.95, abs=0.035)
    assert min(own, gamma) > 0.92


def test_a_world_made_from_fitted_components_gives_them_back():
    """Fit, simulate, fit: what the intervals rest on is what the world was made of."""
    training, heldout, relative, signal = [], [], [], []
    for seed in range(20):
        estimate = estimate_effects(World(seed=seed, **FITTED).measure(2))
        noise, other_TS = estimate.errors.training, ~estimate.matrix.own_TS
        assert noise is not None
        training.append(noise.variance_TS[other_TS].mean())
        heldout.append(estimate.errors.heldout_TS[other_TS].mean() * 64)
        relative.append(noise.relative)
        prior = estimate.shrunken.others
        signal.append(prior.entry_variance + prior.row_variance)
    low, high = FITTED["target_noise"]
    scale_square = (low**2 + low * high + high**2) / 3
    # Noise of single examples is in the mean over them too.
    made = FITTED["run_noise"] ** 2 * scale_square + FITTED["example_noise"] ** 2 / 64
    assert np.mean(training) == pytest.approx(made, rel=0.2)
    assert np.sqrt(np.mean(heldout)) == pytest.approx(FITTED["example_effect"], rel=0.15)
    assert np.mean(relative) == pytest.approx(FITTED["relative_noise"], rel=0.35)
    assert np.sqrt(np.mean(signal)) * FITTED["dose"] == pytest.approx(FITTED["spread"], rel=0.25)


@pytest.mark.parametrize("replications", [2, 4])
def test_coverage_holds_with_the_components_of_a_real_run(replications):
    off, own, gamma = coverage(replications, worlds=40, **FITTED)
    assert off == pytest.approx(0.95, abs=0.035)
    assert min(own, gamma) > 0.9


@pytest.mark.parametrize("doses", [(8.0,) + (64.0,) * 7, (8.0, 8.0, 16.0, 16.0) + (64.0,) * 4])
def test_coverage_holds_with_unequal_doses(doses):
    off, own, gamma = coverage(3, worlds=40, dose=64.0, doses=doses)
    assert off == pytest.approx(0.95, abs=0.035)
    assert min(own, gamma) > 0.9


ONE_SMALL_DOSE = (8.0,) + (64.0,) * 7


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_shrunken_effects_are_as_good_as_they_claim_beside_a_small_dose(unit):
    """A noisy reference: its error in a row is the same in nats of every dose, not per row."""
    covered, squared, claimed = [], 0.0, 0.0
    for seed in range(40):
        world = World(seed=seed, dose=64.0, doses=ONE_SMALL_DOSE, shared_noise=0.04, run_noise=0.01)
        matrix = estimate_effects(world.measure(4), unit=unit).matrix
        off = ~matrix.own_TS
        error = np.abs(matrix.shrunk_TS * matrix.dose_S - world.truth_TS())[off]
        deviation = (matrix.shrunk_se_TS * matrix.dose_S)[off]
        covered.append((error <= 1.96 * deviation).mean())
        squared += (error**2).sum()
        claimed += (deviation**2).sum()
    assert np.mean(covered) > 0.90
    assert squared == pytest.approx(claimed, rel=0.12)


def test_heldout_only_errors_do_not_cover():
    """Why replications are asked for: without them the noise of training is not in the errors."""
    off, _, _ = coverage(1)
    assert off < 0.85


def test_with_one_replication_nothing_is_identifiable():
    estimate = estimate_effects(World().measure(1, examples=500))
    assert estimate.errors.training is None
    assert not estimate.matrix.identifiable_TS.any()
    assert np.isfinite(estimate.matrix.effect_se_TS).all()


def test_effects_converge_to_the_truth():
    world = World(seed=4)
    matrix = estimate_effects(world.measure(200, examples=2000)).matrix
    np.testing.assert_allclose(matrix.effect_TS, world.truth_TS() / world.dose, atol=3e-4)


def test_own_gamma_is_one_exactly_and_bounds_agree():
    matrix = estimate_effects(World().measure(3)).matrix
    own = matrix.own_TS
    for values in (matrix.gamma_TS, matrix.gamma_low_TS, matrix.gamma_high_TS):
        assert (values[own] == 1.0).all()


def test_gamma_is_fiellers_interval_with_the_covariance_of_the_shared_reference():
    """The noise of a row's reference run is in both effects of a ratio; doses differ."""
    world = World(num_categories=4, shared_noise=0.05, doses=(25.0, 50.0, 100.0, 200.0))
    estimate = estimate_effects(world.measure(4))
    matrix, errors, dose_S = estimate.matrix, estimate.errors, world.dose_S
    quantile_TS = stats.t.ppf(0.975, matrix.effect_df_TS)
    checked = 0
    for i, j in zip(*np.nonzero(np.isfinite(matrix.gamma_TS) & ~matrix.own_TS), strict=True):
        covariance = errors.own_covariance_TS[i, j] / (dose_S[i] * dose_S[j])
        assert covariance > 0
        ends = fieller_interval(
            matrix.effect_TS[i, j],
            matrix.effect_TS[i, i],
            matrix.effect_se_TS[i, j] ** 2,
            matrix.effect_se_TS[i, i] ** 2,
            covariance,
            max(quantile_TS[i, j], quantile_TS[i, i]),
        )
        found = matrix.gamma_low_TS[i, j], matrix.gamma_high_TS[i, j]
        np.testing.assert_allclose(found, ends, rtol=1e-9)
        checked += 1
    assert checked >= 6


def test_a_target_without_own_effect_is_not_identifiable():
    matrix = estimate_effects(World(own=0.0).measure(3)).matrix
    assert not matrix.identifiable_TS.any()
    assert np.isnan(matrix.gamma_TS).all()


def test_a_tight_zero_is_identifiable():
    quiet = World(spread=0.0, shared_noise=1e-3, run_noise=1e-3, relative_noise=0.01)
    assert estimate_effects(quiet.measure(3)).matrix.identifiable_TS.all()


def test_wide_gamma_intervals_are_not_identifiable():
    measured = World().measure(3)
    wide = estimate_effects(measured, gamma_max_width=10.0).matrix
    narrow = estimate_effects(measured, gamma_max_width=1e-3).matrix
    assert wide.identifiable_TS.all()
    np.testing.assert_array_equal(narrow.identifiable_TS, narrow.own_TS)


def test_external_targets_have_effects_but_no_gamma():
    matrix = estimate_effects(World(external_targets=2).measure(3)).matrix
    assert np.isfinite(matrix.effect_se_TS).all()
    assert np.isnan(matrix.gamma_TS[-2:]).all()
    assert not matrix.identifiable_TS[-2:].any()


def test_effects_per_token_are_effects_per_example_over_tokens_per_example():
    measured = World().measure(2)
    by_example = estimate_effects(measured).matrix
    by_token = estimate_effects(measured, unit="tokens").matrix
    per_example = measured.dose_tokens_S / measured.dose_S
    np.testing.assert_allclose(by_token.effect_TS * per_example, by_example.effect_TS)
    np.testing.assert_allclose(by_token.effect_se_TS * per_example, by_example.effect_se_TS)
    np.testing.assert_allclose(
        by_token.gamma_TS[0] * per_example / per_example[0], by_example.gamma_TS[0]
    )


def test_the_order_of_held_out_examples_does_not_matter():
    measured = World().measure(2)
    shuffled = replace(measured, differences=tuple(row[:, :, ::-1] for row in measured.differences))
    first, second = estimate_effects(measured).matrix, estimate_effects(shuffled).matrix
    np.testing.assert_allclose(first.effect_se_TS, second.effect_se_TS, rtol=1e-9)


def test_more_held_out_examples_cut_only_the_held_out_part():
    few, many = (fit_errors(World(seed=1).measure(4, examples=n)) for n in (50, 800))
    assert np.median(many.heldout_TS) < np.median(few.heldout_TS) / 8
    training = [np.median(e.variance_TS - e.heldout_TS) for e in (few, many)]
    assert training[1] == pytest.approx(training[0], rel=0.8)


def test_training_noise_of_examples_is_not_counted_as_held_out_sampling():
    """Noise without any persistent example effect: the held-out part must go to nearly nothing."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 6, 400))
    naive = noise.mean(axis=0).var(axis=1, ddof=1).mean() / 400
    assert np.diag(heldout_covariance(noise)).mean() < 0.25 * naive


def test_moderation_pools_equal_variances_fully():
    rng = np.random.default_rng(1)
    samples = rng.chisquare(3, 2000) / 3
    moderated, df, prior = moderate(samples, 3.0, 0.0)
    assert prior > 50 and df > 50
    np.testing.assert_allclose(moderated, 1.0, rtol=0.15)


def test_moderation_finds_the_spread_of_unequal_variances():
    rng = np.random.default_rng(2)
    true = 8.0 / rng.chisquare(8, 4000)
    samples = true * rng.chisquare(4, 4000) / 4
    moderated, df, prior = moderate(samples, 4.0, 0.0)
    assert prior == pytest.approx(8.0, rel=0.2)
    assert df == pytest.approx(12.0, rel=0.2)
    raw_error = np.mean(np.log(samples / true) ** 2)
    assert np.mean(np.log(moderated / true) ** 2) < 0.6 * raw_error


def test_moderation_never_claims_more_degrees_of_freedom_than_the_pool_has():
    _, df, _ = moderate(np.array([1.0, 1.1, 0.9]), 2.0, 0.0)
    assert df <= 6.0
    _, df, _ = moderate(np.array([1.0, 1.1, 0.9]), 2.0, 1.0)
    assert df <= 2.0


def test_a_loss_that_is_not_finite_names_target_and_source():
    measured = World().measure(2)
    measured.differences[1][0, 3, 5] = np.nan
    with pytest.raises(DataError, match=r"'c1'.*'c3'.*learning_rate"):
        estimate_effects(measured)


def test_the_matrix_survives_its_table():
    measured = World(external_targets=1, seed=2).measure(2)
    matrix = estimate_effects(measured).matrix
    table = matrix.to_table()
    assert table.schema.equals(MATRIX_FILE)
    assert check_table(table, MATRIX, "matrix").num_rows == 9 * 8
    back = EffectMatrix.from_table(table, direction="remove")
    assert back.targets == matrix.targets and back.sources == matrix.sources
    for name in ("effect_TS", "effect_se_TS", "shrunk_TS", "gamma_low_TS", "identifiable_TS"):
        np.testing.assert_array_equal(getattr(back, name), getattr(matrix, name))


def test_a_missing_direction_is_named():
    table = estimate_effects(World().measure(2)).matrix.to_table()
    with pytest.raises(DataError, match=r"'add'.*found.*remove"):
        EffectMatrix.from_table(table, direction="add")


def test_halves_of_a_quiet_world_agree():
    halves = split_half(World(run_noise=1e-3, shared_noise=1e-3, num_categories=12).measure(4))
    assert halves is not None
    assert halves.agreement.rank.value > 0.9 and halves.agreement.rank.low > 0.8
    assert halves.num_splits == 3 and halves.half_sizes == (2, 2)


def test_halves_of_pure_noise_do_not_agree():
    found = []
    for seed in range(20):
        world = World(spread=0.0, num_categories=12, example_effect=0.0, seed=seed)
        halves = split_half(world.measure(2))
        assert halves is not None
        found.append(halves.agreement.rank)
    assert np.mean([rank.value for rank in found]) == pytest.approx(0.0, abs=0.1)
    assert np.mean([rank.low <= 0.0 <= rank.high for rank in found]) >= 0.75


def test_halves_share_nothing_when_the_held_out_rows_are_split_too():
    """Effects of single examples alone: replicated perfectly, yet nothing about the category."""
    world = World(spread=0.0, run_noise=1e-4, shared_noise=1e-4, example_noise=0.01)
    same, apart = (split_half(world.measure(2), split_heldout=flag) for flag in (False, True))
    assert same is not None and apart is not None
    assert same.agreement.rank.value > 0.8
    assert abs(apart.agreement.rank.value) < 0.4


def test_one_split_that_agrees_fully_does_not_decide_the_mean():
    """Three categories, four replications, three splits: worths that correlate by 1, -0.5, -0.5."""
    worth_RS = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.9, 0.2, 1.1], [2.9, 0.2, 1.1]])
    worth_RS += 0.01 * np.arange(4)[:, None]
    measured = World(num_categories=3, seed=1).measure(4)
    rows = tuple(np.repeat(worth_RS[:, :, None], 6, axis=2) for _ in measured.targets)
    halves = split_half(replace(measured, differences=rows))
    worths = []
    for first in ([0, 1], [0, 2], [0, 3]):
        rest = [index for index in range(4) if index not in first]
        worths.append(stats.spearmanr(worth_RS[first].mean(axis=0), worth_RS[rest].mean(axis=0))[0])
    assert halves is not None and len(set(np.round(worths, 3))) > 1 and max(worths) > 0.99
    assert halves.worth_agreement == pytest.approx(np.mean(worths))


def test_noise_of_the_same_examples_is_no_agreement_on_worth():
    same, apart = [], []
    for seed in range(30):
        world = World(
            num_categories=12, own=0.0, spread=0.0, run_noise=1e-3, shared_noise=1e-3, seed=seed
        )
        for found, flag in ((same, False), (apart, True)):
            halves = split_half(world.measure(2, examples=48), split_heldout=flag)
            assert halves is not None
            found.append(halves.worth_agreement)
    assert np.mean(same) > 0.4 and abs(np.mean(apart)) < 0.12
    limit = InfluenceConfig().min_agreement
    assert np.mean(np.array(apart) >= limit) < 0.3


def test_a_dozen_categories_with_effects_above_their_noise_pass_the_default_limit():
    passed = 0
    for seed in range(30):
        halves = split_half(World(num_categories=12, seed=seed).measure(3), split_heldout=True)
        assert halves is not None
        passed += halves.worth_agreement >= InfluenceConfig().min_agreement
    assert passed >= 27


def test_one_replication_has_no_agreement():
    assert split_half(World().measure(1)) is None


def test_an_estimate_agrees_with_itself():
    matrix = estimate_effects(World().measure(2)).matrix
    agreement = compare(matrix, matrix)
    assert agreement.rank.value == pytest.approx(1.0, abs=1e-5)
    assert agreement.sign == 1.0 and agreement.target_rank_median == pytest.approx(1.0)


def test_shrunken_effects_predict_the_left_out_replication_better_when_noise_is_high():
    better = 0
    for seed in range(8):
        measured = World(seed=seed, spread=0.01, run_noise=0.03).measure(3)
        prediction = left_out_prediction(measured, fit_errors(measured))
        assert prediction is not None
        better += prediction.better == "shrunk"
    assert better >= 7


def test_halving_a_training_error_takes_four_times_the_replications():
    world = World(example_effect=1e-4, example_noise=1e-4)
    estimate = estimate_effects(world.measure(3, examples=200))
    assert replications_to_halve(estimate, 3) in (12, 13)


def test_more_replications_cannot_halve_a_held_out_error():
    world = World(run_noise=1e-4, shared_noise=1e-4, relative_noise=0.0, example_noise=1e-3)
    assert replications_to_halve(estimate_effects(world.measure(3)), 3) is None


def test_own_mask_marks_each_owned_target_once():
    mask = own_mask(np.array([1, -1, 0]), 2)
    np.testing.assert_array_equal(mask, [[False, True], [False, False], [True, False]])
