"""Whole examples and a limited number of categories: branch and bound in HiGHS.

First the best objective, then, with it held, a total move within the gap of the smallest. Counts
come out of the search as whole numbers; nothing is rounded afterwards. Duals do not exist; those of
the fractional problem, on the chosen categories where their number is limited, stand in for them.
"""

from dataclasses import replace

import numpy as np

from system.solve.explain import Prices
from system.solve.highs import ModelInfeasibleError
from system.solve.model import Model
from system.solve.objectives import (
    Outcome,
    budgeted_program,
    level_program,
    pessimistic_gain,
    score_program,
    solve_fractional,
)
from system.solve.program import Point, Program
from system.solve.row_generation import GuardCuts, solve_with_cuts

_GUARDS_AT_ONCE = 512
"""Up to so many guards go into the program from the start: a second search costs more than rows."""
_WORK = 2e7
"""Nodes times matrix entries that the default node limit allows."""


def solve_whole(model: Model) -> Outcome:
    """The mix when ``integer`` or ``max_categories`` is set.

    With ``max-min`` the worst-off target is lifted exactly; among the mixes that do so the one
    with the greatest importance-weighted change is taken, not the full lexicographic order. A
    search that the node limit stopped hands out its best mix and its distance from the bound; ties
    are then left as they are.
    """
    guards = GuardCuts(model, -model.guard_T)
    is_level = model.options.objective == "max-min"
    program = _with_open(model, _program(model, guards))
    _limit(program, model)
    _begin_at_base(program, model)
    best = solve_with_cuts(program, guards)
    is_proven, gap = best.is_proven, best.gap
    gain = best.objective
    if is_level:
        # Second level: keep the worst-off target where it is, then the weighted sum.
        cost_S = np.r_[model.score_add_S, -model.score_remove_S]
        best = _next_stage(program, best, cost_S, guards)
    if is_proven:
        # A slight preference for earlier categories, at most one part in a thousand, guides the
        # search; within its gap (`mip_gap`) any mix may come out, the same one everywhere.
        order_S = 1.0 + 1e-3 * np.arange(model.num_sources) / model.num_sources
        best = _next_stage(program, best, -np.tile(model.length_S * order_S, 2), guards)
    chosen = model
    if model.options.max_categories is not None:
        chosen = _on_open_only(model, best.x_C)
    relaxed = solve_fractional(replace(chosen, options=replace(chosen.options, integer=False)))
    prices = None if relaxed.prices is None else _of_open(chosen, relaxed.prices)
    if not model.options.integer:
        return replace(
            relaxed,
            prices=None,
            ranges=None,
            is_proven=is_proven,
            gap=gap,
            relaxed_prices=prices,
            relaxed_gain=relaxed.gain,
        )
    x_C = best.x_C[: 2 * model.num_sources]
    return Outcome(
        x_C=x_C,
        gain=gain if is_level else pessimistic_gain(model, x_C),
        iterations=program.iterations,
        rows=len(program.labels),
        is_proven=is_proven,
        gap=gap,
        relaxed_prices=prices,
        relaxed_gain=relaxed.gain,
    )


def _next_stage(program: Program, best: Point, cost_S: np.ndarray, guards: GuardCuts) -> Point:
    """Hold what is reached, then maximise ``cost_S`` over ``(u, v)`` from the same point."""
    slack = 1e-9 * max(float(np.abs(program.cost_C * best.x_C).max(initial=0.0)), 1e-12)
    program.add_rows(
        [("objective",)],
        program.cost_C[None, :],
        np.array([best.objective - slack]),
        np.array([np.inf]),
    )
    cost_C = np.zeros(len(program.cost_C))
    cost_C[: len(cost_S)] = cost_S
    program.set_costs(cost_C)
    program.suggest(best.x_C)
    return solve_with_cuts(program, guards)


def _limit(program: Program, model: Model) -> None:
    """The user's node limit, or one that keeps the work about the same at every size."""
    nodes = model.options.mip_max_nodes
    if nodes is None:
        entries = max(len(program.labels) * len(program.cost_C), 1)
        nodes = int(np.clip(_WORK / entries, 20, 2_000))
    program.limit_search(nodes)


