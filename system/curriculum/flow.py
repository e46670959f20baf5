"""Finds the integer table of stages and categories that is nearest to a fractional one.

On integers the absolute difference equals a convex function with bends at integers only.  So the
problem is a minimum-cost network flow between curriculum stages and categories: its matrix is
totally unimodular, every vertex is integer, and no rounding is needed.  `plan.py` calls this
module.  Axes: `T` curriculum stage, `S` category.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from system.errors import StageError

_TIE = 1e-7  # a reduced cost below this counts as zero: the optimum is not unique


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTable:
    """The row and column sums of a table that is to be filled; all are positive."""

    totals_S: np.ndarray
    sizes_T: np.ndarray
    level_S: np.ndarray
    """float64, NaN = no level."""
    rehearsal: float

    @property
    def is_flat(self) -> bool:
        """Whether all categories with a level have the same one."""
        return len(np.unique(self.level_S[~np.isnan(self.level_S)])) < 2

    @property
    def natural_TS(self) -> np.ndarray:
        """[T, S] float64: every stage has the shares of the whole mix."""
        return np.outer(self.sizes_T, self.totals_S) / self.totals_S.sum()

    @property
    def floor_TS(self) -> np.ndarray:
        """[T, S] int64: minimum counts, the rehearsal share of the natural table, rounded down."""
        # The natural table satisfies these floors, so they are always feasible.
        return np.floor(self.rehearsal * self.natural_TS + 1e-9).astype(np.int64)

    @property
    def needs_one_S(self) -> np.ndarray:
        """[S] bool: categories with enough examples to have at least one in every stage."""
        return (self.totals_S >= len(self.sizes_T)) & (self.rehearsal > 0)

    def missed(self, table_TS: np.ndarray) -> list[tuple[int, int]]:
        """(stage, category) indices that have no example although they should have one."""
        return [(int(t), int(s)) for t, s in np.argwhere((table_TS == 0) & self.needs_one_S)]

    def part(self, in_part_S: np.ndarray, sizes_T: np.ndarray) -> StageTable:
        """The table of a subset of the categories, with its own stage sizes."""
        return StageTable(
            totals_S=self.totals_S[in_part_S],
            sizes_T=sizes_T,
            level_S=self.level_S[in_part_S],
            rehearsal=self.rehearsal,
        )


def nearest_table(
    problem: StageTable, ideal_TS: np.ndarray, floor_TS: np.ndarray
) -> tuple[np.ndarray, float]:
    """The integer table with exact sums that is nearest to `ideal_TS` in absolute differences.

    Floors that bind push examples into other cells, and many such tables may be optimal.  Of these
    the one nearest to a fair table is chosen: `ideal_TS`, moved towards the natural table just
    until the floors hold.  A fixed pattern of cell weights decides remaining ties, so the answer
    does not depend on the path of the solver.

    Returns:
        The table, and the sum of its absolute differences from `ideal_TS`.
    """
    # Values that are integer but for rounding: a fractional part of 1e-12 would add a false bend.
    snapped_TS = np.round(ideal_TS)
    ideal_TS = np.where(
        np.abs(ideal_TS - snapped_TS) < 1e-9 * (1 + snapped_TS), snapped_TS, ideal_TS
    )
    lower_TS = floor_TS
    upper_TS = np.minimum.outer(problem.sizes_T, problem.totals_S)
    needed_TS = np.broadcast_to(problem.needs_one_S, lower_TS.shape)
    natural_TS, share_TS = problem.natural_TS, problem.rehearsal * problem.natural_TS
    short_TS = ideal_TS < share_TS
    # The smallest step towards the natural table after which no cell is below its floor.
    pull = np.max(
        np.divide(
            share_TS - ideal_TS,
            natural_TS - ideal_TS,
            out=np.zeros_like(ideal_TS),
            where=short_TS & (natural_TS > ideal_TS),
        ),
        initial=0.0,
    )
    fair_TS = ideal_TS + pull * (natural_TS - ideal_TS)
    # Multiples of the golden ratio modulo 1: all different, so the last objective has no ties.
    pattern_TS = (np.arange(1, lower_TS.size + 1) * ((5**0.5 - 1) / 2) % 1).reshape(lower_TS.shape)
    for goal_TS in (ideal_TS, fair_TS):
        segments = _distance_segments(lower_TS, upper_TS, goal_TS, needed_TS)
        table_TS, lower_TS, upper_TS = _solve_flow(problem, lower_TS, segments)
        if (lower_TS == upper_TS).all():
            break
    else:
        width_TS = (upper_TS - lower_TS)[None]
        table_TS, _, _ = _solve_flow(problem, lower_TS, (width_TS, pattern_TS[None]))
    return table_TS, float(np.abs(table_TS - ideal_TS).sum())


def _distance_segments(
    lower_TS: np.ndarray, upper_TS: np.ndarray, goal_TS: np.ndarray, needed_TS: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Widths and slopes [4, T, S] of `|x - goal|` as a convex function with bends at integers.

    A cell that needs an example pays `penalty` if it has none.  A change by one example passes
    through at most `2 min(T, S)` cells and saves at most 1 in each, so the penalty always
    dominates.
    """
    penalty = 2.0 * min(lower_TS.shape) + 2.0
    below_TS = np.floor(goal_TS)

    def cost(x_TS: np.ndarray) -> np.ndarray:
        return np.abs(x_TS - goal_TS) + penalty * (needed_TS & (x_TS < 1))

    inner = np.stack([np.ones_like(below_TS), below_TS, below_TS + 1])
    bends = np.concatenate([lower_TS[None], np.sort(inner, axis=0), upper_TS[None]])
    bends = np.clip(bends, lower_TS, upper_TS)
    width = np.diff(bends, axis=0)
    rise = np.diff(np.stack([cost(x_TS) for x_TS in bends]), axis=0)
    return width.astype(np.int64), np.divide(rise, width, out=np.zeros_like(rise), where=width > 0)


