"""Taxonomy: planted graphs are found, noise is not, and the record survives JSON."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from system.errors import ConfigError, DataError
from system.taxonomy import Taxonomy, estimate_taxonomy
from system.taxonomy.dependence import (
    DependenceRule,
    EffectTable,
    direction_correlation,
    draw_effects,
)

OWN, HELP = 0.10, 0.04


def names(size):
    return [f"c{i:02d}" for i in range(size)]


def planted(size, density, seed):
    """Effects in nats of a random acyclic world: own data helps, and so do a category's sources."""
    generator = np.random.default_rng(seed)
    edges = np.tril(generator.random((size, size)) < density, -1)
    shuffle = generator.permutation(size)
    edges = edges[np.ix_(shuffle, shuffle)]
    return edges, OWN * np.eye(size) + HELP * edges


def found(taxonomy):
    index = {name: i for i, name in enumerate(taxonomy.categories)}
    edges = np.zeros((len(index), len(index)), dtype=bool)
    for edge in taxonomy.edges:
        edges[index[edge.target], index[edge.source]] = True
    return edges


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.floats(0, 0.6), st.integers(0, 1000), st.sampled_from(["nats", "gamma"])
)
def test_a_planted_graph_without_noise_is_recovered_exactly(size, density, seed, unit):
    edges, effect = planted(size, density, seed)
    taxonomy = estimate_taxonomy(
        names(size), effect, np.zeros_like(effect), asymmetry_unit=unit, num_bootstrap=5
    )
    assert (found(taxonomy) == edges).all()
    assert (taxonomy.gap, taxonomy.method, taxonomy.dropped) == (0.0, "no cycle", ())
    assert all(edge.stability == 1.0 for edge in taxonomy.edges)
    for edge in taxonomy.edges:
        level = taxonomy.level_by_category
        assert level[edge.target] > level[edge.source]
        assert taxonomy.order.index(edge.source) < taxonomy.order.index(edge.target)


@pytest.mark.parametrize("unit", ["nats", "gamma"])
def test_with_noise_most_edges_are_found_and_few_are_false(unit):
    # Asymmetry of 0.04 at errors of 0.008 each way: z of 3.5 on average.
    hits = false = true = reported = 0
    for seed in range(40):
        edges, effect = planted(14, 0.2, seed)
        noise = np.random.default_rng(1000 + seed).normal(size=effect.shape) * 0.008
        error = np.full_like(effect, 0.008)
        taxonomy = estimate_taxonomy(
            names(14), effect + noise, error, asymmetry_unit=unit, num_bootstrap=0
        )
        got = found(taxonomy)
        hits += (got & edges).sum()
        false += (got & ~edges).sum()
        true += edges.sum()
        reported += got.sum()
    assert hits / true > 0.8
    assert false / reported < 0.1


def test_pure_noise_gives_no_edges_at_about_the_promised_rate():
    empty = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(10, 10)) * 0.01
        taxonomy = estimate_taxonomy(names(10), noise, np.full((10, 10), 0.01), num_bootstrap=0)
        empty += not taxonomy.edges
    assert empty >= 180  # the false discovery rate 0.1 is the chance of any edge where none is true


def test_nothing_significant_is_an_answer_that_says_so():
    taxonomy = estimate_taxonomy(names(4), np.zeros((4, 4)), np.ones((4, 4)), num_bootstrap=10)
    assert taxonomy.levels == (0, 0, 0, 0)
    assert taxonomy.edges == ()
    assert taxonomy.isolated == taxonomy.categories == taxonomy.order
    assert taxonomy.gap == 0.0
    assert "No dependency is significant among 12 ordered pairs" in taxonomy.summary
    assert taxonomy.level_stability is not None


def test_one_category_has_level_zero_and_nothing_to_test():
    taxonomy = estimate_taxonomy(["only"], np.array([[0.1]]), np.array([[0.01]]), num_bootstrap=3)
    assert (taxonomy.levels, taxonomy.num_tested) == ((0,), 0)
    assert "could be tested" in taxonomy.summary


