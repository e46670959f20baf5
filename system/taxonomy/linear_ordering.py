"""Solves the linear-ordering problem as an integer program in HiGHS with lazy cycle constraints.

There is one variable `x[a, b]` for each pair a < b; it is 1 if a comes before b.  The variables
form a linear order exactly if no triple a < b < c is a cycle: `0 <= x_ab + x_bc - x_ac <= 1`.  Few
of the many triples ever matter, so they are added when violated: first to the linear relaxation,
whose optimum is an upper bound and often a linear order already; then between branch-and-bound
runs.

Source: Groetschel, Juenger and Reinelt, "A cutting plane algorithm for the linear ordering
problem", Operations Research 32 (1984).
"""

from __future__ import annotations

from itertools import combinations

import highspy
import numpy as np

from system.errors import StageError
from system.solve.highs import new_highs, require_ok, run_highs

_VIOLATED = 1e-6
_INTEGER = 1e-5
_ACCEPTED = (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kSolutionLimit)


def solve_milp(gain: np.ndarray, start: np.ndarray, node_limit: int) -> tuple[np.ndarray, float]:
    """The best linear order and an upper bound on its value.

    Args:
        gain: [n, n] float64 >= 0, `gain[a, b]` is gained if a comes before b.
        start: a good order; it is returned if no better one is found.
        node_limit: largest number of branch-and-bound nodes, over all runs.

    Returns:
        The order, and the bound, which equals its value unless the node limit was reached.
    """
    program = _Program(gain)
    x = program.cut_until_acyclic()
    bound = program.objective
    start_value = program.value(start)
    # An integer optimum of the relaxation is a linear order: no search is needed.
    if np.abs(x - np.round(x)).max() > _INTEGER:
        x, bound = program.branch(start, start_value, node_limit)
    order = start if x is None else program.order(x)
    if program.value(order) < start_value:
        order = start
    value = program.value(order)
    is_proved = bound - value <= 1e-7 * program.scale
    return order, value if is_proved else bound


def relaxation_bound(gain: np.ndarray) -> float:
    """Upper bound on the value of any linear order: the linear relaxation with all triples."""
    program = _Program(gain)
    program.cut_until_acyclic()
    return program.objective


class _Program:
    """One linear-ordering program; HiGHS keeps the basis while triples are added."""

    def __init__(self, gain: np.ndarray) -> None:
        self.gain = gain
        size = len(gain)
        self.first, self.second = np.triu_indices(size, 1)
        pair = np.zeros((size, size), dtype=np.int32)
        pair[self.first, self.second] = np.arange(len(self.first))
        triples = np.array(list(combinations(range(size), 3)), dtype=np.int32).reshape(-1, 3)
        a, b, c = triples.T
        self.triples = np.stack([pair[a, b], pair[b, c], pair[a, c]], axis=1)
        self.is_added = np.zeros(len(triples), dtype=bool)
        self.cuts_a_round = max(200, size * size // 2)
        self.scale = float(gain.max())
        self.constant = float(gain[self.second, self.first].sum())
        self.solver = self._build()

    def _build(self) -> highspy.Highs:
        cost = self.gain[self.first, self.second] - self.gain[self.second, self.first]
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(cost), 0
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_ = cost / self.scale
        lp.col_lower_, lp.col_upper_ = np.zeros(len(cost)), np.ones(len(cost))
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.zeros(len(cost) + 1, dtype=np.int32)
        solver = new_highs({"mip_rel_gap": 0.0, "mip_abs_gap": 1e-9})
        require_ok(solver.passModel(lp), "take a linear-ordering program")
        return solver

    @property
    def objective(self) -> float:
        return self.solver.getObjectiveValue() * self.scale + self.constant

    def cut_until_acyclic(self) -> np.ndarray:
        """Solves the relaxation, adding violated triples until there are none: x at its optimum."""
        while True:
            x = self._run()
            if not self._add_violated(x):
                return x

    def branch(
        self, start: np.ndarray, start_value: float, node_limit: int
    ) -> tuple[np.ndarray | None, float]:
        """Integer optimum by branch and bound; x is None if the node limit came first."""
        num = len(self.first)
        columns = np.arange(num, dtype=np.int32)
        integer = np.full(num, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
        require_ok(self.solver.changeColsIntegrality(num, columns, integer), "set integrality")
        place = np.argsort(start)
        x_start = (place[self.first] < place[self.second]).astype(float)
        bound = np.inf
        while node_limit > 0:
            status = self.solver.setOptionValue("mip_max_nodes", node_limit)
            require_ok(status, "limit the search")
            require_ok(self.solver.setSolution(num, columns, x_start), "take a starting point")
            x = self._run()
            info = self.solver.getInfo()
            # Each run has more constraints than the one before, so every bound holds.
            bound = min(bound, info.mip_dual_bound * self.scale + self.constant)
            node_limit -= max(1, info.mip_node_count)
            if not self._add_violated(np.round(x)):
                return np.round(x), bound
        return None, max(bound, start_value)

    def _run(self) -> np.ndarray:
        run_highs(self.solver)
        status = self.solver.getModelStatus()
        if status not in _ACCEPTED:
            raise StageError(
                "expected that HiGHS ends with a linear order or at its node limit, found status "
                f"{self.solver.modelStatusToString(status)!r}; report this with the effect matrix"
            )
        return np.asarray(self.solver.getSolution().col_value)

    def _add_violated(self, x: np.ndarray) -> bool:
        """Adds the most violated triples as constraints; False if no triple is violated."""
        ab, bc, ac = x[self.triples].T
        cycle = ab + bc - ac
        excess = np.where(self.is_added, 0.0, np.maximum(cycle - 1.0, -cycle))
        worst = np.argsort(-excess, kind="stable")[: self.cuts_a_round]
        worst = worst[excess[worst] > _VIOLATED]
        if not len(worst):
            return False
        self.is_added[worst] = True
        num = len(worst)
        status = self.solver.addRows(
            num,
            np.zeros(num),
            np.ones(num),
            3 * num,
            np.arange(0, 3 * num, 3, dtype=np.int32),
            self.triples[worst].ravel(),
            np.tile([1.0, 1.0, -1.0], num),
        )
        require_ok(status, "add constraints")
        return True

    def order(self, x: np.ndarray) -> np.ndarray:
        """The linear order of an integer x without cycles: sorted by how many others follow."""
        size = len(self.gain)
        before = np.zeros((size, size))
        before[self.first, self.second] = np.round(x)
        before[self.second, self.first] = 1 - np.round(x)
        return np.argsort(-before.sum(axis=1), kind="stable")

    def value(self, order: np.ndarray) -> float:
        return float(np.triu(self.gain[np.ix_(order, order)], 1).sum())
