"""Solves the four objectives as linear programs over the same moves ``(u, v)``.

- scores (``linear``, ``concave``, ``robust`` with a box): a value per example, one LP;
- ``robust`` with a budget: the same minus the loss if the worst ``k`` sources are off; the dual of
  the inner maximum makes it one LP (Bertsimas, Sim 2004, "The price of robustness", theorem 1);
- ``max-min``: raises the target with the smallest change, then, with its level fixed, the next
  one, and so on (lexicographic).

Every function returns the prices and ranges of the first optimum, and of all optima the point that
is nearest to the base. `system.solve.solve` and `system.solve.whole` call these functions.
"""

from dataclasses import dataclass

import numpy as np

from system.solve.crash import guess_basis
from system.solve.explain import Prices, Ranges, read_prices, read_ranges
from system.solve.model import Model, new_program
from system.solve.program import Point, Program
from system.solve.row_generation import Cuts, GuardCuts, solve_with_cuts
from system.solve.tiebreak import (
    least_move_point,
    nearest_optimum,
    num_pairs,
    optimal_face,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """The optimum of an objective."""

    x_C: np.ndarray
    """[2S] (u, v), the optimum that is nearest to the base."""
    gain: float
    """Objective minus the objective of the base mix."""
    prices: Prices | None = None
    ranges: Ranges | None = None
    iterations: int = 0
    rows: int = 0
    is_proven: bool = True
    gap: float = 0.0
    relaxed_prices: Prices | None = None
    """Prices of the fractional problem, if the counts are whole numbers."""
    relaxed_gain: float = 0.0


_GUARDS_AT_ONCE = 64
"""Largest number of guards that are rows from the start; more are added when they are violated."""


def score_program(model: Model) -> Program:
    """The linear program of an objective with a value for each example added or removed."""
    return new_program(model, cost_C=np.r_[model.score_add_S, -model.score_remove_S])


def solve_fractional(model: Model) -> Outcome:
    """Solve the model's objective with fractional counts and any number of categories."""
    if model.options.objective == "max-min":
        return solve_max_min(model)
    return solve_scores(model) if model.effects.off_add_TS is None else solve_budgeted(model)


def solve_scores(model: Model, program: Program | None = None) -> Outcome:
    """Solve ``linear``, ``concave``, or ``robust`` with a box; a solved ``program`` starts warm."""
    if program is None:
        program = score_program(model)
    guards = GuardCuts(model, -model.guard_T)
    if not program.was_solved:
        _start(program, model, guards)
    point = _without_cycles(program, model, solve_with_cuts(program, guards), guards)
    nearest = nearest_optimum(model, program, point, [guards])
    return Outcome(
        x_C=nearest.x_C,
        gain=nearest.objective,
        prices=read_prices(model, program, point),
        ranges=read_ranges(model, program, point),
        iterations=program.iterations,
        rows=len(program.labels),
    )


def _without_cycles(program: Program, model: Model, point: Point, guards: GuardCuts) -> Point:
    """The same optimum, at a point where no category is both added and removed.

    If the trust region has no price, a vertex may fill it by adding and removing the same category.
    Fixing the smaller of ``u`` and ``v`` at its lower bound does not change the optimum, and gives
    a basis whose ranges describe the mix. It stays optimal when the bounds are restored.
    """
    assert point.is_basic_C is not None
    S = model.num_sources
    both_S = point.is_basic_C[:S] & point.is_basic_C[S : 2 * S]
    if not both_S.any():
        return point
    upper_C = program.upper_C
    net_S = point.x_C[:S] - point.x_C[S : 2 * S]
    closed_C = np.concatenate([net_S <= 0, net_S >= 0])
    program.set_column_bounds(program.lower_C, np.where(closed_C, program.lower_C, upper_C))
    point = solve_with_cuts(program, guards)
    program.set_column_bounds(program.lower_C, upper_C)
    return point


def _start(program: Program, model: Model, guards: GuardCuts) -> None:
    """Add guards to a new program: all if few, else those that an interior point suggests."""
    guess = guess_basis(model)
    if guess is not None:
        rows = guess.guards
    else:
        rows = np.flatnonzero(np.isfinite(guards.floor_T))
        if model.effects.off_add_TS is not None or not 0 < len(rows) <= _GUARDS_AT_ONCE:
            return
    names = model.problem.targets
    program.add_rows(
        [("guard", names[i]) for i in rows],
        model.effects.rows(rows),
        guards.floor_T[rows],
        np.full(len(rows), np.inf),
    )
    if guess is None:
        return
    column_status_C = np.where(guess.is_basic_C, 0, np.where(guess.at_upper_C, 1, -1))
    row_status_R = np.r_[guess.side_P, np.full(len(guess.guards), -1)]
    program.start_from(column_status_C, row_status_R)


def solve_budgeted(model: Model) -> Outcome:
    """Solve ``robust`` when ``sources_off`` sources may be off at the same time."""
    program = budgeted_program(model)
    guards = GuardCuts(model, -model.guard_T)
    point = solve_with_cuts(program, guards)
    floor = ObjectiveCuts(model, point.objective)
    x_C = least_move_point(model, [guards, floor])
    return Outcome(
        x_C=x_C,
        gain=pessimistic_gain(model, x_C),
        prices=read_prices(model, program, point),
        iterations=program.iterations,
        rows=len(program.labels),
    )


def budgeted_program(model: Model) -> Program:
    """The program with columns ``u, v, p, q``: penalty ``k p + sum q``, ``p + q_j >= off_j``."""
    S = model.num_sources
    off_add_S, off_remove_S = source_losses(model)
    largest = float(max(off_add_S.max(), off_remove_S.max()))
    size = np.exp2(np.floor(np.log2(largest))) if largest > 0 else 1.0
    unit = model.unit * float(size)
    program = new_program(
        model,
        cost_C=np.r_[
            model.score_add_S, -model.score_remove_S, -model.effects.sources_off, np.full(S, -1.0)
        ],
        extra_upper=np.full(S + 1, np.inf),
        extra_unit=np.full(S + 1, unit),
    )
    rows = np.concatenate(
        [-np.diag(off_add_S), -np.diag(off_remove_S), np.ones((S, 1)), np.eye(S)], axis=1
    )
    labels = [("off", name) for name in model.problem.categories]
    program.add_rows(labels, rows, np.zeros(S), np.full(S, np.inf))
    return program


def source_losses(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """[S] importance-weighted loss per example of a source that is off, when added and removed."""
    effects, weight_T = model.effects, model.problem.importance_T
    assert effects.off_add_TS is not None and effects.off_remove_TS is not None
    return weight_T @ effects.off_add_TS, weight_T @ effects.off_remove_TS


def pessimistic_gain(model: Model, x_C: np.ndarray) -> float:
    """Gain of a point in the objective; under budget uncertainty the worst sources are off."""
    S = model.num_sources
    u_S, v_S = x_C[:S], x_C[S : 2 * S]
    gain = float(model.score_add_S @ u_S - model.score_remove_S @ v_S)
    if model.effects.off_add_TS is not None:
        off_add_S, off_remove_S = source_losses(model)
        loss = (off_add_S * u_S + off_remove_S * v_S)[None, :]
        gain -= float((loss * model.effects.worst_sources(loss)).sum())
    return gain


class ObjectiveCuts:
    """Cuts that keep the pessimistic objective at its optimum while the move is minimised."""

    def __init__(self, model: Model, optimum: float) -> None:
        self._model = model
        add_S, remove_S = model.score_add_S, model.score_remove_S
        self._scale = max(float(np.abs(add_S).max()), float(np.abs(remove_S).max()), 1e-300)
        self._scale *= model.unit
        # Lowered by half the tolerance of the solver, or rounding could cut off the optimum itself.
        self._floor = optimum - 2e-9 * self._scale

    def __call__(self, x_C: np.ndarray) -> Cuts | None:
        """The row that ``x_C`` violates most, if there is one."""
        model, S = self._model, self._model.num_sources
        if pessimistic_gain(model, x_C) >= self._floor - 4e-9 * self._scale:
            return None
        row = np.r_[model.score_add_S, -model.score_remove_S]
        if model.effects.off_add_TS is not None:
            off_add_S, off_remove_S = source_losses(model)
            loss = off_add_S * x_C[:S] + off_remove_S * x_C[S : 2 * S]
            is_off = model.effects.worst_sources(loss[None, :])[0]
            row = row - np.r_[is_off * off_add_S, is_off * off_remove_S]
        return Cuts(labels=[("objective",)], rows_RC=row[None, :], lower_R=np.array([self._floor]))


class _LevelCuts:
    """Cuts for targets whose change is below the level ``t``, the last column of the program."""

    def __init__(self, model: Model, active: set[int]) -> None:
        self._model, self._active = model, active
        floor_T = np.full(len(model.problem.targets), -np.inf)
        self._finder = GuardCuts(model, floor_T, kind="level")

    def __call__(self, x_C: np.ndarray) -> Cuts | None:
        floor_T = np.full(len(self._model.problem.targets), -np.inf)
        floor_T[sorted(self._active)] = x_C[-1]
        self._finder.floor_T = floor_T
        cuts = self._finder(x_C[:-1])
        if cuts is None:
            return None
        rows = np.concatenate([cuts.rows_RC, np.full((len(cuts.rows_RC), 1), -1.0)], axis=1)
        return Cuts(labels=cuts.labels, rows_RC=rows, lower_R=np.zeros(len(rows)))


def level_program(model: Model) -> Program:
    """The program with columns ``u, v, t`` that maximises the level ``t``."""
    size = float(max(np.abs(model.effects.add_TS).max(), np.abs(model.effects.remove_TS).max()))
    unit = model.unit * (float(np.exp2(np.floor(np.log2(size)))) if size > 0 else 1.0)
    # The level is unbounded until rows are added; no change can exceed the sum of all moves.
    reach = 2.0 * size * float(model.up_S.sum() + model.down_S.sum()) + 1.0
    return new_program(
        model,
        cost_C=np.r_[np.zeros(2 * model.num_sources), 1.0],
        extra_lower=np.array([-reach]),
        extra_upper=np.array([reach]),
        extra_unit=np.array([unit]),
    )


def solve_max_min(model: Model) -> Outcome:
    """Raise the target with the smallest change, then the next one, until none can rise further.

    Only targets of positive importance take part.
    """
    names = model.problem.targets
    active = {i for i in range(len(names)) if model.problem.importance_T[i] > 0}
    position = {name: i for i, name in enumerate(names)}
    floor_T = np.full(len(names), -np.inf)
    program = level_program(model)
    guards = GuardCuts(model, -model.guard_T)
    levels = _LevelCuts(model, active)
    point = first = solve_with_cuts(program, guards, levels)
    prices = read_prices(model, program, first)
    # Each round fixes the targets that cannot rise further, and maximises the level of the rest.
    while True:
        stuck = _stuck_targets(program, point)
        for row in stuck:
            i = position[str(program.labels[row][1])]
            active.discard(i)
            floor_T[i] = max(floor_T[i], float(point.objective))
        assert stuck, "the prices of the level's rows add up to 1"
        if not active or optimal_face(program, point, num_pairs=num_pairs(model)).is_unique:
            break
        _fix_level(program, stuck, float(point.objective))
        point = solve_with_cuts(program, guards, levels)
    change_T = model.effects.change(*model.split(point.x_C))
    remaining = sorted(active)
    floor_T[remaining] = np.maximum(floor_T[remaining], change_T[remaining])
    x_C = least_move_point(model, [guards, _softened(model, floor_T)])
    return Outcome(
        x_C=x_C,
        gain=first.objective,
        prices=prices,
        iterations=program.iterations,
        rows=len(program.labels),
    )


def _softened(model: Model, floor_T: np.ndarray) -> GuardCuts:
    """Guards at these floors, lowered by the solver's tolerance so that the optimum is kept."""
    finder = GuardCuts(model, floor_T, kind="held")
    finder.floor_T = floor_T - 2e-9 * finder.scales()
    return finder


def _stuck_targets(program: Program, point: Point) -> list[int]:
    """Level rows that have a price: their targets cannot all rise further."""
    assert point.dual_R is not None
    priced = np.abs(point.dual_R) > program.zero_duals()
    return [row for row, label in enumerate(program.labels) if label[0] == "level" and priced[row]]


def _fix_level(program: Program, rows: list[int], level: float) -> None:
    """Replace ``change_i - t >= 0`` by ``change_i >= level`` in these rows."""
    lower_R = program.row_lower_R.copy()
    for row in rows:
        program.set_coefficient(row, len(program.cost_C) - 1, 0.0)
        program.labels[row] = ("held", program.labels[row][1])
        lower_R[row] = level
    program.set_row_bounds(lower_R, program.row_upper_R)