def test_mutual_help_of_equal_size_is_no_dependency():
    effect = np.array([[0.1, 0.05], [0.05, 0.1]])
    assert not estimate_taxonomy(["a", "b"], effect, np.full((2, 2), 1e-3)).edges


def test_harm_the_other_way_round_is_no_help():
    # b harms a: the asymmetry is certain, but a does not help b.
    effect = np.array([[0.1, -0.05], [0.0, 0.1]])
    assert not estimate_taxonomy(["a", "b"], effect, np.full((2, 2), 1e-3)).edges


def test_smallest_effect_keeps_certain_but_tiny_help_out():
    effect = np.array([[0.1, 0.0], [0.01, 0.1]])
    error = np.full((2, 2), 1e-3)
    assert len(estimate_taxonomy(["a", "b"], effect, error).edges) == 1
    assert not estimate_taxonomy(["a", "b"], effect, error, smallest_effect=0.02).edges


def test_gamma_asymmetry_judges_each_target_by_its_own_effect():
    # a is ten times easier to move than b.  In nats b helps a more; per own data, a helps b.
    effect = np.array([[1.0, 0.10], [0.08, 0.1]])
    error = np.full((2, 2), 1e-3)
    (nats,) = estimate_taxonomy(["a", "b"], effect, error, asymmetry_unit="nats").edges
    (gamma,) = estimate_taxonomy(["a", "b"], effect, error, asymmetry_unit="gamma").edges
    assert (nats.target, gamma.target) == ("a", "b")


def test_p_and_z_are_those_of_the_weaker_of_the_two_tests():
    effect = np.array([[0.1, 0.03], [0.01, 0.1]])
    error = np.array([[0.01, 0.006], [0.004, 0.01]])
    taxonomy = estimate_taxonomy(["a", "b"], effect, error, false_discovery_rate=0.4)
    (edge,) = taxonomy.edges
    asymmetry_z = 0.02 / np.hypot(0.006, 0.004)
    assert edge.z == pytest.approx(asymmetry_z)
    assert edge.p == pytest.approx(stats.norm.sf(asymmetry_z))
    assert edge.weight == pytest.approx(0.02 * asymmetry_z**2 / (1 + asymmetry_z**2))
    few = estimate_taxonomy(
        ["a", "b"], effect, error, degrees_of_freedom=2.0, false_discovery_rate=0.4
    )
    welch = (0.006**2 + 0.004**2) ** 2 / (0.006**4 / 2 + 0.004**4 / 2)
    assert few.edges[0].p == pytest.approx(stats.t.sf(asymmetry_z, welch))


def test_a_cycle_loses_its_weakest_edge_and_names_it():
    effect = OWN * np.eye(3)
    effect[1, 0], effect[2, 1], effect[0, 2] = 0.05, 0.04, 0.03
    taxonomy = estimate_taxonomy(["a", "b", "c"], effect, np.full((3, 3), 1e-3))
    assert [(e.target, e.source) for e in taxonomy.edges] == [("b", "a"), ("c", "b")]
    assert [(e.target, e.source) for e in taxonomy.dropped] == [("a", "c")]
    assert taxonomy.levels == (0, 1, 2)
    assert taxonomy.method == "dynamic programming"
    assert "1 more would close a cycle" in taxonomy.summary


def test_a_shortcut_stays_an_edge_but_not_in_the_reduction():
    effect = OWN * np.eye(3)
    effect[1, 0] = effect[2, 1] = effect[2, 0] = HELP
    taxonomy = estimate_taxonomy(["a", "b", "c"], effect, np.full((3, 3), 1e-3))
    reduced = {(e.target, e.source): e.is_reduced for e in taxonomy.edges}
    assert reduced == {("b", "a"): True, ("c", "a"): False, ("c", "b"): True}


def test_isolated_categories_have_no_place_in_the_curriculum():
    effect = OWN * np.eye(3)
    effect[1, 0] = HELP
    taxonomy = estimate_taxonomy(["a", "b", "c"], effect, np.full((3, 3), 1e-3))
    assert taxonomy.level_by_category == {"a": 0, "b": 1, "c": 0}
    assert taxonomy.curriculum_levels == {"a": 0, "b": 1, "c": None}