def _solve_flow(
    problem: StageTable, lower_TS: np.ndarray, segments: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solves a transportation problem with convex costs.

    Returns:
        An optimal table, and the bounds (lower, upper) within which all optimal tables lie.  By
        complementary slackness a segment with a non-zero reduced cost has the same value in every
        optimal table.  So the optimal tables are those within the bounds that have the right sums,
        and the next objective can be solved on the same network.
    """
    import highspy

    from system.solve.highs import new_highs, require_ok, run_highs

    widths, slopes = segments
    layer, stage, category = np.nonzero(widths)
    if not len(layer):  # the floors leave no choice; HiGHS calls a model without columns empty
        return lower_TS, lower_TS, lower_TS
    width = widths[layer, stage, category].astype(float)
    num_stages, num_categories = lower_TS.shape
    rows = np.stack([stage, num_stages + category], axis=1).ravel().astype(np.int32)
    rest = np.concatenate(
        [problem.sizes_T - lower_TS.sum(axis=1), problem.totals_S - lower_TS.sum(axis=0)]
    ).astype(float)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(width), num_stages + num_categories
    lp.col_cost_ = slopes[layer, stage, category]
    lp.col_lower_, lp.col_upper_ = np.zeros_like(width), width
    lp.row_lower_ = lp.row_upper_ = rest
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * len(width) + 1, 2, dtype=np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = rows, np.ones(2 * len(width))
    solver = new_highs({"solver": "simplex", "presolve": "off"})
    require_ok(solver.passModel(lp), "take a table of stages")
    run_highs(solver)
    status = solver.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        raise StageError(
            "expected that HiGHS ends with an optimal table of stages, found status "
            f"{solver.modelStatusToString(status)!r}; report this with the mix and the settings "
            "of the curriculum"
        )
    solution = solver.getSolution()
    value = np.asarray(solution.col_value)
    filled = np.round(value).astype(np.int64)
    assert np.abs(value - filled).max(initial=0.0) < 1e-4, "a vertex of a flow is integer"
    is_free = np.abs(np.asarray(solution.col_dual)) <= _TIE
    table_TS, low_TS, high_TS = lower_TS.copy(), lower_TS.copy(), lower_TS.copy()
    at = (stage, category)
    np.add.at(table_TS, at, filled)
    np.add.at(low_TS, at, np.where(is_free, 0, filled))
    np.add.at(high_TS, at, np.where(is_free, width.astype(np.int64), filled))
    return table_TS, low_TS, high_TS
