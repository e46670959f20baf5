"""What a move does to every target: slopes for adding and removing, under the chosen uncertainty.

A move is ``u`` examples added and ``v`` removed. Each objective is the same linear form
``add @ u - remove @ v`` with other slopes, so one model serves all of them:

- one matrix: ``add = remove = E``;
- ``linear`` with two matrices: their pooled value (precision weights where errors are known),
  since the paper's objective knows one matrix;
- ``concave`` with several doses: polylines (``curves.py``), these slopes for their base effects;
- two matrices otherwise: entries with ``add > remove`` are projected onto ``add = remove`` (with
  the same weights), so that doing and undoing a move never pays;
- ``robust`` with a box: ``add = E - r se``, ``remove = E + r se``; a move pays for its errors and
  staying put scores 0 (Soyster 1973; Ben-Tal, Nemirovski 2000);
- ``robust`` with a budget: as one or two matrices, and the worst ``k`` sources may be off by
  ``r se`` at once (Bertsimas, Sim 2004), which cuts or extra columns express.
"""

import numpy as np

from system.solve.problem import MixOptions, MixProblem


class Effects:
    """Slopes [T, S] of a problem under its options; entries not identifiable count as zero."""

    def __init__(self, problem: MixProblem, options: MixOptions) -> None:
        add_TS = _masked(problem.effect_add_TS, problem.identifiable_TS)
        remove_TS = None
        self.num_projected = 0
        if problem.effect_remove_TS is not None:
            remove_TS = _masked(problem.effect_remove_TS, problem.identifiable_TS)
            if options.objective == "linear":
                add_TS, remove_TS = _pooled(add_TS, remove_TS, problem), None
            else:
                add_TS, remove_TS, self.num_projected = _project(add_TS, remove_TS, problem)
        self.nominal_add_TS = add_TS
        self.nominal_remove_TS = add_TS if remove_TS is None else remove_TS
        self.add_TS, self.remove_TS = self.nominal_add_TS, self.nominal_remove_TS
        self.off_add_TS: np.ndarray | None = None
        """[T, S] how far an adding slope may be off, budget uncertainty only."""
        self.off_remove_TS: np.ndarray | None = None
        self.sources_off = 0.0
        if options.objective == "robust":
            assert problem.se_TS is not None
            off_add_TS = options.radius * problem.se_TS
            se_remove_TS = problem.se_TS if problem.se_remove_TS is None else problem.se_remove_TS
            off_remove_TS = options.radius * se_remove_TS
            if options.uncertainty == "box":
                self.add_TS = self.nominal_add_TS - off_add_TS
                self.remove_TS = self.nominal_remove_TS + off_remove_TS
            else:
                self.off_add_TS, self.off_remove_TS = off_add_TS, off_remove_TS
                wanted = options.sources_off
                S = len(problem.categories)
                self.sources_off = min(np.sqrt(S) if wanted is None else wanted, S)

    @property
    def is_two_sided(self) -> bool:
        """Whether adding and removing have different slopes."""
        return self.remove_TS is not self.add_TS

    def score(self, weight_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S] what one added and one removed example bring to the weighted targets."""
        add_S = weight_T @ self.add_TS
        return add_S, (weight_T @ self.remove_TS if self.is_two_sided else add_S)

    def rows(self, targets: np.ndarray) -> np.ndarray:
        """[k, 2S] coefficients of ``(u, v)`` in the pessimistic change of the given targets."""
        return np.concatenate([self.add_TS[targets], -self.remove_TS[targets]], axis=1)

    def change(self, u_S: np.ndarray, v_S: np.ndarray, *, nominal: bool = False) -> np.ndarray:
        """[T] change of every target; pessimistic unless ``nominal``."""
        if nominal:
            add_TS, remove_TS = self.nominal_add_TS, self.nominal_remove_TS
        else:
            add_TS, remove_TS = self.add_TS, self.remove_TS
        is_one = add_TS is remove_TS
        change_T = add_TS @ (u_S - v_S) if is_one else add_TS @ u_S - remove_TS @ v_S
        if not nominal and self.off_add_TS is not None:
            change_T = change_T - self.worst_loss(u_S, v_S)
        return change_T

    def losses(self, u_S: np.ndarray, v_S: np.ndarray) -> np.ndarray:
        """[T, S] what each source would cost each target if it were off (budget uncertainty)."""
        assert self.off_add_TS is not None and self.off_remove_TS is not None
        return self.off_add_TS * u_S + self.off_remove_TS * v_S

    def worst_loss(self, u_S: np.ndarray, v_S: np.ndarray) -> np.ndarray:
        """[T] loss when the ``sources_off`` sources that hurt each target most are off."""
        loss_TS = self.losses(u_S, v_S)
        return (loss_TS * self.worst_sources(loss_TS)).sum(axis=1)

    def worst_sources(self, loss_TS: np.ndarray) -> np.ndarray:
        """[T, S] in [0, 1]: which sources are off in the worst case; ties by position."""
        order_TS = np.argsort(-loss_TS, axis=1, kind="stable")
        rank_TS = np.empty_like(order_TS)
        np.put_along_axis(rank_TS, order_TS, np.arange(loss_TS.shape[1])[None, :], axis=1)
        return np.clip(self.sources_off - rank_TS, 0.0, 1.0)

    def base_effect(self, base_S: np.ndarray) -> np.ndarray:
        """[T] what the base mix is worth to every target: what taking it away would cost."""
        return self.nominal_remove_TS @ base_S


def _masked(matrix_TS: np.ndarray, mask_TS: np.ndarray | None) -> np.ndarray:
    """The matrix with zeros where the mask is False; the very same array where nothing is."""
    if mask_TS is None or mask_TS.all():
        return matrix_TS
    return np.where(mask_TS, matrix_TS, 0.0)


def _project(
    add_TS: np.ndarray, remove_TS: np.ndarray, problem: MixProblem
) -> tuple[np.ndarray, np.ndarray, int]:
    crossed_TS = add_TS > remove_TS
    if not crossed_TS.any():
        return add_TS, remove_TS, 0
    pooled_TS = _pooled(add_TS, remove_TS, problem)
    count = int(crossed_TS.sum())
    return (
        np.where(crossed_TS, pooled_TS, add_TS),
        np.where(crossed_TS, pooled_TS, remove_TS),
        count,
    )


def _pooled(add_TS: np.ndarray, remove_TS: np.ndarray, problem: MixProblem) -> np.ndarray:
    """[T, S] mean of the two slopes, weighted by precision where both errors are known."""
    if np.array_equal(add_TS, remove_TS):
        return add_TS
    weight_TS = np.full(add_TS.shape, 0.5)
    if problem.se_TS is not None and problem.se_remove_TS is not None:
        # Precision weights; two exact entries (se 0) weigh the same.
        var_a, var_r = problem.se_TS**2, problem.se_remove_TS**2
        total = var_a + var_r
        np.divide(var_r, total, out=weight_TS, where=total > 0)
    return weight_TS * add_TS + (1.0 - weight_TS) * remove_TS