def test_entries_that_are_not_identifiable_carry_no_edge_and_may_be_nan():
    _, effect = planted(5, 0.5, 3)
    effect[1:, 0] = np.nan
    identifiable = ~np.isnan(effect)
    taxonomy = estimate_taxonomy(names(5), effect, np.full((5, 5), 1e-3), identifiable=identifiable)
    assert not found(taxonomy)[~identifiable].any()
    assert not found(taxonomy)[~identifiable.T].any()
    assert taxonomy.num_tested == 12
    nothing = estimate_taxonomy(
        names(5), effect, effect * np.nan, identifiable=np.zeros((5, 5), dtype=bool)
    )
    assert "two replications" in nothing.summary


def test_bootstrap_is_seeded_and_high_for_strong_edges_low_for_weak_ones():
    effect = OWN * np.eye(4)
    effect[1, 0], effect[3, 2] = 0.08, 0.026
    error = np.full((4, 4), 0.006)
    first = estimate_taxonomy(names(4), effect, error, num_bootstrap=300, seed=1)
    assert first == estimate_taxonomy(names(4), effect, error, num_bootstrap=300, seed=1)
    other = estimate_taxonomy(names(4), effect, error, num_bootstrap=300, seed=2)
    stability = {edge.source: edge.stability for edge in first.edges}
    assert stability["c00"] > 0.99
    assert 0.3 < stability["c02"] < 0.95
    assert other.edges != first.edges
    assert [e.p for e in other.edges] == [e.p for e in first.edges]


def test_draws_have_the_variance_and_the_correlation_of_the_replications():
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(60, 1, 1)) * np.ones((1, 2, 2))
    replications = shared + 0.3 * generator.normal(size=(60, 2, 2))
    error = np.maximum(replications.std(axis=0, ddof=1) / np.sqrt(60), 0.0)
    error[0, 0] *= 3  # held-out sampling on top
    table = EffectTable(
        categories=("a", "b"),
        effect_TS=np.zeros((2, 2)),
        se_TS=error,
        df_TS=np.full((2, 2), np.inf),
        usable_TS=np.ones((2, 2), dtype=bool),
    )
    draws = np.array([draw_effects(table, replications, generator) for _ in range(4000)])
    assert draws.std(axis=0) == pytest.approx(error, rel=0.05)
    correlation = np.corrcoef(draws.reshape(4000, 4).T)
    observed = np.corrcoef(replications.reshape(60, 4).T)
    assert correlation[1, 2] == pytest.approx(observed[1, 2], abs=0.03)
    assert correlation[0, 3] == pytest.approx(observed[0, 3] / 3, abs=0.06)


def test_errors_shared_by_both_directions_make_the_asymmetry_clearer():
    _, effect = planted(6, 0.3, 1)
    noise = np.random.default_rng(4).normal(size=(8, 6, 6)) * 0.02
    replications = effect + noise + noise.transpose(0, 2, 1)
    mean = replications.mean(axis=0)
    error = np.full((6, 6), np.sqrt(2) * 0.02 / np.sqrt(8))
    apart = estimate_taxonomy(names(6), mean, error, num_bootstrap=0)
    paired = estimate_taxonomy(names(6), mean, error, effect_RTS=replications, num_bootstrap=0)
    p_apart = {(e.target, e.source): e.p for e in apart.edges}
    p_paired = {(e.target, e.source): e.p for e in paired.edges}
    assert set(p_paired) >= set(p_apart)
    assert p_apart
    assert sum(p_paired[pair] for pair in p_apart) < sum(p_apart.values())


def test_two_replications_of_one_pair_prove_no_correlation():
    error = np.full((2, 2), 0.01)
    table = EffectTable(
        categories=("a", "b"),
        effect_TS=np.zeros((2, 2)),
        se_TS=error,
        df_TS=np.ones((2, 2)),
        usable_TS=np.ones((2, 2), dtype=bool),
    )
    replications = np.array([[[0, 0.01], [0.01, 0]], [[0, -0.01], [-0.01, 0]]])
    assert 0 < direction_correlation(table, replications) < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(8)))
