"""A thin, checked door to HiGHS: every return value is looked at, every number must be finite.

HiGHS accepts NaN silently (and then calls the model infeasible), ignores options that it does not
know but for a status value, and never raises; all three become errors here. One thread and a fixed
seed: the same model gives the same answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from scipy.sparse import csr_array

from system.errors import StageError

TOLERANCE = 1e-9
"""Primal and dual feasibility, in the scaled units of the model (``model.py`` scales)."""


class ModelInfeasibleError(Exception):
    """HiGHS proved that no point satisfies the model; callers translate it for the user."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """An optimal point. Duals are derivatives of the (maximised) objective; None for a MILP."""

    x_C: np.ndarray
    row_R: np.ndarray
    objective: float
    reduced_cost_C: np.ndarray | None
    """[C] cost - A'y: > 0 at an upper bound, < 0 at a lower one."""
    dual_R: np.ndarray | None
    """[R] d objective / d right-hand side."""
    is_basic_C: np.ndarray | None
    is_basic_R: np.ndarray | None
    is_proven: bool = True
    """False: the node limit stopped an integer search at a feasible point."""
    gap: float = 0.0
    """Proven distance from the best bound, in units of the objective."""


class Solver:
    """One HiGHS model that is built, solved, changed and solved again from its warm basis."""

    def __init__(self, *, gap: float = 0.0) -> None:
        self._highs = new_highs(
            {
                "primal_feasibility_tolerance": TOLERANCE,
                "dual_feasibility_tolerance": TOLERANCE,
                "small_matrix_value": 1e-12,
                "mip_rel_gap": gap,
                "mip_abs_gap": TOLERANCE,
                "mip_feasibility_tolerance": 1e-8,
            }
        )
        # Two methods of the compiled base class that the package's type stubs leave out.
        self._core: Any = self._highs
        self._num_columns = 0
        self._num_rows = 0
        self._is_mip = False
        self.iterations = 0
        require_ok(self._highs.changeObjectiveSense(highspy.ObjSense.kMaximize), "maximise")

    @staticmethod
    def version() -> str:
        """The version of HiGHS."""
        return str(highspy.Highs().version())

    def add_columns(
        self,
        cost_C: np.ndarray,
        lower_C: np.ndarray,
        upper_C: np.ndarray,
        is_integer_C: np.ndarray | None = None,
    ) -> None:
        """Append columns that no row uses yet."""
        n = len(cost_C)
        _require_finite("cost", cost_C)
        _require_no_nan("column bound", lower_C, upper_C)
        none = np.zeros(0)
        require_ok(
            self._highs.addCols(
                n, cost_C, lower_C, upper_C, 0, np.zeros(n, np.int32), none.astype(np.int32), none
            ),
            "add columns",
        )
        if is_integer_C is not None and is_integer_C.any():
            which = (self._num_columns + np.flatnonzero(is_integer_C)).astype(np.int32)
            kinds = np.full(len(which), highspy.HighsVarType.kInteger.value, np.uint8)
            require_ok(
                self._highs.changeColsIntegrality(len(which), which, kinds), "set integrality"
            )
            self._is_mip = True
        self._num_columns += n

    def add_rows(
        self, rows_RC: np.ndarray | csr_array, lower_R: np.ndarray, upper_R: np.ndarray
    ) -> None:
        """Append rows over all columns; exact zeros of a dense block are not stored."""
        count = len(lower_R)
        if isinstance(rows_RC, csr_array):
            starts, columns, values = rows_RC.indptr[:-1], rows_RC.indices, rows_RC.data
        else:
            where_r, columns = np.nonzero(rows_RC)
            starts = np.searchsorted(where_r, np.arange(count))
            values = rows_RC[where_r, columns]
        values = np.ascontiguousarray(values, dtype=np.float64)
        _require_finite("row", values)
        _require_no_nan("row bound", lower_R, upper_R)
        require_ok(
            self._highs.addRows(
                count,
                np.ascontiguousarray(lower_R, dtype=np.float64),
                np.ascontiguousarray(upper_R, dtype=np.float64),
                len(values),
                starts.astype(np.int32),
                columns.astype(np.int32),
                values,
            ),
            "add rows",
        )
        self._num_rows += count

    def set_costs(self, cost_C: np.ndarray) -> None:
        """Replace the objective."""
        _require_finite("cost", cost_C)
        index = np.arange(self._num_columns, dtype=np.int32)
        require_ok(self._highs.changeColsCost(len(index), index, cost_C), "change costs")

    def set_column_bounds(self, lower_C: np.ndarray, upper_C: np.ndarray) -> None:
        """Replace the bounds of all columns."""
        _require_no_nan("column bound", lower_C, upper_C)
        index = np.arange(self._num_columns, dtype=np.int32)
        require_ok(
            self._highs.changeColsBounds(len(index), index, lower_C, upper_C), "change bounds"
        )

    def set_row_bounds(self, lower_R: np.ndarray, upper_R: np.ndarray) -> None:
        """Replace the bounds of all rows."""
        _require_no_nan("row bound", lower_R, upper_R)
        index = np.arange(self._num_rows, dtype=np.int32)
        require_ok(
            self._core.changeRowsBounds(len(index), index, lower_R, upper_R), "change bounds"
        )

    def set_coefficients(self, row: int, columns: np.ndarray, values: np.ndarray) -> None:
        """Replace some coefficients of one row."""
        _require_finite("row", values)
        for column, value in zip(columns.tolist(), values.tolist(), strict=True):
            require_ok(self._highs.changeCoeff(row, column, value), "change a coefficient")

    def start_from(self, column_status_C: np.ndarray, row_status_R: np.ndarray) -> None:
        """Begin the next solve at a basis: -1 at the lower end, 1 at the upper, 0 basic.

        It may be singular or have the wrong number of basic entries; HiGHS repairs it.
        """
        kinds = highspy.HighsBasisStatus
        names = {-1: kinds.kLower, 0: kinds.kBasic, 1: kinds.kUpper}
        basis = highspy.HighsBasis()
        basis.col_status = [names[k] for k in column_status_C.tolist()]
        basis.row_status = [names[k] for k in row_status_R.tolist()]
        basis.valid, basis.alien = True, True
        require_ok(self._highs.setBasis(basis), "set a starting basis")

    def limit_search(self, max_nodes: int) -> None:
        """Stop the integer search after so many nodes."""
        require_ok(self._highs.setOptionValue("mip_max_nodes", max_nodes), "limit the search")

    def suggest(self, x_C: np.ndarray) -> None:
        """Give the integer search a point to begin with; it is dropped if it is not feasible."""
        _require_finite("starting point", x_C)
        start = highspy.HighsSolution()
        start.col_value = x_C.tolist()
        require_ok(self._highs.setSolution(start), "take a starting point")

    def solve(self) -> Solution:
        """Solve from the present basis.

        Raises:
            ModelInfeasibleError: no point satisfies the rows and bounds.
            StageError: HiGHS ended in any state but a proven optimum (or, for a MILP, a feasible
                point at the node limit).
        """
        status = run_highs(self._highs)
        if self._highs.getModelStatus() == highspy.HighsModelStatus.kUnknown:
            # A warm basis can be too ill-conditioned after large changes; a cold start is not.
            require_ok(self._highs.clearSolver(), "forget its basis")
            status = self._highs.run()
        model_status = self._highs.getModelStatus()
        info = self._highs.getInfo()
        self.iterations += max(info.simplex_iteration_count, 0)
        kinds = highspy.HighsModelStatus
        if model_status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
            raise ModelInfeasibleError
        has_point = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        is_stopped = self._is_mip and model_status == kinds.kSolutionLimit and has_point
        if status == highspy.HighsStatus.kError or not (
            model_status == kinds.kOptimal or is_stopped
        ):
            if self._is_mip and model_status == kinds.kSolutionLimit:
                raise StageError(
                    "the search for whole counts was to find a mix, but it reached its limit of "
                    "nodes without one; raise the limit (solve.mip_max_nodes in a configuration, "
                    "--mip-max-nodes of `instructmix solve`), or loosen groups or max_categories"
                )
            raise StageError(
                "HiGHS was to end with a proven optimum, but it ended with status "
                f"{self._highs.modelStatusToString(model_status)!r} on a model of "
                f"{self._num_columns} columns and {self._num_rows} rows; report the input that led "
                "here"
            )
        return self._read(info, is_proven=not is_stopped)

    def _read(self, info: "highspy.HighsInfo", *, is_proven: bool) -> Solution:
        point = self._highs.getSolution()
        x_C, row_R = np.array(point.col_value), np.array(point.row_value)
        objective = float(info.objective_function_value)
        _require_finite("solution", x_C)
        if self._is_mip:
            gap = abs(float(info.mip_dual_bound) - objective)
            return Solution(
                x_C=x_C,
                row_R=row_R,
                objective=objective,
                reduced_cost_C=None,
                dual_R=None,
                is_basic_C=None,
                is_basic_R=None,
                is_proven=is_proven,
                gap=gap,
            )
        if not point.dual_valid:
            raise StageError("HiGHS gave an optimum without dual values; report the input")
        status, basic = self._core.getBasicVariables()
        require_ok(status, "read the basis")
        basic = np.asarray(basic)
        is_basic_C, is_basic_R = np.zeros(self._num_columns, bool), np.zeros(self._num_rows, bool)
        is_basic_C[basic[basic >= 0]] = True
        is_basic_R[-1 - basic[basic < 0]] = True
        return Solution(
            x_C=x_C,
            row_R=row_R,
            objective=objective,
            reduced_cost_C=np.array(point.col_dual),
            dual_R=np.array(point.row_dual),
            is_basic_C=is_basic_C,
            is_basic_R=is_basic_R,
        )


