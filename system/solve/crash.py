"""A starting basis for large guarded programs, from an interior point.

With hundreds of binding guards the simplex method needs thousands of steps on dense rows. An
interior-point method needs some thirty steps whatever the size, each one dense matrix product. It
cannot give an exact vertex or prices, so it is only asked which guards bind and which counts sit at
a bound; the simplex method starts from there and ends after a few steps. A poor guess costs time,
never the answer.

What it buys, beside HiGHS alone and scipy's `linprog` on the same problems: CPU seconds of one
thread, medians, the methods of a size in turn, on a busy machine (half as fast as a quiet one).
`linear`, a guard of 2 % on every target, dense matrix, prices and ranges included. Scipy ran once
at 1,000 categories.

    categories              100      150      200      300     1,000
    with this module      0.029    0.043    0.055     0.23       2.2
    HiGHS, all rows       0.035    0.084    0.168        -         -
    HiGHS, in rounds      0.043    0.085    0.146     0.55      17.0
    scipy                 0.036    0.081    0.142     0.74      20.2

At 100 categories it buys little, from 150 on a factor of 2 to 7. Without it the solver would be 5
to 30 % slower than scipy up to 200 categories. Other settings of HiGHS do not replace it: the best
of them, no scaling and all rows, takes 1.04, 0.74, 0.80, 0.85, 0.67 of scipy's time at 100, 150,
200, 250, 300 categories. Presolve off, Devex and Dantzig prices win at one size and lose at
another. The primal simplex and HiGHS's own interior point with crossover take 1.2 to 3 times as
long as scipy. Without guards the guess gains nothing (300 categories: 19 ms with, 13 ms without),
so it is not used there.
Source: Mehrotra 1992, "On the implementation of a primal-dual interior point method".
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from system.solve.model import Model, shared_rows

SMALLEST = 2_500
"""Guards times categories from which the guess pays; below, simplex alone is faster."""
_MAX_STEPS = 60
_GAP = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guess:
    """Which rows bind and where columns sit, as far as an interior point can tell."""

    guards: np.ndarray
    """Indices of targets whose guards seem to bind."""
    is_basic_C: np.ndarray
    """[2S] strictly between bounds."""
    at_upper_C: np.ndarray
    """[2S] at the upper bound."""
    side_P: np.ndarray
    """For each shared row (budget, trust region, groups): -1 binds at its lower end, 1 at its
    upper end, 0 does not seem to bind."""


def guess_basis(model: Model) -> Guess | None:
    """The guess, or None where it is not worth the work or the iteration does not settle."""
    guarded = np.flatnonzero(np.isfinite(model.guard_T))
    is_large = len(guarded) * model.num_sources >= SMALLEST
    if not is_large or model.effects.off_add_TS is not None:
        return None
    interior = _InteriorPoint(model, guarded)
    # An empty feasible set sends the iterates to infinity; that is an answer too: no guess.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        has_settled = interior.solve()
    return interior.guess() if has_settled else None


class _InteriorPoint:
    """min -c'x with 0 <= x <= ub, K x - t = b, t >= 0 (t = 0 for equalities), all scaled to 1."""

    def __init__(self, model: Model, guarded: np.ndarray) -> None:
        self.guarded, S = guarded, model.num_sources
        self.num_sources = S
        bound_C = np.r_[model.up_S, model.down_S]
        self.open = bound_C > 0
        # A column without room is kept, in a sliver of a box: indices stay simple.
        self.ub = np.where(self.open, bound_C, 1e-9 * model.unit) / model.unit
        cost_C = np.r_[model.score_add_S, -model.score_remove_S]
        self.c = np.where(self.open, cost_C, 0.0) / (np.abs(cost_C).max() or 1.0)
        effects = model.effects
        self.add = effects.add_TS[guarded]
        self.is_two_sided = effects.is_two_sided
        remove = effects.remove_TS[guarded] if self.is_two_sided else self.add
        size = np.maximum(np.abs(self.add).max(axis=1), np.abs(remove).max(axis=1))
        size = np.where(size > 0, size, 1.0)[:, None]
        self.add = self.add / size
        self.remove = remove / size if self.is_two_sided else self.add
        _, rows, lower, upper = shared_rows(model)
        self.num_shared = len(rows)
        self.shared, self.b_shared, self.kind, self.origin = _one_sided(rows, lower, upper)
        scale = np.abs(self.shared).max(axis=1)
        self.shared = self.shared / scale[:, None]
        self.b = np.r_[
            self.b_shared / scale / model.unit, -model.guard_T[guarded] / size[:, 0] / model.unit
        ]
        self.is_equality = np.r_[self.kind == 0, np.zeros(len(guarded), bool)]

    def solve(self) -> bool:
        """Iterate; whether the point settled well enough to be asked."""
        C, R = len(self.c), len(self.b)
        self.x, self.w = self.ub / 2, self.ub / 2
        self.z, self.y = np.ones(C), np.ones(C)
        self.t = np.where(self.is_equality, 1.0, np.maximum(self._rows(self.x) - self.b, 1.0))
        self.lam = np.where(self.is_equality, 0.0, 1.0)
        pairs = 2 * C + int((~self.is_equality).sum())
        inequality = ~self.is_equality
        for _ in range(_MAX_STEPS):
            slack = np.where(inequality, self.t, 0.0)
            r_p = self.b - self._rows(self.x) + slack
            r_d = self.c + self._columns(self.lam) + self.z - self.y
            gap = float(self.x @ self.z + self.w @ self.y + (self.t * self.lam)[inequality].sum())
            mu = gap / pairs
            worst = max(np.abs(r_p).max(), np.abs(r_d).max() * 10.0)
            if mu <= _GAP and worst <= 1e-6 * max(1.0, np.abs(self.b).max()):
                return True
            if not np.isfinite(gap + worst):
                return False
            try:
                factor = self._factor(inequality)
            except np.linalg.LinAlgError:
                return False
            none = np.zeros(C)
            affine = self._direction(factor, r_p, r_d, 0.0, none, none, np.zeros(R), inequality)
            a_p, a_d = self._lengths(affine, inequality, 1.0)
            dx, dz, dy, dt, dlam = affine
            after = (self.x + a_p * dx) @ (self.z + a_d * dz)
            after += (self.w - a_p * dx) @ (self.y + a_d * dy)
            after += ((self.t + a_p * dt) * (self.lam + a_d * dlam))[inequality].sum()
            sigma = (max(float(after), 0.0) / gap) ** 3
            step = self._direction(
                factor, r_p, r_d, sigma * mu, dx * dz, -dx * dy, dt * dlam, inequality
            )
            a_p, a_d = self._lengths(step, inequality, 0.995)
            dx, dz, dy, dt, dlam = step
            self.x, self.w = self.x + a_p * dx, self.w - a_p * dx
            self.t = np.where(inequality, self.t + a_p * dt, 1.0)
            self.z, self.y = self.z + a_d * dz, self.y + a_d * dy
            self.lam = self.lam + a_d * dlam
        return False

    def guess(self) -> Guess:
        """Where multipliers outweigh slacks, a bound or a row is taken to bind."""
        at_lower, at_upper = self.z > self.x, self.y > self.w
        tight = self.is_equality | (self.lam > self.t)
        p = len(self.kind)
        side_P = np.zeros(self.num_shared, np.int64)
        for row in np.flatnonzero(tight[:p]):
            side_P[self.origin[row]] = 1 if self.kind[row] == -1 else -1
        return Guess(
            guards=self.guarded[tight[p:]],
            is_basic_C=self.open & ~at_lower & ~at_upper,
            at_upper_C=self.open & at_upper & ~at_lower,
            side_P=side_P,
        )

    def _rows(self, x: np.ndarray) -> np.ndarray:
        S = self.num_sources
        guards = self.add @ x[:S] - self.remove @ x[S:]
        return np.r_[self.shared @ x, guards]

    def _columns(self, lam: np.ndarray) -> np.ndarray:
        p = len(self.kind)
        guards = np.r_[self.add.T @ lam[p:], -(self.remove.T @ lam[p:])]
        return self.shared.T @ lam[:p] + guards

    def _factor(self, inequality: np.ndarray):
        S, p = self.num_sources, len(self.kind)
        self.theta = 1.0 / (self.z / self.x + self.y / self.w)
        up, down = self.theta[:S], self.theta[S:]
        if self.is_two_sided:
            half_a, half_r = self.add * np.sqrt(up), self.remove * np.sqrt(down)
            guards = half_a @ half_a.T + half_r @ half_r.T
        else:
            half = self.add * np.sqrt(up + down)
            guards = half @ half.T
        matrix = np.empty((len(self.b), len(self.b)))
        matrix[p:, p:] = guards
        weighted = self.shared * self.theta
        matrix[:p, :p] = weighted @ self.shared.T
        cross = weighted[:, :S] @ self.add.T - weighted[:, S:] @ self.remove.T
        matrix[:p, p:], matrix[p:, :p] = cross, cross.T
        lam = np.where(inequality, self.lam, 1.0)
        index = np.arange(len(self.b))
        matrix[index, index] += np.where(inequality, self.t / lam, 0.0)
        matrix[index, index] *= 1.0 + 1e-12
        return scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)

    def _direction(self, factor, r_p, r_d, target, corr_xz, corr_wy, corr_tl, inequality):
        r_xz = target - self.x * self.z - corr_xz
        r_wy = target - self.w * self.y - corr_wy
        r_tl = np.where(inequality, target - self.t * self.lam - corr_tl, 0.0)
        lam = np.where(inequality, self.lam, 1.0)
        h = r_d + r_xz / self.x - r_wy / self.w
        right = r_p + r_tl / lam - self._rows(self.theta * h)
        dlam = scipy.linalg.cho_solve(factor, right, check_finite=False)
        dx = self.theta * (h + self._columns(dlam))
        dz = (r_xz - self.z * dx) / self.x
        dy = (r_wy + self.y * dx) / self.w
        dt = np.where(inequality, (r_tl - self.t * dlam) / lam, 0.0)
        return dx, dz, dy, dt, dlam

    def _lengths(self, step, inequality: np.ndarray, share: float) -> tuple[float, float]:
        dx, dz, dy, dt, dlam = step
        primal = [(self.x, dx), (self.w, -dx), (self.t[inequality], dt[inequality])]
        dual = [(self.z, dz), (self.y, dy), (self.lam[inequality], dlam[inequality])]
        return share_of(primal, share), share_of(dual, share)


def share_of(pairs: list[tuple[np.ndarray, np.ndarray]], share: float) -> float:
    """The longest step at most 1 that keeps every value positive, times ``share``."""
    longest = 1.0 / share
    for value, change in pairs:
        falls = change < 0
        if falls.any():
            longest = min(longest, float((value[falls] / -change[falls]).min()))
    return min(1.0, share * longest)


def _one_sided(
    rows: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows as ``>=`` (kind 1: a lower end, -1: an upper end) or ``=`` (kind 0), and whose ends."""
    ends: list[tuple[np.ndarray, float, int, int]] = []
    for i, (row, low, high) in enumerate(zip(rows, lower, upper, strict=True)):
        if low == high:
            ends.append((row, low, 0, i))
            continue
        if np.isfinite(low):
            ends.append((row, low, 1, i))
        if np.isfinite(high):
            ends.append((-row, -high, -1, i))
    out, bounds, kinds, origin = zip(*ends, strict=True)
    return np.array(out), np.array(bounds), np.array(kinds), np.array(origin)
