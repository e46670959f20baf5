"""The integer table of stages and categories nearest to a fractional one, as a network flow.

On integer points the absolute difference is a convex function that bends at integers only, so the
program is a minimum-cost flow between stages and categories: its matrix is totally unimodular,
every vertex is integer, and nothing is ever rounded.  Axes: `T` stage, `S` category.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from system.errors import StageError

_TIE = 1e-7  # reduced costs below this belong to a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTable:
    """Totals, sizes and floors of one table to be filled; all totals and sizes positive."""

    totals_S: np.ndarray
    sizes_T: np.ndarray
    level_S: np.ndarray
    """float64, NaN = no level."""
    rehearsal: float

    @property
    def is_flat(self) -> bool:
        """Whether no two categories have different levels."""
        return len(np.unique(self.level_S[~np.isnan(self.level_S)])) < 2

    @property
    def natural_TS(self) -> np.ndarray:
        """[T, S] float64, every stage a small copy of the whole."""
        return np.outer(self.sizes_T, self.totals_S) / self.totals_S.sum()

    @property
    def floor_TS(self) -> np.ndarray:
        """[T, S] int64, the rehearsal share of the natural table, rounded down."""
        # Never more than the natural table, which is feasible: so are the floors.
        return np.floor(self.rehearsal * self.natural_TS + 1e-9).astype(np.int64)

    @property
    def wants_one_S(self) -> np.ndarray:
        """[S] bool, categories that have one example for every stage and shall be in each."""
        return (self.totals_S >= len(self.sizes_T)) & (self.rehearsal > 0)

    def missed(self, table_TS: np.ndarray) -> list[tuple[int, int]]:
        """(stage, category) indices without an example where one is wanted."""
        return [(int(t), int(s)) for t, s in np.argwhere((table_TS == 0) & self.wants_one_S)]

    def part(self, in_part_S: np.ndarray, sizes_T: np.ndarray) -> StageTable:
        """The table of some of the categories, with stage sizes of its own."""
        return StageTable(
            totals_S=self.totals_S[in_part_S],
            sizes_T=sizes_T,
            level_S=self.level_S[in_part_S],
            rehearsal=self.rehearsal,
        )


def nearest_table(
    problem: StageTable, wanted_TS: np.ndarray, floor_TS: np.ndarray
) -> tuple[np.ndarray, float]:
    """Integer table with exact sums, nearest to `wanted_TS` in absolute differences.

    Floors that bind push examples into other cells, and the objective does not care which.  Among
    the optimal tables the one nearest to a fair table is taken (`wanted_TS` pulled towards the
    natural table just until the floors hold), and what is then still tied is settled by a fixed
    pattern of cell weights: one answer, whatever the solver's path.
    """
    snapped_TS = np.round(wanted_TS)
    wanted_TS = np.where(
        np.abs(wanted_TS - snapped_TS) < 1e-9 * (1 + snapped_TS), snapped_TS, wanted_TS
    )
    lower_TS = floor_TS
    upper_TS = np.minimum.outer(problem.sizes_T, problem.totals_S)
    needed_TS = np.broadcast_to(problem.wants_one_S, lower_TS.shape)
    natural_TS, share_TS = problem.natural_TS, problem.rehearsal * problem.natural_TS
    short_TS = wanted_TS < share_TS
    pull = np.max(
        np.divide(
            share_TS - wanted_TS,
            natural_TS - wanted_TS,
            out=np.zeros_like(wanted_TS),
            where=short_TS & (natural_TS > wanted_TS),
        ),
        initial=0.0,
    )
    fair_TS = wanted_TS + pull * (natural_TS - wanted_TS)
    pattern_TS = (np.arange(1, lower_TS.size + 1) * ((5**0.5 - 1) / 2) % 1).reshape(lower_TS.shape)
    for goal_TS in (wanted_TS, fair_TS):
        segments = _distance_segments(lower_TS, upper_TS, goal_TS, needed_TS)
        table_TS, lower_TS, upper_TS = _solve_flow(problem, lower_TS, segments)
        if (lower_TS == upper_TS).all():
            break
    else:
        width_TS = (upper_TS - lower_TS)[None]
        table_TS, _, _ = _solve_flow(problem, lower_TS, (width_TS, pattern_TS[None]))
    return table_TS, float(np.abs(table_TS - wanted_TS).sum())


def _distance_segments(
    lower_TS: np.ndarray, upper_TS: np.ndarray, goal_TS: np.ndarray, needed_TS: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Widths and slopes [4, T, S] of `|x - goal|` as a convex function that bends at integers.

    A cell that needs an example pays `penalty` for having none.  A path that changes one unit
    passes at most `2 min(T, S)` cells and saves at most 1 in each, so no saving outweighs it.
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
    """One optimal table of a transportation problem with convex costs, and the box of all of them.

    Complementary slackness: in every optimal table a segment with a non-zero reduced cost sits
    where it sits in this one.  So the optimal tables are those of the box with the right sums,
    which keeps the network structure for the next objective.
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
            "HiGHS was to end with an optimal table of stages, but it ended with status "
            f"{solver.modelStatusToString(status)!r}; report the mix and the curriculum's settings"
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
