"""Finds the acyclic subgraph of largest weight, its levels and its transitive reduction.

An acyclic subgraph is a set of edges that agree with one linear order, so the best subgraph follows
from the best linear order.  Cycles exist only inside strongly connected clusters.  So all edges
between clusters are kept, and each cluster is ordered alone:

- up to 16 categories: exactly, by dynamic programming over subsets;
- up to `exact_limit`: exactly, as a linear-ordering MILP;
- beyond: by local search, with an upper bound.

Convention: `weight[i, j] > 0` means that i depends on j, so j comes first.
In this module `gain[a, b]` is the weight gained by putting a before b: the transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from system.taxonomy.linear_ordering import relaxation_bound, solve_milp

DYNAMIC_LIMIT = 16  # 2**16 subsets of 16 categories take 0.1 s and 17 MB
RELAXATION_LIMIT = 60  # 4 s at 60 categories without any structure, a minute at 100
NUM_KICKS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class AcyclicSubgraph:
    """The kept edges, their weight, and a proved upper bound on the weight of any subgraph."""

    kept: np.ndarray
    """[T, S] bool."""
    objective: float
    bound: float
    method: str


def acyclic_subgraph(
    weight: np.ndarray, *, exact_limit: int, node_limit: int, is_draft: bool = False
) -> AcyclicSubgraph:
    """The acyclic subgraph of largest weight of a graph with weights >= 0 ([T, S] float64).

    Of equal orders the first in category order is chosen (for clusters of up to 16 categories;
    beyond, the solver's deterministic choice).  Limits are sizes and branch-and-bound nodes, never
    seconds, so a slow machine gives the same answer.

    Args:
        weight: 0 = no edge.
        exact_limit: largest cluster that is solved exactly.
        node_limit: largest number of branch-and-bound nodes per cluster; at the limit the best
            order so far is returned with its gap.
        is_draft: local search alone, without a bound (for the bootstrap).
    """
    kept = weight > 0
    num_clusters, label = connected_components(kept, directed=True, connection="strong")
    open_gap = 0.0
    methods: set[str] = set()
    for cluster in range(num_clusters):
        members = np.flatnonzero(label == cluster)
        if len(members) < 2:
            continue
        gain = weight[np.ix_(members, members)].T
        if is_draft:
            order, bound, method = local_search(gain, num_kicks=0), np.inf, "local search"
        else:
            order, bound, method = _order_cluster(gain, exact_limit, node_limit)
        methods.add(method)
        place = np.argsort(order)
        kept[np.ix_(members, members)] &= place[:, None] > place[None, :]
        open_gap += max(0.0, min(bound, gain.sum()) - order_value(gain, order))
    objective = float(weight[kept].sum())
    return AcyclicSubgraph(
        kept=kept,
        objective=objective,
        bound=objective + open_gap,
        method=" + ".join(sorted(methods)) or "no cycle",
    )


def _order_cluster(
    gain: np.ndarray, exact_limit: int, node_limit: int
) -> tuple[np.ndarray, float, str]:
    size = len(gain)
    if size <= min(DYNAMIC_LIMIT, exact_limit):
        order = best_order(gain)
        return order, order_value(gain, order), "dynamic programming"
    start = local_search(gain, num_kicks=NUM_KICKS)
    if size <= exact_limit:
        order, bound = solve_milp(gain, start, node_limit)
        return order, bound, "MILP"
    if size <= RELAXATION_LIMIT:
        return start, relaxation_bound(gain), "local search"
    return start, float(np.maximum(gain, gain.T).sum() / 2), "local search"


def order_value(gain: np.ndarray, order: np.ndarray) -> float:
    """Weight of the edges that agree with the order."""
    return float(np.triu(gain[np.ix_(order, order)], 1).sum())


def best_order(gain: np.ndarray) -> np.ndarray:
    """The best linear order; of equal ones the first in category order.

    Dynamic programming over subsets (as Held and Karp): `rest[S]` is the largest gain that the
    categories outside S can still add if those in S come first.  The order is then read forwards
    from the empty set; taking the first category that attains `rest` breaks ties.
    """
    size = len(gain)
    subsets = np.arange(1 << size)
    # won[v, S]: gain between the members of S, all before v, and v itself.
    won = np.zeros((size, 1 << size))
    for u in range(size):
        won[:, 1 << u : 2 << u] = won[:, : 1 << u] + gain[u][:, None]
    num_members = np.bitwise_count(subsets)
    rest = np.full(1 << size, -np.inf)
    rest[-1] = 0.0
    for count in range(size - 1, -1, -1):
        layer = subsets[num_members == count]
        for v in range(size):
            without = layer[(layer >> v) & 1 == 0]
            value = won[v, without] + rest[without | (1 << v)]
            rest[without] = np.maximum(rest[without], value)
    tolerance = 1e-12 * (1.0 + gain.sum())
    order, placed = [], 0
    for _ in range(size):
        left = [v for v in range(size) if not placed >> v & 1]
        values = [won[v, placed] + rest[placed | 1 << v] for v in left]
        v = next(v for v, x in zip(left, values, strict=True) if x >= rest[placed] - tolerance)
        order.append(v)
        placed |= 1 << v
    return np.array(order)


def local_search(gain: np.ndarray, *, num_kicks: int) -> np.ndarray:
    """A good linear order: Becker's quotients, then insertions, then seeded kicks.

    Becker: the first category is the one with the largest ratio of its gain from preceding the rest
    to the gain of the rest from preceding it.  Insertion: move one category to another position,
    best move first, until no move improves.  Kick: move a few categories at random and search
    again; better orders are kept.
    """
    size = len(gain)
    best = _insertions(gain, _becker(gain))
    best_value = order_value(gain, best)
    generator = np.random.default_rng(0)
    for _ in range(num_kicks):
        kicked = best.tolist()
        for _ in range(max(3, size // 10)):
            kicked.insert(int(generator.integers(size)), kicked.pop(int(generator.integers(size))))
        candidate = _insertions(gain, np.array(kicked))
        value = order_value(gain, candidate)
        if value > best_value + 1e-12 * (1.0 + best_value):
            best, best_value = candidate, value
    return best


def _becker(gain: np.ndarray) -> np.ndarray:
    left = np.arange(len(gain))
    order = []
    while len(left):
        inside = gain[np.ix_(left, left)]
        first = int(np.argmax((inside.sum(axis=1) + 1e-300) / (inside.sum(axis=0) + 1e-300)))
        order.append(left[first])
        left = np.delete(left, first)
    return np.array(order)


def _insertions(gain: np.ndarray, order: np.ndarray) -> np.ndarray:
    size = len(order)
    order = order.copy()
    position = np.arange(size)
    tolerance = 1e-12 * (1.0 + gain.sum())
    while True:
        ordered = gain[np.ix_(order, order)]
        # reach[p, q]: net gain of the category at p from preceding all those up to position q.
        reach = np.cumsum(ordered - ordered.T, axis=1)
        own = np.diagonal(reach)[:, None]
        earlier = own - np.pad(reach, ((0, 0), (1, 0)))[:, :-1]
        change = np.where(position[None, :] < position[:, None], earlier, own - reach)
        p, q = np.unravel_index(int(np.argmax(change)), change.shape)
        if change[p, q] <= tolerance:
            return order
        moved = order[p]
        order = np.insert(np.delete(order, p), q, moved)


def longest_paths(kept_TS: np.ndarray) -> np.ndarray:
    """[S] int: number of edges on the longest chain of sources below each category; 0 = base."""
    level_S = np.zeros(len(kept_TS), dtype=np.int64)
    for _ in range(len(kept_TS)):
        above_S = np.where(kept_TS, level_S[None, :] + 1, 0).max(axis=1, initial=0)
        if (above_S == level_S).all():
            return level_S
        level_S = above_S
    raise AssertionError("the graph has a cycle")


def transitive_reduction(kept_TS: np.ndarray) -> np.ndarray:
    """[T, S] bool: the edges of an acyclic graph that are not implied by a longer path."""
    reach = kept_TS.copy()
    num_steps = 1
    while num_steps < len(kept_TS):
        reach |= (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
        num_steps *= 2
    implied = (kept_TS.astype(np.float32) @ reach.astype(np.float32)) > 0
    return kept_TS & ~implied
