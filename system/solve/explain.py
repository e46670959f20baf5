"""Computes prices and ranges of an optimum: which limits bind, and how long the optimum is valid.

Both follow from the optimal basis of the first solve. With tight rows ``R`` and basic columns
``C``, ``M = A_RC^-1 A_R`` is the change of the basic columns per unit of every other column. A cost
or a bound may change until a reduced cost changes its sign or a basic column reaches a bound.
Source: textbook sensitivity analysis (Bertsimas, Tsitsiklis 1997, chapter 5). A solver's own
ranging treats single columns; here the two columns ``(u, v)`` of a category change together.
"""

from dataclasses import dataclass

import numpy as np

from system.solve.model import Model
from system.solve.program import Point, Program
from system.solve.tiebreak import num_pairs, optimal_face


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prices:
    """Duals in the user's units; every array is per category or per target."""

    reduced_add_S: np.ndarray
    """[S] change of the objective per example if u is raised; > 0 only if a limit prevents it."""
    reduced_remove_S: np.ndarray
    """[S] the same for v."""
    budget: float
    move: float
    guard_T: np.ndarray
    group_G: np.ndarray


def read_prices(model: Model, program: Program, point: Point) -> Prices:
    """Read the duals of an LP optimum; values within the tolerance of the solver become 0."""
    assert point.reduced_cost_C is not None and point.dual_R is not None
    S = model.num_sources
    reduced_C = _without_noise(point.reduced_cost_C, program.zero_costs())
    dual_R = _without_noise(point.dual_R, program.zero_duals())
    budget = move = 0.0
    position = {name: i for i, name in enumerate(model.problem.targets)}
    guard_T = np.zeros(len(position))
    group = dict.fromkeys((g.name for g in model.groups), 0.0)
    for label, dual in zip(program.labels, dual_R.tolist(), strict=True):
        match label:
            case ("budget",):
                budget = dual
            case ("move",):
                move = max(dual, 0.0)
            case ("guard", name):
                guard_T[position[name]] += max(-dual, 0.0)
            case ("group", name):
                group[name] = abs(dual)
    return Prices(
        reduced_add_S=reduced_C[:S],
        reduced_remove_S=reduced_C[S : 2 * S],
        budget=budget,
        move=move,
        guard_T=guard_T,
        group_G=np.array([group[g.name] for g in model.groups]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranges:
    """How far one number may change, all others fixed, before the basis changes; inf: no end."""

    score_down_S: np.ndarray
    score_up_S: np.ndarray
    bound_down_S: np.ndarray
    """[S] for the ceiling of a category, in examples."""
    bound_up_S: np.ndarray


def read_ranges(model: Model, program: Program, point: Point) -> Ranges:
    """Compute the ranges of scores and ceilings at an LP optimum.

    If several optima tie, the mix is one of them (``tiebreak.py``). The smallest change of a score
    that takes part in the tie may make another one optimal, so the range of such a score is empty.
    """
    basis = _Basis(model, program, point)
    S = model.num_sources
    score_down_S, score_up_S = np.zeros(S), np.zeros(S)
    is_basic_C = basis.is_basic_C
    simple = ~(is_basic_C[:S] | is_basic_C[S : 2 * S])
    up_S, down_S = basis.nonbasic_score_room()
    score_up_S[simple], score_down_S[simple] = up_S[simple], down_S[simple]
    in_basis = np.flatnonzero(~simple)
    score_up_S[in_basis], score_down_S[in_basis] = basis.basic_score_room(in_basis)
    bound_up_S, bound_down_S = basis.bound_room()
    face = optimal_face(program, point, num_pairs=num_pairs(model))
    if not face.is_unique:
        tied = np.unique(face.free[face.free < 2 * S] % S)
        for room_S in (score_up_S, score_down_S, bound_up_S, bound_down_S):
            room_S[tied] = 0.0
    return Ranges(
        score_down_S=score_down_S,
        score_up_S=score_up_S,
        bound_down_S=bound_down_S,
        bound_up_S=bound_up_S,
    )


class _Basis:
    """The optimal basis as dense matrices; it has as many tight rows as basic columns."""

    def __init__(self, model: Model, program: Program, point: Point) -> None:
        assert point.is_basic_C is not None and point.is_basic_R is not None
        assert point.reduced_cost_C is not None and point.dual_R is not None
        self.model, self.program, self.point = model, program, point
        self.is_basic_C, self.is_basic_R = point.is_basic_C, point.is_basic_R
        self.basic = np.flatnonzero(point.is_basic_C)
        self.tight = np.flatnonzero(~point.is_basic_R)
        rows_RC = program.rows[self.tight]
        self.inverse = np.linalg.inv(rows_RC[:, self.basic])
        self.fall_BC = self.inverse @ rows_RC
        """[len(basic), C] decrease of the basic columns per unit by which a column rises."""
        self.reduced_C = point.reduced_cost_C
        self.dual_R = point.dual_R[self.tight]
        x_C = point.x_C
        is_movable_C = ~self.is_basic_C & (program.upper_C > program.lower_C)
        middle_C = 0.5 * (program.lower_C + program.upper_C)
        self.at_upper_C = is_movable_C & (x_C > middle_C)
        self.at_lower_C = is_movable_C & ~self.at_upper_C
        row_R = program.rows @ x_C
        low, high = program.row_lower_R[self.tight], program.row_upper_R[self.tight]
        is_equality = low == high
        nearer_low = np.abs(row_R[self.tight] - low) <= np.abs(high - row_R[self.tight])
        self.row_at_lower = ~is_equality & nearer_low
        self.row_at_upper = ~is_equality & ~nearer_low

    def nonbasic_score_room(self) -> tuple[np.ndarray, np.ndarray]:
        """[S] ranges, up and down, of scores of categories with neither u nor v in the basis."""
        S = self.model.num_sources
        add_S, remove_S = self.reduced_C[:S], self.reduced_C[S : 2 * S]
        low, high = self.at_lower_C, self.at_upper_C
        inf = np.inf
        # A rising score raises the reduced cost of u and lowers that of v.
        up_S = np.minimum(
            np.where(low[:S], np.maximum(-add_S, 0), inf),
            np.where(high[S : 2 * S], np.maximum(remove_S, 0), inf),
        )
        down_S = np.minimum(
            np.where(high[:S], np.maximum(add_S, 0), inf),
            np.where(low[S : 2 * S], np.maximum(-remove_S, 0), inf),
        )
        return up_S, down_S

    def basic_score_room(self, categories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[k] ranges, up and down, of the scores of categories with u or v in the basis."""
        S, k = self.model.num_sources, np.arange(len(categories))
        change_kC = np.zeros((len(categories), len(self.reduced_C)))
        change_kC[k, categories], change_kC[k, S + categories] = 1.0, -1.0
        basic_kB = change_kC[:, self.basic]
        columns = change_kC - basic_kB @ self.fall_BC
        rows = basic_kB @ self.inverse
        room = []
        for sign in (1.0, -1.0):
            by_column = _sign_room(self.reduced_C, sign * columns, self.at_upper_C, self.at_lower_C)
            by_row = _sign_room(self.dual_R, sign * rows, self.row_at_upper, self.row_at_lower)
            room.append(np.minimum(by_column, by_row))
        return room[0], room[1]

    def bound_room(self) -> tuple[np.ndarray, np.ndarray]:
        """[S] ranges, up and down, of the ceilings of all categories."""
        model, S = self.model, self.model.num_sources
        x_C, program = self.point.x_C, self.program
        up_S = np.full(S, np.inf)
        down_S = program.upper_C[:S] - x_C[:S]
        # A ceiling without a price only has to stay above the count; the rest is about the others.
        priced, column, step = self._priced_ceilings()
        if not len(priced):
            return up_S, down_S
        upper_S = np.inf if model.problem.upper_S is None else model.problem.upper_S
        # A ceiling above the cap, or above the other upper limit, has no effect.
        reach_S = np.minimum(model.base_S + model.cap_S, upper_S)
        rise_S = np.full(S, np.inf)
        np.subtract(reach_S, model.ceiling_S, out=rise_S, where=np.isfinite(model.ceiling_S))
        room_above = np.maximum(rise_S, 0.0)[priced]
        up_S[priced] = np.where(column >= S, program.lower_C[column], room_above)
        down_S[priced] = program.upper_C[column] - program.lower_C[column]
        # Decrease of basic columns, and increase of rows, for each example that the ceiling rises.
        fall = self.fall_BC[:, column] * step
        below = x_C[self.basic] - program.lower_C[self.basic]
        above = program.upper_C[self.basic] - x_C[self.basic]
        up_S[priced] = np.minimum(up_S[priced], _box_room(fall, below, above))
        down_S[priced] = np.minimum(down_S[priced], _box_room(-fall, below, above))
        slack_rows = np.flatnonzero(self.is_basic_R)
        rows_RC = program.rows[slack_rows]
        drift = rows_RC[:, column] * step - rows_RC[:, self.basic] @ fall
        row_R = rows_RC @ x_C
        row_groups = [
            (
                drift,
                row_R - program.row_lower_R[slack_rows],
                program.row_upper_R[slack_rows] - row_R,
            )
        ]
        # Guards that were never violated are not in the program, but a change could violate them.
        floor_T = -model.guard_T
        absent = np.flatnonzero(np.isfinite(floor_T) & ~self._guards_in_program())
        effects = model.effects
        if len(absent) and effects.off_add_TS is None:
            # 256 targets at a time: a copy of the rows of all targets would need too much memory.
            for some_T in np.array_split(absent, max(1, len(absent) // 256)):
                rows = effects.rows(some_T)
                basic = self.basic[self.basic < 2 * S]
                inside = fall[self.basic < 2 * S]
                moved = rows[:, column] * step - rows[:, basic] @ inside
                room = rows @ x_C[: 2 * S] - floor_T[some_T]
                row_groups.append((moved, room, np.full(len(some_T), np.inf)))
        for moved, below_rows, above_rows in row_groups:
            up_S[priced] = np.minimum(up_S[priced], _box_room(-moved, below_rows, above_rows))
            down_S[priced] = np.minimum(down_S[priced], _box_room(moved, below_rows, above_rows))
        return up_S, down_S

    def _priced_ceilings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[k] categories whose ceiling has a price, the columns that they bound, and the signs.

        A ceiling at or above the base is the upper bound of u, which may be 0. A ceiling below the
        base is the lower bound of v, which falls as the ceiling rises.
        """
        S, program = self.model.num_sources, self.program
        zero_C = program.zero_costs()
        is_fixed_C = ~self.is_basic_C & (program.upper_C == program.lower_C)
        is_forced_S = self.model.must_remove_S > 0
        at_top_S = self.at_upper_C[:S] | (is_fixed_C & (self.reduced_C > zero_C))[:S]
        at_bottom_S = ((self.at_lower_C | is_fixed_C) & (self.reduced_C < -zero_C))[S : 2 * S]
        top = np.flatnonzero(at_top_S & ~is_forced_S)
        bottom = np.flatnonzero(at_bottom_S & is_forced_S)
        return (
            np.r_[top, bottom],
            np.r_[top, S + bottom],
            np.r_[np.ones(len(top)), -np.ones(len(bottom))],
        )

    def _guards_in_program(self) -> np.ndarray:
        names = {label[1] for label in self.program.labels if label[0] == "guard"}
        return np.array([t in names for t in self.model.problem.targets])


def _sign_room(
    value: np.ndarray, change: np.ndarray, must_stay_up: np.ndarray, must_stay_down: np.ndarray
) -> np.ndarray:
    """[k] largest step at which values that optimality requires to be >= 0 (<= 0) remain so.

    ``value`` [n] changes by ``change`` [k, n] per unit of the step.
    """
    signed = np.flatnonzero(must_stay_up | must_stay_down)
    if not len(signed):
        return np.full(len(change), np.inf)
    sign = np.where(must_stay_up[signed], 1.0, -1.0)
    distance = np.maximum(sign * value[signed], 0.0)
    falling = -sign * change[:, signed]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(falling > 1e-13, distance / falling, np.inf).min(axis=1)


def _box_room(fall: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """[k] largest step of each column at which values falling by ``fall`` stay in bounds."""
    if not len(fall):
        return np.full(fall.shape[1], np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        down = np.where(fall > 1e-13, np.maximum(below, 0.0)[:, None] / fall, np.inf)
        up = np.where(fall < -1e-13, np.maximum(above, 0.0)[:, None] / -fall, np.inf)
    return np.minimum(down, up).min(axis=0)


def _without_noise(value: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) <= zero, 0.0, value)
