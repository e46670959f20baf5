"""Of all optimal mixes, the one nearest the base: least total move, then least squares.

Equal data must give equal answers on every machine, and equal categories equal treatment; a
simplex vertex gives neither. So on the face of optimal points (columns with a reduced cost stay at
their bounds, rows with a price stay tight) the total move is minimised first, and on the face of
that the sum of squared moves, whose minimum is unique. Moves count in budget units. The common
case, a unique optimum, is recognised from the basis and costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from system.solve.leastsquares import least_squares_point
from system.solve.model import Model, new_program
from system.solve.program import Point, Program
from system.solve.row_generation import Cuts, solve_with_cuts

Finder = Callable[[np.ndarray], Cuts | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Face:
    """The optimal points of a program: some columns fixed, some rows tight."""

    fixed_C: np.ndarray
    """[C] values; those of free columns are a point of the face."""
    free: np.ndarray
    """Indices of columns that may differ between optima."""
    lower_C: np.ndarray
    upper_C: np.ndarray
    rows_RC: np.ndarray
    row_lower_R: np.ndarray
    row_upper_R: np.ndarray
    is_unique: bool


def optimal_face(program: Program, point: Point, *, num_pairs: int = 0) -> Face:
    """The face of optima around ``point`` by strict complementarity.

    With one slope for adding and removing, columns ``j`` and ``num_pairs + j`` are opposites: when
    one is basic the other prices out at zero, which is a cycle and no other mix.
    """
    assert point.reduced_cost_C is not None and point.dual_R is not None
    assert point.is_basic_C is not None and point.is_basic_R is not None
    width_C = program.upper_C - program.lower_C
    is_free_C = (np.abs(point.reduced_cost_C) <= program.zero_costs()) & (width_C > 0)
    is_tight_R = np.abs(point.dual_R) > program.zero_duals()
    row_R = program.rows @ point.x_C
    is_equality_R = program.row_lower_R == program.row_upper_R
    loose = ~point.is_basic_R & ~is_tight_R & ~is_equality_R
    other_C = is_free_C & ~point.is_basic_C
    S = num_pairs
    other_C[: 2 * S] &= ~np.r_[point.is_basic_C[S : 2 * S], point.is_basic_C[:S]]
    is_unique = not other_C.any() and not loose.any()
    return Face(
        fixed_C=point.x_C,
        free=np.flatnonzero(is_free_C),
        lower_C=program.lower_C,
        upper_C=program.upper_C,
        rows_RC=program.rows,
        row_lower_R=np.where(is_tight_R, row_R, np.minimum(program.row_lower_R, row_R)),
        row_upper_R=np.where(is_tight_R, row_R, np.maximum(program.row_upper_R, row_R)),
        is_unique=is_unique,
    )


def num_pairs(model: Model) -> int:
    """How many pairs of opposite columns the programs of ``model`` begin with."""
    return 0 if model.effects.is_two_sided else model.num_sources


def nearest_optimum(model: Model, program: Program, point: Point, finders: list[Finder]) -> Point:
    """The optimum of ``program`` nearest the base; ``program`` itself is not changed.

    Its columns must be ``(u, v)`` only. ``finders`` add the rows that a full point violates.
    """
    face = optimal_face(program, point, num_pairs=num_pairs(model))
    if face.is_unique:
        return point
    length_C = np.tile(model.length_S, 2)
    small, nearest = _least_move(model, face, length_C, finders)
    x_C = _full(face, nearest.x_C)
    second = optimal_face(small, nearest)
    if not second.is_unique:
        watch = [_on_face(finder, face) for finder in finders]
        x_C = _full(face, _least_squares(second, length_C[face.free], watch))
    return Point(
        x_C=x_C,
        objective=float(program.cost_C @ x_C),
        reduced_cost_C=point.reduced_cost_C,
        dual_R=point.dual_R,
        is_basic_C=point.is_basic_C,
        is_basic_R=point.is_basic_R,
        is_proven=point.is_proven,
        gap=point.gap,
    )


def _least_move(
    model: Model, face: Face, length_C: np.ndarray, finders: list[Finder]
) -> tuple[Program, Point]:
    free = face.free
    program = Program(
        cost_C=-length_C[free],
        lower_C=face.lower_C[free],
        upper_C=face.upper_C[free],
        unit_C=np.full(len(free), model.unit),
    )
    fixed_R = _fixed_part(face)
    program.add_rows(
        [("face",)] * len(fixed_R),
        face.rows_RC[:, free],
        face.row_lower_R - fixed_R,
        face.row_upper_R - fixed_R,
    )
    return program, solve_with_cuts(program, *[_on_face(f, face) for f in finders])


def least_move_point(model: Model, finders: list[Finder]) -> np.ndarray:
    """[2S] the feasible ``(u, v)`` nearest the base; the finders hold what must stay reached.

    Raises:
        ModelInfeasibleError: no point satisfies the limits and the finders' rows.
    """
    length_C = np.tile(model.length_S, 2)
    program = new_program(model, cost_C=-length_C)
    point = solve_with_cuts(program, *finders)
    face = optimal_face(program, point)
    return point.x_C if face.is_unique else _least_squares(face, length_C, finders)


def _least_squares(face: Face, length_C: np.ndarray, finders: list[Finder]) -> np.ndarray:
    """[C] the point of the face with the least sum of squared moves."""
    free = face.free
    fixed_R = _fixed_part(face)
    rows = face.rows_RC[:, free]
    lower, upper = face.row_lower_R - fixed_R, face.row_upper_R - fixed_R
    while True:
        values = least_squares_point(
            weight_C=length_C[free],
            rows_RC=rows,
            row_lower_R=lower,
            row_upper_R=upper,
            lower_C=face.lower_C[free],
            upper_C=face.upper_C[free],
            known_C=face.fixed_C[free],
        )
        full = _full(face, values)
        found = [cuts for finder in finders if (cuts := finder(full)) is not None]
        if not found:
            return full
        for cuts in found:
            rest = full.copy()
            rest[free] = 0.0
            rows = np.concatenate([rows, cuts.rows_RC[:, free]])
            lower = np.r_[lower, cuts.lower_R - cuts.rows_RC @ rest]
            upper = np.r_[upper, np.full(len(cuts.lower_R), np.inf)]


def _full(face: Face, free_values: np.ndarray) -> np.ndarray:
    x_C = face.fixed_C.copy()
    x_C[face.free] = free_values
    return x_C


def _fixed_part(face: Face) -> np.ndarray:
    rest = face.fixed_C.copy()
    rest[face.free] = 0.0
    return face.rows_RC @ rest


def _on_face(finder: Finder, face: Face) -> Finder:
    """The finder's rows over the free columns of the face only."""

    def find(values: np.ndarray) -> Cuts | None:
        cuts = finder(_full(face, values))
        if cuts is None:
            return None
        rest = face.fixed_C.copy()
        rest[face.free] = 0.0
        return Cuts(
            labels=cuts.labels,
            rows_RC=cuts.rows_RC[:, face.free],
            lower_R=cuts.lower_R - cuts.rows_RC @ rest,
        )

    return find
