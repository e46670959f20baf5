"""Diminishing returns from several measured doses: piecewise-linear changes, solved as one LP.

Of a source the problem knows what d_1 < ... < d_K rows do to each target, added and removed.  Its
change as a function of the rows moved is the polyline through these points and the base:

    change                 .------- a_2     slopes, from left to right:  r_2 >= r_1 >= a_1 >= a_2
                     .-'
       -d_2   -d_1 .'  d_1     d_2          rows moved; beyond the outer points the outer
              r_1 /   a_1                   slopes go on
         r_2  /

A linear program fills the segments of a concave polyline from the base outwards by itself, since
the nearer ones are worth more (added) or cost less (removed) for *every* target.  So segment k of a
source is a source of its own, with room for the segment's rows, and nothing else of the optimiser
knows of curves.  Measured slopes need not fall: they are projected on non-increasing ones by
weighted least squares (isotonic regression: Barlow, Bartholomew, Bremner & Brunk 1972), with the
inverse squared errors of the slopes as weights.

Legend of shape suffixes: K doses, or segments, T targets, S sources, N segments of both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import isotonic_regression

from system.solve.effects import Effects
from system.solve.problem import DoseCurve, MixOptions, MixProblem

_SMALL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """Segments of one direction, from the base outwards."""

    width_KS: np.ndarray
    """[K, S] rows; the outermost is endless."""
    slope_KTS: np.ndarray

    def fill(self, amount_S: np.ndarray) -> np.ndarray:
        """[K, S] rows in each segment when the nearer ones are used first."""
        inner_KS = np.zeros_like(self.width_KS)
        inner_KS[1:] = np.cumsum(self.width_KS[:-1], axis=0)
        return np.clip(amount_S - inner_KS, 0.0, self.width_KS)

    def change(self, amount_S: np.ndarray) -> np.ndarray:
        """[T] sum over sources of the polyline."""
        return np.einsum("kts,ks->t", self.slope_KTS, self.fill(amount_S))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """Both sides, concave."""

    add: Side
    remove: Side
    num_projected: int
    """(target, source) polylines that were not concave as measured."""
    shift: float
    """How far their slopes were moved, root mean square, in standard errors of the slopes."""

    @property
    def note(self) -> str:
        """For the mix: how the curves were made, and how much of them is projection."""
        count = self.add.slope_KTS[0].size
        doses = max(len(self.add.width_KS), len(self.remove.width_KS))
        text = f"returns follow the {doses} measured doses, with the outer slopes beyond them"
        if self.num_projected:
            text += (
                f"; {self.num_projected} of {count} curves were not concave and were replaced by "
                f"the nearest that are (their slopes moved by {self.shift:.1f} standard errors, "
                "root mean square)"
            )
        return text


class CurvedEffects(Effects):
    """Effects whose change follows the curve; everything else is that of the single slopes."""

    def __init__(self, problem: MixProblem, options: MixOptions, curve: Curve) -> None:
        super().__init__(problem, options)
        self._curve = curve
        self.num_projected = 0  # the curve has its own note

    def change(self, u_S: np.ndarray, v_S: np.ndarray, *, nominal: bool = False) -> np.ndarray:
        """[T] change of every target."""
        return self._curve.add.change(u_S) - self._curve.remove.change(v_S)


def build_curve(problem: MixProblem, options: MixOptions) -> Curve | None:
    """The problem's curve where the options use one: ``concave``, any number of categories."""
    if (
        options.objective != "concave"
        or options.max_categories is not None
        or problem.curve_add is None
        or problem.curve_remove is None
    ):
        return None
    sides = [_measured(c, options) for c in (problem.curve_remove, problem.curve_add)]
    (remove_KS, remove_KTS, remove_var), (add_KS, add_KTS, add_var) = sides
    split = len(remove_KS)
    slope_NTS = np.concatenate([remove_KTS[::-1], add_KTS])
    if problem.identifiable_TS is not None:
        slope_NTS = np.where(problem.identifiable_TS, slope_NTS, 0.0)
    variance_NTS = np.concatenate([remove_var[::-1], add_var])
    fitted_NTS = non_increasing(slope_NTS, 1.0 / variance_NTS)
    size = float(np.abs(slope_NTS).max())
    moved_NTS = np.abs(fitted_NTS - slope_NTS)
    is_moved_TS = (moved_NTS > _SMALL * size).any(axis=0)
    shift_NTS = moved_NTS[:, is_moved_TS] / np.sqrt(variance_NTS[:, is_moved_TS])
    return Curve(
        add=Side(width_KS=add_KS, slope_KTS=fitted_NTS[split:]),
        remove=Side(width_KS=remove_KS, slope_KTS=fitted_NTS[:split][::-1]),
        num_projected=int(is_moved_TS.sum()),
        shift=float(np.sqrt(np.mean(shift_NTS**2))) if is_moved_TS.any() else 0.0,
    )


def _measured(curve: DoseCurve, options: MixOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Widths [K, S], slopes [K, T, S] and their variances of one side, as measured.

    A segment without rows (a source with fewer doses) has its inner neighbour's slope and next to
    no weight.  Errors of nested doses are correlated; as weights they are taken as independent.
    """
    dose_KS = np.round(curve.dose_KS) if options.integer else curve.dose_KS
    total_KTS = curve.effect_KTS * curve.dose_KS[:, None, :]
    variance_KTS = (curve.se_KTS * curve.dose_KS[:, None, :]) ** 2
    width_KS = np.diff(dose_KS, axis=0, prepend=0.0)
    rows_KS = np.diff(curve.dose_KS, axis=0, prepend=0.0)
    slope_KTS, error_KTS = np.empty_like(total_KTS), np.empty_like(total_KTS)
    for k in range(len(dose_KS)):
        has_rows_S = rows_KS[k] > 0
        rows_S = np.where(has_rows_S, rows_KS[k], 1.0)
        below_TS = total_KTS[k - 1] if k else 0.0
        slope_TS = (total_KTS[k] - below_TS) / rows_S
        error_TS = (variance_KTS[k] + (variance_KTS[k - 1] if k else 0.0)) / rows_S**2
        if k:
            slope_TS = np.where(has_rows_S, slope_TS, slope_KTS[k - 1])
            error_TS = np.where(has_rows_S, error_TS, error_KTS[k - 1] / _SMALL)
        slope_KTS[k], error_KTS[k] = slope_TS, error_TS
    floor = _SMALL * float(error_KTS.max())
    width_KS[-1] = np.inf
    return width_KS, slope_KTS, np.maximum(error_KTS, floor if floor > 0 else 1.0)


def non_increasing(value_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """The non-increasing sequence nearest to the values by weighted least squares.

    Args:
        value_N: [N, ...] sequences along the first axis.
        weight_N: the same shape, > 0.
    """
    columns = zip(
        value_N.reshape(len(value_N), -1).T, weight_N.reshape(len(weight_N), -1).T, strict=True
    )
    fitted = [
        isotonic_regression(value, weights=weight, increasing=False).x for value, weight in columns
    ]
    return np.stack(fitted, axis=1).reshape(value_N.shape)


def pad(side: Side, count: int) -> Side:
    """The side with so many segments; further ones have no room."""
    missing = count - len(side.width_KS)
    if missing == 0:
        return side
    width_KS = np.concatenate([side.width_KS, np.zeros((missing, side.width_KS.shape[1]))])
    slope_KTS = np.concatenate([side.slope_KTS, np.repeat(side.slope_KTS[-1:], missing, axis=0)])
    return replace(side, width_KS=width_KS, slope_KTS=slope_KTS)
