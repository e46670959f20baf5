"""Guards as rows made when they are needed: of a thousand guards, few hundred ever bind.

Solve, look which targets lose more than their guard allows, add rows for the worst of them, solve
again from the same basis. It ends because every round adds a row that was violated, and it is
exact because it ends only when no guard is violated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from system.solve.model import Model
from system.solve.program import Point, Program

VIOLATED = 4e-9
"""A row is violated beyond this share of its largest coefficient times the column unit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cuts:
    """Rows ``rows @ (u, v) >= lower``."""

    labels: Sequence[tuple[str, ...]]
    rows_RC: np.ndarray
    lower_R: np.ndarray


class GuardCuts:
    """Finds violated floors ``change_i >= floor_i``; -inf: no floor."""

    def __init__(self, model: Model, floor_T: np.ndarray, *, kind: str = "guard") -> None:
        self._model = model
        self._kind = kind
        self.floor_T = floor_T
        """[T] may be replaced between calls; -inf: no floor."""
        self._scale_T: np.ndarray | None = None
        T = len(floor_T)
        # Few targets: all at once, fewer rounds. Many: batches keep the program small.
        self._batch = T if T <= 64 else max(64, T // 8)

    def __call__(self, x_C: np.ndarray) -> Cuts | None:
        """The most violated floors at ``x_C``, or None when all hold."""
        has_floor_T = np.isfinite(self.floor_T)
        if not has_floor_T.any():
            return None
        model = self._model
        S = model.num_sources
        u_S, v_S = x_C[:S], x_C[S : 2 * S]
        missing_T = np.where(has_floor_T, self.floor_T - model.effects.change(u_S, v_S), -np.inf)
        violation_T = missing_T / self.scales()
        bad = np.flatnonzero(violation_T > VIOLATED)
        if not len(bad):
            return None
        bad = bad[np.argsort(-violation_T[bad], kind="stable")][: self._batch]
        rows_RC = model.effects.rows(bad)
        if model.effects.off_add_TS is not None and model.effects.off_remove_TS is not None:
            is_off = model.effects.worst_sources(model.effects.losses(u_S, v_S)[bad])
            rows_RC[:, :S] -= is_off * model.effects.off_add_TS[bad]
            rows_RC[:, S:] -= is_off * model.effects.off_remove_TS[bad]
        names = model.problem.targets
        return Cuts(
            labels=[(self._kind, names[i]) for i in bad],
            rows_RC=rows_RC,
            lower_R=self.floor_T[bad],
        )

    def scales(self) -> np.ndarray:
        """[T] largest coefficient of each row times the column unit; violations are its shares."""
        if self._scale_T is None:
            effects = self._model.effects
            size_T = np.abs(effects.add_TS).max(axis=1)
            if effects.is_two_sided:
                size_T = np.maximum(size_T, np.abs(effects.remove_TS).max(axis=1))
            if effects.off_add_TS is not None:
                size_T = size_T + effects.off_add_TS.max(axis=1)
            self._scale_T = np.where(size_T > 0, size_T, 1.0) * self._model.unit
        return self._scale_T


def solve_with_cuts(program: Program, *finders: Callable[[np.ndarray], Cuts | None]) -> Point:
    """Solve ``program``, adding the rows that the finders ask for, until none is violated.

    The finders see ``(u, v)`` first; extra columns of the program get zeros in the new rows.

    Raises:
        ModelInfeasibleError, StageError: as ``Program.solve``.
    """
    while True:
        point = program.solve()
        found = [cuts for finder in finders if (cuts := finder(point.x_C)) is not None]
        if not found:
            return point
        for cuts in found:
            rows_RC = np.zeros((len(cuts.rows_RC), len(program.cost_C)))
            rows_RC[:, : cuts.rows_RC.shape[1]] = cuts.rows_RC
            program.add_rows(
                list(cuts.labels), rows_RC, cuts.lower_R, np.full(len(rows_RC), np.inf)
            )