def new_highs(options: Mapping[str, bool | int | float | str]) -> highspy.Highs:
    """A silent, deterministic HiGHS on one thread.

    Raises:
        StageError: an option that HiGHS does not know.
    """
    highs = highspy.Highs()
    for name, value in {"output_flag": False, "threads": 1, "random_seed": 0, **options}.items():
        require_ok(highs.setOptionValue(name, value), f"set option {name}={value}")
    return highs


def require_ok(status: highspy.HighsStatus, what: str) -> None:
    """Turn a status that HiGHS would let pass into an error.

    Raises:
        StageError: HiGHS refused.
    """
    if status != highspy.HighsStatus.kOk:
        raise StageError(
            f"HiGHS {highspy.Highs().version()} refused to {what} (status {status.name}); this is "
            "a mistake in the model or an unsupported version of highspy, not in your data"
        )


def run_highs(highs: highspy.Highs) -> highspy.HighsStatus:
    """Run, whatever thread count was used before in this process."""
    status = highs.run()
    if status == highspy.HighsStatus.kError:
        # The global scheduler keeps the thread count of whoever used HiGHS first in this
        # process; a run that asks for another count fails until the scheduler is rebuilt.
        highspy.Highs.resetGlobalScheduler(True)
        status = highs.run()
    return status


def _require_finite(what: str, *arrays: np.ndarray) -> None:
    for array in arrays:
        if not np.all(np.isfinite(array)):
            raise StageError(f"a {what} handed to HiGHS is not finite; report the input")


def _require_no_nan(what: str, *arrays: np.ndarray) -> None:
    for array in arrays:
        if np.any(np.isnan(array)):
            raise StageError(f"a {what} handed to HiGHS is not a number; report the input")
