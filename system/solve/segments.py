"""A model with curves as one whose sources are segments, and its answer in sources again.

Shape suffix ``X``: segments of all sources, the innermost of every source first, [K * S].
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from system.solve.curves import Curve, Side, pad
from system.solve.effects import Effects
from system.solve.explain import Prices
from system.solve.model import Model
from system.solve.objectives import Outcome, solve_fractional
from system.solve.problem import MixProblem
from system.solve.whole import solve_whole


def solve_curved(model: Model) -> Outcome:
    """The best mix of a model with curves; its answer has prices, but no ranges.

    Ties are settled between segments: least total move, then least sum of squares over segments.
    """
    assert model.curve is not None
    curve = padded(model.curve)
    expanded = expand(model, curve)
    solve = solve_whole if model.options.integer else solve_fractional
    return collapse(model, curve, expanded, solve(expanded))


def padded(curve: Curve) -> Curve:
    """The curve with equally many segments on both sides."""
    count = max(len(side.width_KS) for side in (curve.add, curve.remove))
    return replace(curve, add=pad(curve.add, count), remove=pad(curve.remove, count))


def expand(model: Model, curve: Curve) -> Model:
    """The model over segments: each has its own slopes and room, all share the source's limits."""
    count, problem = len(curve.add.width_KS), model.problem
    size = model.num_sources
    base_X = np.concatenate([model.base_S, np.zeros((count - 1) * size)])
    segments = MixProblem(
        categories=tuple(f"{j}/{k}" for k in range(count) for j in range(size)),
        targets=problem.targets,
        base_S=base_X,
        effect_add_TS=_flat(curve.add),
        effect_remove_TS=_flat(curve.remove),
        importance_T=problem.importance_T,
    )
    effects = Effects(segments, model.options)
    score_add_X, score_remove_X = effects.score(segments.importance_T)
    up_X = curve.add.fill(model.up_S).ravel()
    return replace(
        model,
        problem=segments,
        effects=effects,
        curve=None,
        length_S=np.tile(model.length_S, count),
        base_S=base_X,
        lower_S=np.zeros(count * size),
        ceiling_S=base_X + up_X,
        is_supply_S=np.tile(model.is_supply_S, count),
        cap_S=np.full(count * size, np.inf),
        up_S=up_X,
        down_S=curve.remove.fill(model.down_S).ravel(),
        must_remove_S=curve.remove.fill(model.must_remove_S).ravel(),
        groups=tuple(
            replace(group, members=np.concatenate([group.members + k * size for k in range(count)]))
            for group in model.groups
        ),
        score_add_S=score_add_X,
        score_remove_S=score_remove_X,
    )


def _flat(side: Side) -> np.ndarray:
    """[T, X] slopes."""
    return np.concatenate(list(side.slope_KTS), axis=1)


def collapse(model: Model, curve: Curve, expanded: Model, outcome: Outcome) -> Outcome:
    """The answer over sources."""
    size = expanded.num_sources
    u_S, v_S = (
        part_X.reshape(-1, model.num_sources).sum(axis=0)
        for part_X in (outcome.x_C[:size], outcome.x_C[size : 2 * size])
    )
    net_S = _snap(u_S - v_S, model)
    u_S, v_S = np.maximum(net_S, 0.0), np.maximum(-net_S, 0.0)
    prices, relaxed = outcome.prices, outcome.relaxed_prices
    return replace(
        outcome,
        x_C=np.r_[u_S, v_S],
        prices=None if prices is None else _prices(model, curve, expanded, prices, u_S, v_S),
        ranges=None,
        relaxed_prices=None
        if relaxed is None
        else _prices(model, curve, expanded, relaxed, model.up_S, model.down_S),
    )


def _snap(net_S: np.ndarray, model: Model) -> np.ndarray:
    """Sums over segments that reach a bound up to rounding are the bound."""
    for bound_S in (model.up_S, -model.down_S):
        near_S = np.abs(net_S - bound_S) <= 1e-12 * np.maximum(np.abs(bound_S), 1.0)
        net_S = np.where(near_S, bound_S, net_S)
    return net_S


def _prices(
    model: Model,
    curve: Curve,
    expanded: Model,
    prices: Prices,
    u_S: np.ndarray,
    v_S: np.ndarray,
) -> Prices:
    """What one example more is worth: of the segment that it would enter; one less: would leave."""
    up_KS = expanded.up_S.reshape(-1, model.num_sources)
    down_KS = expanded.down_S.reshape(-1, model.num_sources)
    place_S = np.arange(model.num_sources)
    has_room_KS = (curve.add.fill(u_S) < up_KS) & (up_KS > 0)
    enters_S = np.where(has_room_KS.any(axis=0), np.argmax(has_room_KS, axis=0), _last(up_KS > 0))
    leaves_S = _last((curve.remove.fill(v_S) > 0) & (down_KS > 0))
    return replace(
        prices,
        reduced_add_S=prices.reduced_add_S.reshape(-1, model.num_sources)[enters_S, place_S],
        reduced_remove_S=prices.reduced_remove_S.reshape(-1, model.num_sources)[leaves_S, place_S],
    )


def _last(mask_KS: np.ndarray) -> np.ndarray:
    """[S] the outermost true segment; the innermost where there is none."""
    outermost_S = len(mask_KS) - 1 - np.argmax(mask_KS[::-1], axis=0)
    return np.where(mask_KS.any(axis=0), outermost_S, 0)
