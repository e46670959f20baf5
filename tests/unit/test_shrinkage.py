import numpy as np
import pytest

from system.influence.estimate.shrinkage import shrink


def world(rows=12, mean=-0.02, entry=0.05, row=0.03, noise=0.06, common=0.04, seed=0, dose=1.0):
    """True effects, estimates with a shared error per row, and their known variances.

    Errors are of a dose, so an effect's are divided by it.
    """
    rng = np.random.default_rng(seed)
    truth = mean + row * rng.normal(size=(rows, 1)) + entry * rng.normal(size=(rows, rows))
    truth[np.arange(rows), np.arange(rows)] += 0.4
    shared = common * rng.normal(size=(rows, 1))
    estimate = truth + (shared + noise * rng.normal(size=truth.shape)) / dose
    variance = np.full(truth.shape, noise**2 + common**2) / np.square(dose)
    return truth, estimate, variance, np.full(truth.shape, common) / dose


OWN = np.eye(12, dtype=bool)
SMALL_DOSE = np.array([0.125] + [1.0] * 11)


def test_exact_effects_are_left_alone():
    truth, _, variance, common = world()
    shrunken = shrink(truth, variance * 1e-12, common * 1e-6, OWN)
    np.testing.assert_allclose(shrunken.effect_TS, truth, atol=1e-6)


def test_pure_noise_is_pulled_to_the_common_mean():
    rng = np.random.default_rng(3)
    estimate = rng.normal(0.0, 0.1, (12, 12))
    shrunken = shrink(estimate, np.full((12, 12), 0.01), np.zeros((12, 12)), OWN)
    off = ~OWN
    assert shrunken.effect_TS[off].var() < 0.25 * estimate[off].var()


def test_shrinking_lowers_the_error_by_more_than_a_quarter():
    off = ~OWN
    raw, shrunk = 0.0, 0.0
    for seed in range(30):
        truth, estimate, variance, common = world(seed=seed)
        shrunken = shrink(estimate, variance, common, OWN)
        raw += np.mean((estimate - truth)[off] ** 2)
        shrunk += np.mean((shrunken.effect_TS - truth)[off] ** 2)
    assert shrunk < 0.75 * raw


def test_posterior_deviations_cover_the_truth():
    off = ~OWN
    covered = []
    for seed in range(40):
        truth, estimate, variance, common = world(seed=seed)
        shrunken = shrink(estimate, variance, common, OWN)
        inside = np.abs(shrunken.effect_TS - truth) <= 1.96 * shrunken.effect_se_TS
        covered.append(inside[off].mean())
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: np.zeros(shape),
        lambda rng, shape: 0.3 * rng.standard_t(2, shape),
        lambda rng, shape: np.where(rng.random(shape) < 0.05, 4.0 * rng.normal(size=shape), 0.0),
    ],
    ids=["no effects", "heavy tails", "a few large effects"],
)
def test_effects_held_back_by_the_limit_are_not_called_certain(draw):
    """Of estimates with error 1: those that the limit holds must cover the truth like the rest."""
    own = np.eye(14, dtype=bool)
    covered, held, squared, claimed = [], [], 0.0, 0.0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        truth = draw(rng, own.shape)
        estimate = truth + rng.normal(size=own.shape)
        shrunken = shrink(estimate, np.ones(own.shape), np.zeros(own.shape), own)
        error = np.abs(shrunken.effect_TS - truth)
        inside = error <= 1.96 * shrunken.effect_se_TS
        is_held = ~own & np.isclose(np.abs(shrunken.effect_TS - estimate), 1.0)
        covered.append(inside[~own])
        held.append(inside[is_held])
        squared += float((error[~own] ** 2).sum())
        claimed += float((shrunken.effect_se_TS[~own] ** 2).sum())
    assert np.concatenate(held).size > 300
    assert np.concatenate(covered).mean() > 0.94
    assert np.concatenate(held).mean() > 0.84
    assert 0.4 * claimed < squared < 1.1 * claimed


@pytest.mark.parametrize("dose", [1.0, SMALL_DOSE], ids=["equal doses", "one small dose"])
def test_posterior_means_equal_the_dense_formula(dose):
    """At the fitted variances the row-wise formulas must be those of the full normal model."""
    _, estimate, variance, common = world(rows=12, seed=5, dose=dose)
    shrunken = shrink(estimate, variance, common, OWN)
    prior = shrunken.others
    for row in range(12):
        keep = ~OWN[row]
        size = int(keep.sum())
        signal = prior.entry_variance * np.eye(size) + prior.row_variance
        together = common[row, keep]
        noise = np.diag(variance[row, keep] - together**2) + np.outer(together, together)
        gain = signal @ np.linalg.inv(signal + noise)
        expected = prior.mean + gain @ (estimate[row, keep] - prior.mean)
        reach = np.sqrt(variance[row, keep])
        limited = np.clip(expected, estimate[row, keep] - reach, estimate[row, keep] + reach)
        np.testing.assert_allclose(shrunken.effect_TS[row, keep], limited, rtol=1e-6, atol=1e-9)
        assert (limited == expected).mean() > 0.5