def test_renaming_the_categories_renames_the_taxonomy(seed, permutation):
    _, effect = planted(8, 0.3, seed)
    effect = effect + np.random.default_rng(seed).normal(size=(8, 8)) * 0.01
    error = np.full((8, 8), 0.01)
    plain = estimate_taxonomy(names(8), effect, error, num_bootstrap=0)
    index = np.ix_(permutation, permutation)
    permuted_names = [names(8)[i] for i in permutation]
    renamed = estimate_taxonomy(permuted_names, effect[index], error[index], num_bootstrap=0)
    assert set(renamed.edges) == set(plain.edges)
    assert renamed.level_by_category == plain.level_by_category


def test_scaling_all_effects_and_errors_changes_nothing_but_the_weights():
    _, effect = planted(8, 0.3, 7)
    effect = effect + np.random.default_rng(7).normal(size=(8, 8)) * 0.01
    error = np.full((8, 8), 0.01)
    one = estimate_taxonomy(names(8), effect, error, num_bootstrap=20)
    big = estimate_taxonomy(names(8), 1000 * effect, 1000 * error, num_bootstrap=20)
    assert one.levels == big.levels
    assert [e.p for e in one.edges] == pytest.approx([e.p for e in big.edges])
    assert [1000 * e.weight for e in one.edges] == pytest.approx([e.weight for e in big.edges])


def test_the_record_survives_json():
    _, effect = planted(6, 0.4, 2)
    for error in (np.zeros((6, 6)), np.full((6, 6), 0.01)):
        taxonomy = estimate_taxonomy(names(6), effect, error, num_bootstrap=5)
        text = json.dumps(taxonomy.to_json(), allow_nan=False)
        again = Taxonomy.from_json(json.loads(text))
        assert again.to_json() == taxonomy.to_json()
        assert again.levels == taxonomy.levels
        assert len(again.edges) == len(taxonomy.edges) > 0


def test_the_test_holds_its_level_at_the_edge_of_both_hypotheses():
    # No asymmetry but real mutual help: the asymmetry test alone decides, at its nominal level.
    generator = np.random.default_rng(11)
    rule = DependenceRule(
        false_discovery_rate=0.1, asymmetry_unit="nats", smallest_effect=0.0, rho=0.0
    )
    p_values = []
    for _ in range(2000):
        table = EffectTable(
            categories=("a", "b"),
            effect_TS=np.array([[0.1, 0.05], [0.05, 0.1]]) + 0.01 * generator.normal(size=(2, 2)),
            se_TS=np.full((2, 2), 0.01),
            df_TS=np.full((2, 2), np.inf),
            usable_TS=np.ones((2, 2), dtype=bool),
        )
        p_values.append(rule.test(table).p_TS[0, 1])
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_bad_input_is_refused_with_the_place():
    effect, error = np.zeros((3, 3)), np.ones((3, 3))
    with pytest.raises(DataError, match=r"shape is \(2, 3\)"):
        estimate_taxonomy(names(3), effect[:2], error)
    with pytest.raises(DataError, match="source 'c02' on target 'c01' must be a finite number"):
        broken = effect.copy()
        broken[1, 2] = np.nan
        estimate_taxonomy(names(3), broken, error)
    with pytest.raises(DataError, match=r"standard error .* from 0 up"):
        estimate_taxonomy(names(3), effect, -error)
    with pytest.raises(DataError, match="replication"):
        estimate_taxonomy(names(3), effect, error, effect_RTS=np.zeros((3, 3)))
    with pytest.raises(DataError, match="degrees of freedom"):
        estimate_taxonomy(names(3), effect, error, degrees_of_freedom=0.0)
    with pytest.raises(DataError, match="no name twice"):
        estimate_taxonomy(["a", "a", "b"], effect, error)
    with pytest.raises(ConfigError, match="false_discovery_rate"):
        estimate_taxonomy(names(3), effect, error, false_discovery_rate=1.0)
    with pytest.raises(ConfigError, match="asymmetry_unit"):
        estimate_taxonomy(names(3), effect, error, asymmetry_unit="bits")  # pyright: ignore
