"""Estimates the dependency graph from effects with errors: tests, weights, levels, bootstrap.

Legend of shape suffixes: R replications, T target (measured on), S source (trained on); both axes
have the same categories in the same order.  Entry `[i, j]` stands for "i depends on j".

i depends on j if both conditions hold:

- *help*: `effect[i, j] > smallest_effect`, one-sided t test (normal where the degrees of
  freedom are infinite);
- *asymmetry*: `d[i, j] = effect[i, j] - effect[j, i] > 0`, one-sided t test with
  `se(d)^2 = se_ij^2 + se_ji^2 - 2 rho se_ij se_ji` and Welch-Satterthwaite degrees of freedom.
  rho, one number for the whole matrix, is the correlation of the errors of the two directions over
  replications; 0 without replications.  With `asymmetry_unit="gamma"` the two effects are first
  divided by the own effects of their targets (`effect[i, j] / effect[i, i]`, errors by the delta
  method).  This is fairer if some targets are easier to move than others, but it is defined only if
  both own effects are positive and identifiable.

The larger of the two p-values tests both conditions at once (intersection-union test).
Benjamini-Hochberg (J. R. Statist. Soc. B 57, 1995) over all tested ordered pairs limits the
expected share of false edges.  The weight of an edge is `d * z^2 / (1 + z^2)` with `z = d / se(d)`:
the asymmetry, shrunk by its error.  The acyclic subgraph of largest weight is kept; the level of a
category is the length of its longest path in it.

The stability of an edge is the share of bootstrap draws whose acyclic graph (found by local search)
has the edge.  Draws are normal around the effects with the given errors; with replications they
keep the correlations that these show (see `draw_effects`).  A draw adds the noise a second time,
so stabilities are rather too low than too high.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from system.errors import ConfigError
from system.taxonomy.dependence import (
    DependenceRule,
    EffectTable,
    PairTests,
    direction_correlation,
    draw_effects,
    read_table,
)
from system.taxonomy.ordering import acyclic_subgraph, longest_paths, transitive_reduction
from system.taxonomy.records import AsymmetryUnit, Edge, Taxonomy


def estimate_taxonomy(
    categories: Sequence[str],
    effect_TS: np.ndarray,
    effect_se_TS: np.ndarray,
    *,
    effect_RTS: np.ndarray | None = None,
    degrees_of_freedom: np.ndarray | float = np.inf,
    identifiable: np.ndarray | None = None,
    false_discovery_rate: float = 0.1,
    asymmetry_unit: AsymmetryUnit = "nats",
    smallest_effect: float = 0.0,
    num_bootstrap: int = 200,
    seed: int = 0,
    exact_limit: int = 40,
    node_limit: int = 500,
) -> Taxonomy:
    """Finds which categories depend on which, and the levels, by the rules of this module.

    Without a significant pair there are no edges, and all levels are 0.

    Args:
        categories: names, in the order of both axes.
        effect_TS: [T, S] float64, nats per response token per unit of data; positive = helps.
        effect_se_TS: [T, S] standard errors, same unit, >= 0 (0 = known exactly).
        effect_RTS: [R, T, S] effects of each replication, if there are any.
        degrees_of_freedom: of the standard errors; one number or [T, S].
        identifiable: [T, S] bool, entries that may be used; a pair needs both directions.
        false_discovery_rate: between 0 and 1, exclusive.
        asymmetry_unit: `nats` or `gamma`.
        smallest_effect: nats; a smaller help is not a dependency.
        num_bootstrap: number of draws; 0 = no stabilities.
        seed: of the draws.
        exact_limit: largest cluster of mutually reachable categories that is solved exactly.
        node_limit: largest number of branch-and-bound nodes per cluster.

    Raises:
        DataError: arrays do not fit the categories, or usable entries are not finite.
        ConfigError: a setting is out of range.
    """
    _check_settings(false_discovery_rate, asymmetry_unit, num_bootstrap)
    table = read_table(
        categories, effect_TS, effect_se_TS, effect_RTS, degrees_of_freedom, identifiable
    )
    rule = DependenceRule(
        false_discovery_rate=false_discovery_rate,
        asymmetry_unit=asymmetry_unit,
        smallest_effect=smallest_effect,
        rho=direction_correlation(table, effect_RTS),
    )
    tests = rule.test(table)
    graph = acyclic_subgraph(tests.weight_TS, exact_limit=exact_limit, node_limit=node_limit)
    level_S = longest_paths(graph.kept)
    stability_TS, level_stability_S = _bootstrap(
        table, rule, effect_RTS, level_S, num_bootstrap=num_bootstrap, seed=seed
    )
    edges = functools.partial(
        _read_edges, table.categories, tests=tests, is_reduced_TS=transitive_reduction(graph.kept),
        stability_TS=stability_TS if num_bootstrap else None,
    )  # fmt: skip
    return Taxonomy(
        categories=table.categories,
        edges=edges(chosen_TS=graph.kept),
        dropped=edges(chosen_TS=(tests.weight_TS > 0) & ~graph.kept),
        levels=tuple(int(level) for level in level_S),
        level_stability=tuple(float(x) for x in level_stability_S) if num_bootstrap else None,
        order=tuple(table.categories[s] for s in np.argsort(level_S, kind="stable")),
        objective=graph.objective,
        gap=(graph.bound - graph.objective) / graph.bound if graph.bound > 0 else 0.0,
        method=graph.method,
        num_tested=int(tests.tested_TS.sum()),
        false_discovery_rate=float(false_discovery_rate),
        asymmetry_unit=asymmetry_unit,
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


def _check_settings(false_discovery_rate: float, asymmetry_unit: str, num_bootstrap: int) -> None:
    if not 0 < false_discovery_rate < 1:
        raise ConfigError(
            f"false_discovery_rate must lie between 0 and 1; got {false_discovery_rate!r}."
        )
    if asymmetry_unit not in ("nats", "gamma"):
        raise ConfigError(f"asymmetry_unit must be nats or gamma; got {asymmetry_unit!r}.")
    if num_bootstrap < 0:
        raise ConfigError(f"num_bootstrap must be 0 or more; got {num_bootstrap!r}.")


def _read_edges(
    names: tuple[str, ...],
    chosen_TS: np.ndarray,
    tests: PairTests,
    *,
    stability_TS: np.ndarray | None,
    is_reduced_TS: np.ndarray,
) -> tuple[Edge, ...]:
    return tuple(
        Edge(
            target=names[i],
            source=names[j],
            weight=float(tests.weight_TS[i, j]),
            z=float(tests.z_TS[i, j]),
            p=float(tests.p_TS[i, j]),
            stability=None if stability_TS is None else float(stability_TS[i, j]),
            is_reduced=bool(is_reduced_TS[i, j]),
        )
        for i, j in np.argwhere(chosen_TS)
    )


def _bootstrap(
    table: EffectTable,
    rule: DependenceRule,
    effect_RTS: np.ndarray | None,
    level_S: np.ndarray,
    *,
    num_bootstrap: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Share of draws with each edge, [T, S], and with each category's level, [S]."""
    generator = np.random.default_rng(seed)
    edge_TS, same_S = np.zeros_like(table.effect_TS), np.zeros(len(level_S))
    for _ in range(num_bootstrap):
        drawn = replace(table, effect_TS=draw_effects(table, effect_RTS, generator))
        weight_TS = rule.test(drawn).weight_TS
        kept = acyclic_subgraph(weight_TS, exact_limit=0, node_limit=0, is_draft=True).kept
        edge_TS += kept
        same_S += longest_paths(kept) == level_S
    return edge_TS / max(num_bootstrap, 1), same_S / max(num_bootstrap, 1)