@pytest.mark.parametrize(
    "dose",
    [SMALL_DOSE, np.linspace(0.3, 2.0, 12), np.repeat([0.125, 0.25, 1.0], 4)],
    ids=["one small dose", "doses in tokens", "three doses"],
)
def test_unequal_doses_keep_the_errors_honest(dose):
    """The shared error is one number in nats of a dose, so per unit it differs between sources."""
    covered, squared, claimed = [], 0.0, 0.0
    for seed in range(40):
        truth, estimate, variance, shared = world(
            seed=seed, entry=0.03, row=0.01, noise=0.02, common=0.04, dose=dose
        )
        shrunken = shrink(estimate, variance, shared, OWN)
        error = np.abs(shrunken.effect_TS - truth)[~OWN]
        deviation = shrunken.effect_se_TS[~OWN]
        covered.append((error <= 1.96 * deviation).mean())
        squared += (error**2).sum()
        claimed += (deviation**2).sum()
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    assert squared == pytest.approx(claimed, rel=0.1)


def test_a_rare_large_effect_is_not_pulled_down_to_the_others():
    rng = np.random.default_rng(1)
    truth = 0.01 * rng.normal(size=(12, 12))
    truth[0, 1] = 0.5
    estimate = truth + 0.02 * rng.normal(size=truth.shape)
    variance = np.full(truth.shape, 0.02**2)
    variance[0, 1] = 0.1**2
    shrunken = shrink(estimate, variance, np.zeros((12, 12)), OWN)
    assert shrunken.effect_TS[0, 1] == pytest.approx(estimate[0, 1] - 0.1)


def test_a_rows_shared_error_is_taken_out_when_rows_do_not_differ():
    """All of a row off by the same amount: the reference run's error, not an effect."""
    rng = np.random.default_rng(2)
    truth = 0.05 * rng.normal(size=(12, 12))
    shared = 0.1 * rng.normal(size=(12, 1))
    noise = 0.005
    variance = np.full((12, 12), noise**2 + 0.01)
    shrunken = shrink(truth + shared, variance, np.full((12, 12), 0.1), OWN)
    left = (shrunken.effect_TS - truth)[~OWN]
    assert np.mean(left**2) < 0.3 * np.mean(shared**2)


def test_own_effects_keep_the_weight_of_what_is_certain_about_them():
    """Posterior mean of a normal prior: weight prior variance / (prior variance + variance)."""
    rng = np.random.default_rng(5)
    se = np.linspace(0.01, 0.3, 12)
    truth, estimate, variance, common = world(seed=5)
    own = np.arange(12)
    estimate[own, own] = truth[own, own] + se * rng.normal(size=12)
    variance[own, own] = se**2
    shrunken = shrink(estimate, variance, common, OWN)
    prior = shrunken.own
    assert prior is not None
    weight = prior.entry_variance / (prior.entry_variance + se**2)
    assert weight[0] > 0.9 > 0.5 > weight[-1], "the certain and the uncertain are both there"
    expected = prior.mean + weight * (estimate[own, own] - prior.mean)
    limited = np.clip(expected, estimate[own, own] - se, estimate[own, own] + se)
    np.testing.assert_allclose(shrunken.effect_TS[own, own], limited, rtol=1e-9)


def test_scaling_effects_scales_the_answer():
    _, estimate, variance, common = world(seed=9)
    one = shrink(estimate, variance, common, OWN)
    thousandth = shrink(estimate * 1e-3, variance * 1e-6, common * 1e-3, OWN)
    np.testing.assert_allclose(thousandth.effect_TS, one.effect_TS * 1e-3, rtol=1e-4, atol=1e-9)


def test_targets_without_a_source_of_their_own_are_shrunk_too():
    _, estimate, variance, common = world()
    own = OWN.copy()
    own[10:] = False
    shrunken = shrink(estimate, variance, common, own)
    assert np.all(shrunken.effect_TS[11] != estimate[11])
    assert np.isfinite(shrunken.effect_se_TS).all()
