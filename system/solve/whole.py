"""Whole examples and a limited number of categories: branch and bound in HiGHS.

First the best objective, then, with it held, the smallest total move. Counts come out of the
search as whole numbers; nothing is rounded afterwards. Duals do not exist, so prices are null.
"""

from dataclasses import replace

import numpy as np

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


def solve_whole(model: Model) -> Outcome:
    """The mix when ``integer`` or ``max_categories`` is set.

    With ``max-min`` the worst-off target is lifted exactly; among the mixes that do so the one
    with the greatest importance-weighted change is taken, not the full lexicographic order.
    """
    guards = GuardCuts(model, -model.guard_T)
    is_level = model.options.objective == "max-min"
    program = _with_open(model, _program(model, guards))
    best = solve_with_cuts(program, guards)
    is_proven, gap = best.is_proven, best.gap
    gain = best.objective
    if is_level:
        # Second level: keep the worst-off target where it is, then the weighted sum.
        level = float(best.x_C[2 * model.num_sources])
        _hold_objective(program, best)
        cost_C = np.zeros(len(program.cost_C))
        cost_C[: 2 * model.num_sources] = np.r_[model.score_add_S, -model.score_remove_S]
        program.set_costs(cost_C)
        best = solve_with_cuts(program, guards)
        gain = level
    _hold_objective(program, best)
    S = model.num_sources
    # Equal moves are told apart by position: at most one part in a thousand, first is cheaper.
    order_S = 1.0 + 1e-3 * np.arange(S) / S
    cost_C = np.zeros(len(program.cost_C))
    cost_C[: 2 * S] = -np.tile(model.length_S * order_S, 2)
    program.set_costs(cost_C)
    nearest = solve_with_cuts(program, guards)
    is_proven = is_proven and nearest.is_proven
    if not model.options.integer:
        return replace(
            _continuous_on(model, nearest.x_C),
            prices=None,
            ranges=None,
            is_proven=is_proven,
            gap=gap,
        )
    x_C = nearest.x_C[: 2 * S]
    relaxed = None
    if model.options.max_categories is None:
        relaxed = solve_fractional(replace(model, options=replace(model.options, integer=False)))
    return Outcome(
        x_C=x_C,
        gain=gain if is_level else pessimistic_gain(model, x_C),
        iterations=program.iterations,
        rows=len(program.labels),
        is_proven=is_proven,
        gap=gap,
        relaxed_prices=None if relaxed is None else relaxed.prices,
        relaxed_gain=0.0 if relaxed is None else relaxed.gain,
    )


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
        max_nodes=model.options.mip_max_nodes,
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


def _hold_objective(program: Program, best: Point) -> None:
    slack = 1e-9 * max(float(np.abs(program.cost_C * best.x_C).max(initial=0.0)), 1e-12)
    program.add_rows(
        [("objective",)],
        program.cost_C[None, :],
        np.array([best.objective - slack]),
        np.array([np.inf]),
    )


def _continuous_on(model: Model, x_C: np.ndarray) -> Outcome:
    """The exact continuous answer on the categories that the search left open."""
    S = model.num_sources
    is_open_S = x_C[-S:] > 0.5
    closed = replace(
        model,
        options=replace(model.options, max_categories=None),
        up_S=np.where(is_open_S, model.up_S, 0.0),
        must_remove_S=np.where(is_open_S, 0.0, model.base_S),
    )
    return solve_fractional(closed)


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