def _begin_at_base(program: Program, model: Model) -> None:
    """Staying put satisfies all limits but groups and a number of categories: begin there."""
    limit, held = model.options.max_categories, model.base_S > 0
    if model.groups or (limit is not None and int(held.sum()) > limit):
        return
    x_C = np.zeros(len(program.cost_C))
    if limit is not None:
        x_C[-model.num_sources :] = np.maximum(held, program.lower_C[-model.num_sources :])
    program.suggest(x_C)


def _program(model: Model, guards: GuardCuts) -> Program:
    if model.options.objective == "max-min":
        program = level_program(model)
        active = np.flatnonzero(model.problem.importance_T > 0)
        rows = model.effects.rows(active)
        program.add_rows(
            [("level", model.problem.targets[i]) for i in active],
            np.concatenate([rows, np.full((len(rows), 1), -1.0)], axis=1),
            np.zeros(len(rows)),
            np.full(len(rows), np.inf),
        )
    elif model.effects.off_add_TS is not None:
        program = budgeted_program(model)
    else:
        program = score_program(model)
    guarded = np.flatnonzero(np.isfinite(guards.floor_T))
    if 0 < len(guarded) <= _GUARDS_AT_ONCE:
        rows = np.zeros((len(guarded), len(program.cost_C)))
        rows[:, : 2 * model.num_sources] = model.effects.rows(guarded)
        program.add_rows(
            [("guard", model.problem.targets[i]) for i in guarded],
            rows,
            guards.floor_T[guarded],
            np.full(len(guarded), np.inf),
        )
    return program


def _with_open(model: Model, program: Program) -> Program:
    """Add one 0/1 column per category, open or closed, when their number is limited."""
    limit = model.options.max_categories
    if limit is None:
        return program
    S, C = model.num_sources, len(program.cost_C)
    opened = Program(
        cost_C=np.r_[program.cost_C, np.zeros(S)],
        lower_C=np.r_[program.lower_C, np.where(model.lower_S > 0, 1.0, 0.0)],
        upper_C=np.r_[program.upper_C, np.ones(S)],
        unit_C=np.r_[program.unit_C, np.ones(S)],
        is_integer_C=np.r_[
            np.zeros(C, bool) if program.is_integer_C is None else program.is_integer_C,
            np.ones(S, bool),
        ],
        gap=model.options.mip_gap,
    )
    old = np.concatenate([program.rows, np.zeros((len(program.labels), S))], axis=1)
    opened.add_rows(program.labels, old, program.row_lower_R, program.row_upper_R)
    # w0 + u - v <= most * open: a closed category holds nothing.
    most_S = model.base_S + model.up_S
    rows = np.zeros((S + 1, C + S))
    index = np.arange(S)
    rows[index, index], rows[index, S + index] = 1.0, -1.0
    rows[index, C + index] = -most_S
    rows[S, C:] = 1.0
    opened.add_rows(
        [("open", name) for name in model.problem.categories] + [("max_categories",)],
        rows,
        np.full(S + 1, -np.inf),
        np.r_[-model.base_S, float(limit)],
    )
    return opened


def _on_open_only(model: Model, x_C: np.ndarray) -> Model:
    """The model on the categories that the search left open; the others hold nothing."""
    S = model.num_sources
    is_open_S = x_C[-S:] > 0.5
    return replace(
        model,
        options=replace(model.options, max_categories=None),
        up_S=np.where(is_open_S, model.up_S, 0.0),
        must_remove_S=np.where(is_open_S, model.must_remove_S, model.base_S),
    )


def _of_open(chosen: Model, prices: Prices) -> Prices:
    """The prices without those of closed categories, which no limit of their own holds."""
    is_open_S = (chosen.up_S > 0) | (chosen.must_remove_S < chosen.base_S)
    return replace(
        prices,
        reduced_add_S=np.where(is_open_S, prices.reduced_add_S, 0.0),
        reduced_remove_S=np.where(is_open_S, prices.reduced_remove_S, 0.0),
    )


def is_possible(model: Model) -> bool:
    """Whether any mix satisfies the limits, ``max_categories`` and ``integer`` included."""
    guards = GuardCuts(model, -model.guard_T)
    program = _with_open(model, _program(model, guards))
    program.set_costs(np.zeros(len(program.cost_C)))
    try:
        solve_with_cuts(program, guards)
    except ModelInfeasibleError:
        return False
    return True
