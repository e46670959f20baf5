"""A linear or mixed-integer program in the user's units; HiGHS sees a scaled twin of it.

Effects per example are often 1e-6 nats and budgets 1e6 examples: with the solver's absolute
tolerances, unscaled, a real gain would read as zero. Columns are scaled by powers of two given by
the caller, rows and costs by the power of two nearest their largest entry, so scaling itself
rounds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from system.solve.highs import Solution, Solver

Label = tuple[Any, ...]
"""What a row is about: a kind, and a name or number."""

DROP = 1e-11
"""Row entries below this share of the row's largest are zero: below what HiGHS can hold."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """An optimum in user units; duals are derivatives of the objective (None for a MILP)."""

    x_C: np.ndarray
    objective: float
    reduced_cost_C: np.ndarray | None
    dual_R: np.ndarray | None
    is_basic_C: np.ndarray | None
    is_basic_R: np.ndarray | None
    is_proven: bool
    gap: float


class Program:
    """Maximise ``cost @ x`` over column bounds and rows; rows may be added after a solve."""

    def __init__(
        self,
        *,
        cost_C: np.ndarray,
        lower_C: np.ndarray,
        upper_C: np.ndarray,
        unit_C: np.ndarray,
        is_integer_C: np.ndarray | None = None,
        gap: float = 0.0,
    ) -> None:
        self.cost_C, self.unit_C = np.asarray(cost_C, float), np.asarray(unit_C, float)
        self.lower_C, self.upper_C = np.asarray(lower_C, float), np.asarray(upper_C, float)
        self.is_integer_C = is_integer_C
        self.labels: list[Label] = []
        self._blocks: list[np.ndarray | csr_array] = []
        self.row_lower_R, self.row_upper_R = np.zeros(0), np.zeros(0)
        self._row_scale_R = np.zeros(0)
        self._cost_scale = _power_of_two(np.abs(self.cost_C * self.unit_C).max(initial=0.0))
        self.was_solved = False
        """True from the first solve on, even one that needed no step."""
        self._solver = Solver(gap=gap)
        self._solver.add_columns(
            self.cost_C * self.unit_C / self._cost_scale,
            self.lower_C / self.unit_C,
            self.upper_C / self.unit_C,
            is_integer_C,
        )

    @property
    def rows(self) -> np.ndarray:
        """[R, C] all rows in user units."""
        first = self._blocks[0] if len(self._blocks) == 1 else None
        if not isinstance(first, np.ndarray):
            blocks = [b if isinstance(b, np.ndarray) else b.toarray() for b in self._blocks]
            first = np.concatenate([np.zeros((0, len(self.cost_C))), *blocks])
            self._blocks = [first]
        return first

    @property
    def iterations(self) -> int:
        """Simplex iterations so far."""
        return self._solver.iterations

    def add_rows(
        self,
        labels: Sequence[Label],
        rows_RC: np.ndarray | csr_array,
        lower_R: np.ndarray,
        upper_R: np.ndarray,
    ) -> None:
        """Append ``lower <= rows @ x <= upper``; the labels are how callers find them again."""
        lower_R, upper_R = np.asarray(lower_R, float), np.asarray(upper_R, float)
        if isinstance(rows_RC, csr_array):
            scaled_RC, scale_R = _scaled_sparse(rows_RC, self.unit_C)
        else:
            rows_RC = np.asarray(rows_RC, float)
            scaled_RC = rows_RC * self.unit_C
            scale_R = _power_of_two(np.abs(scaled_RC).max(axis=1, initial=0.0))
            scaled_RC = scaled_RC / scale_R[:, None]
            scaled_RC[np.abs(scaled_RC) < DROP] = 0.0
        self._solver.add_rows(scaled_RC, lower_R / scale_R, upper_R / scale_R)
        self.labels.extend(labels)
        self._blocks.append(rows_RC)
        self.row_lower_R = np.concatenate([self.row_lower_R, lower_R])
        self.row_upper_R = np.concatenate([self.row_upper_R, upper_R])
        self._row_scale_R = np.concatenate([self._row_scale_R, scale_R])

    def set_row_bounds(self, lower_R: np.ndarray, upper_R: np.ndarray) -> None:
        """Replace the bounds of all rows; the basis stays."""
        self.row_lower_R, self.row_upper_R = lower_R.copy(), upper_R.copy()
        self._solver.set_row_bounds(lower_R / self._row_scale_R, upper_R / self._row_scale_R)

    def set_column_bounds(self, lower_C: np.ndarray, upper_C: np.ndarray) -> None:
        """Replace the bounds of all columns; the basis stays."""
        self.lower_C, self.upper_C = lower_C.copy(), upper_C.copy()
        self._solver.set_column_bounds(lower_C / self.unit_C, upper_C / self.unit_C)

    def set_costs(self, cost_C: np.ndarray) -> None:
        """Replace the objective; the basis stays."""
        self.cost_C = np.asarray(cost_C, float)
        self._cost_scale = _power_of_two(np.abs(self.cost_C * self.unit_C).max(initial=0.0))
        self._solver.set_costs(self.cost_C * self.unit_C / self._cost_scale)

    def set_coefficient(self, row: int, column: int, value: float) -> None:
        """Replace one coefficient; the basis stays."""
        self.rows[row, column] = value
        scaled = value * self.unit_C[column] / self._row_scale_R[row]
        self._solver.set_coefficients(row, np.array([column]), np.array([scaled]))

    def start_from(self, column_status_C: np.ndarray, row_status_R: np.ndarray) -> None:
        """Begin the next solve at a basis: -1 at the lower end, 1 at the upper, 0 basic."""
        self._solver.start_from(column_status_C, row_status_R)

    def limit_search(self, max_nodes: int) -> None:
        """Stop the integer search after so many nodes."""
        self._solver.limit_search(max_nodes)

    def suggest(self, x_C: np.ndarray) -> None:
        """Give the integer search a feasible point to begin with."""
        self._solver.suggest(x_C / self.unit_C)

    def solve(self) -> Point:
        """Solve, from the last basis if there is one.

        Raises:
            ModelInfeasibleError, StageError: as ``Solver.solve``.
        """
        self.was_solved = True
        solution = self._solver.solve()
        x_C = np.clip(solution.x_C * self.unit_C, self.lower_C, self.upper_C)
        if self.is_integer_C is not None:
            x_C = np.where(self.is_integer_C, np.round(x_C), x_C)
        return Point(
            x_C=x_C,
            objective=float(self.cost_C @ x_C),
            reduced_cost_C=self._reduced_costs(solution),
            dual_R=None
            if solution.dual_R is None
            else solution.dual_R * self._cost_scale / self._row_scale_R,
            is_basic_C=solution.is_basic_C,
            is_basic_R=solution.is_basic_R,
            is_proven=solution.is_proven,
            gap=solution.gap * float(self._cost_scale),
        )

    def _reduced_costs(self, solution: Solution) -> np.ndarray | None:
        if solution.reduced_cost_C is None:
            return None
        return solution.reduced_cost_C * self._cost_scale / self.unit_C

    def zero_costs(self) -> np.ndarray:
        """[C] a reduced cost of this size or less is zero: what the solver cannot tell from 0."""
        return 4e-9 * self._cost_scale / self.unit_C

    def zero_duals(self) -> np.ndarray:
        """[R] a dual of this size or less is zero."""
        return 4e-9 * self._cost_scale / self._row_scale_R


def _scaled_sparse(rows_RC: csr_array, unit_C: np.ndarray) -> tuple[csr_array, np.ndarray]:
    """Rows in the solver's units, and what each was divided by."""
    count = len(rows_RC.indptr) - 1
    row_of = np.repeat(np.arange(count), np.diff(rows_RC.indptr))
    value = rows_RC.data * unit_C[rows_RC.indices]
    largest_R = np.zeros(count)
    np.maximum.at(largest_R, row_of, np.abs(value))
    scale_R = _power_of_two(largest_R)
    value = value / scale_R[row_of]
    value[np.abs(value) < DROP] = 0.0
    scaled_RC = csr_array((value, rows_RC.indices, rows_RC.indptr), shape=rows_RC.shape)
    scaled_RC.eliminate_zeros()
    return scaled_RC, scale_R


def _power_of_two(value: np.ndarray | float) -> np.ndarray:
    """The power of two at or below each value; 1 for 0."""
    value = np.asarray(value, float)
    safe = np.where(value > 0, value, 1.0)
    return np.exp2(np.floor(np.log2(safe)))
