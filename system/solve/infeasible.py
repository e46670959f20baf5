"""Explains why no mix exists: the limits that conflict, and the smallest change that helps.

Every limit except the budget gets a slack variable. The deletion filter finds a minimal set of
conflicting limits (Chinneck 2008, "Feasibility and infeasibility in optimization", section 6.2).
Then each of them is relaxed alone, as little as possible, with all others fixed.
`system.solve.solve` calls `infeasibility` when a program has no solution.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array, hstack

from system.errors import InfeasibleMixError
from system.solve.highs import ModelInfeasibleError
from system.solve.model import Model, new_program
from system.solve.program import Point, Program
from system.solve.row_generation import Cuts, GuardCuts
from system.solve.segments import expand, padded
from system.solve.whole import is_possible


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Limit:
    """One of the user's limits, as the row ``coefficient @ (u, v)[index] >= bound``."""

    words: str
    """Its name in the message."""
    advice: str
    """How to loosen it; ``{to}`` is the first value that is enough, ``{by}`` the difference."""
    index: np.ndarray
    """Columns, ``v`` after ``u``. Empty for a guard: its row is added when it is violated."""
    coefficient: np.ndarray
    bound: float
    value: float
    """The limit as the user set it."""
    step: float
    """Change of ``value`` per unit of slack."""
    size: float
    """Scale of its slack, > 0: slacks of different limits are compared after division by it."""


_MOST_FILTERED = 40
"""Largest conflict that is filtered, since the filter solves one LP for each limit. Larger ones are
named as the prices show them, perhaps with limits that could be left out."""
_NEGLIGIBLE = 1e-7
"""Largest violation, as a share of its scale, that counts as rounding of the solver."""
_MOST_NAMED = 12
"""Largest number of limits that a message names."""


def infeasibility(model: Model) -> InfeasibleMixError:
    """The error for a model whose limits no mix satisfies; its message says which limits conflict.

    First it asks whether only ``max_categories`` or whole counts are to blame, by solving without
    them; otherwise it looks for a conflict among the other limits.
    """
    # Only a linear program has prices that show a conflict, so the integer limits are taken out.
    fractional = replace(model.options, max_categories=None, integer=False)
    relaxed = replace(model, options=fractional)
    conflict = _Conflict(relaxed)
    if conflict.is_feasible():
        unlimited = replace(model, options=replace(model.options, max_categories=None))
        if model.options.max_categories is not None and is_possible(unlimited):
            return _too_few_categories(model)
        if model.options.integer:
            return InfeasibleMixError(
                "no whole-number mix satisfies all limits (fractional counts would); widen the "
                "trust region (move), the caps or the guards slightly, or leave integer out"
            )
    limits = conflict.minimal()
    # The solver found no mix, and yet no violation is larger than its rounding.
    if not limits:
        return InfeasibleMixError(
            f"no mix of {model.budget:.10g} {model.options.unit} satisfies all limits, but the "
            "violation is as small as the rounding of the solver; widen one of the limits by a "
            "millionth"
        )
    named = limits[:_MOST_NAMED]
    advice = [words for limit in named if (words := conflict.relaxation(limit)) is not None]
    names = "; ".join(conflict.limits[k].words for k in named)
    if len(limits) > len(named):
        names += f"; and {len(limits) - len(named)} more of this kind"
    message = (
        f"no mix of {model.budget:.10g} {model.options.unit} satisfies all limits; these conflict: "
        f"{names}. "
    )
    if advice:
        return InfeasibleMixError(message + "Any one of these is enough: " + "; or ".join(advice))
    return InfeasibleMixError(
        message
        + "No single limit is enough; together these are: "
        + "; and ".join(conflict.joint())
    )


def _too_few_categories(model: Model) -> InfeasibleMixError:
    low, high = (model.options.max_categories or 0) + 1, model.num_sources
    while low < high:
        middle = (low + high) // 2
        if is_possible(replace(model, options=replace(model.options, max_categories=middle))):
            high = middle
        else:
            low = middle + 1
    return InfeasibleMixError(
        f"no mix with at most {model.options.max_categories} categories (max_categories) satisfies "
        f"the other limits: the base mix has {int((model.base_S > 0).sum())} categories, and the "
        f"trust region (move = {model.options.move:g}), caps, lower limits, groups and guards do "
        f"not allow enough of them to be emptied; raise max_categories to {high}, or widen move"
    )


class _Conflict:
    """The elastic form of the model: columns ``u, v`` and one slack for each limit."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.limits = _limits(model)
        self._num_rows = len(self.limits)
        S = model.num_sources
        open_model = replace(
            model,
            up_S=np.full(S, 2.0 * model.budget / model.length_S.min()),
            down_S=model.base_S,
            must_remove_S=np.zeros(S),
            groups=(),
            move_budget=float(model.length_S.sum() * 2.0 * model.budget),
        )
        if model.curve is not None:
            open_model = expand(open_model, padded(model.curve))
        self._finder = GuardCuts(open_model, -model.guard_T)
        self._first = 2 * open_model.num_sources
        guarded = np.flatnonzero(np.isfinite(model.guard_T))
        self._guarded = {int(i): self._num_rows + k for k, i in enumerate(guarded)}
        scale_T = self._finder.scales()
        self.limits += [_guard_limit(model, int(i), float(scale_T[i])) for i in guarded]
        size_K = np.array([limit.size for limit in self.limits])
        self._weight_K = 1.0 / size_K
        self.program: Program = new_program(
            open_model,
            cost_C=np.r_[np.zeros(self._first), -self._weight_K],
            extra_upper=np.full(len(self.limits), np.inf),
            extra_unit=np.exp2(np.floor(np.log2(size_K))),
        )
        self.program.add_rows(
            [("limit", k) for k in range(self._num_rows)],
            self._limit_rows(),
            np.array([limit.bound for limit in self.limits[: self._num_rows]]),
            np.full(self._num_rows, np.inf),
        )

    def _limit_rows(self) -> csr_array:
        """One row for each limit but guards, over ``u``, ``v`` (or their segments) and slacks."""
        S, X = self.model.num_sources, self._first // 2
        rows, columns, values = [], [], []
        for k, limit in enumerate(self.limits[: self._num_rows]):
            side, source = np.divmod(limit.index, S)
            inner = side * X + source
            for start in range(0, X, S):
                rows.append(np.full(len(inner), k))
                columns.append(inner + start)
                values.append(limit.coefficient)
        slack = np.arange(self._num_rows)
        rows, columns = np.concatenate([*rows, slack]), np.concatenate([*columns, X + X + slack])
        values = np.concatenate([*values, np.ones(self._num_rows)])
        shape = (self._num_rows, self._first + len(self.limits))
        return csr_array((values, (rows, columns)), shape=shape)

    def is_feasible(self) -> bool:
        """Whether fractional counts satisfy all limits, up to rounding."""
        return self._violation(set(range(len(self.limits)))) <= _NEGLIGIBLE

    def minimal(self) -> list[int]:
        """A set of conflicting limits, of which none can be left out unless the set is large.

        Empty if the solver cannot distinguish the conflict from rounding.
        """
        total = self._violation(set(range(len(self.limits))))
        if total <= 0.0:
            return []
        negligible = min(_NEGLIGIBLE, 0.5 * total)
        point = self._solve()
        reduced = np.abs(np.asarray(point.reduced_cost_C)[self._first :] + self._weight_K)
        # A limit whose slack has a price takes part in this infeasibility. Only such limits can be
        # in a minimal conflict, and the filter removes those that are not.
        active = {k for k in range(len(self.limits)) if reduced[k] > 1e-7 * self._weight_K[k]}
        if self._violation(active) <= negligible:
            active = set(range(len(self.limits)))
        for k in sorted(active) if len(active) <= _MOST_FILTERED else ():
            if self._violation(active - {k}) > negligible:
                active = active - {k}
        return sorted(active)

    def relaxation(self, k: int) -> str | None:
        """Advice how to loosen limit ``k`` alone; None if that cannot be enough."""
        upper_C = self.program.upper_C.copy()
        upper_C[self._first :] = 0.0
        upper_C[self._first + k] = np.inf
        cost_C = np.zeros(len(upper_C))
        cost_C[self._first + k] = -self._weight_K[k]
        self.program.set_column_bounds(self.program.lower_C, upper_C)
        self.program.set_costs(cost_C)
        try:
            slack = float(self._solve().x_C[self._first + k])
        except ModelInfeasibleError:
            return None
        return self._advice(k, slack)

    def joint(self) -> list[str]:
        """Advice how to loosen several limits together, with the smallest sum of scaled slacks."""
        self._violation(set(range(len(self.limits))))
        slack_K = self._solve().x_C[self._first :]
        needed = np.flatnonzero(slack_K > 1e-9 * np.array([limit.size for limit in self.limits]))
        return [self._advice(int(k), float(slack_K[k])) for k in needed]

    def _advice(self, k: int, slack: float) -> str:
        limit = self.limits[k]
        by = slack * abs(limit.step)
        to = limit.value + slack * limit.step
        return limit.advice.format(to=_upward(to, limit.step), by=f"{by:.6g}")

    def _violation(self, active: set[int]) -> float:
        """Smallest weighted violation of the active limits, without all other limits."""
        chosen = np.zeros(len(self.limits), bool)
        chosen[sorted(active)] = True
        upper_C = self.program.upper_C.copy()
        upper_C[self._first :] = np.inf
        self.program.set_column_bounds(self.program.lower_C, upper_C)
        cost_C = np.zeros(len(upper_C))
        cost_C[self._first :] = np.where(chosen, -self._weight_K, 0.0)
        self.program.set_costs(cost_C)
        return -self._solve(chosen).objective

    def _solve(self, chosen: np.ndarray | None = None) -> Point:
        while True:
            point = self.program.solve()
            cuts = self._finder(point.x_C)
            rows = None if cuts is None else self._guard_rows(cuts, point.x_C, chosen)
            if rows is None:
                return point
            self.program.add_rows(*rows)

    def _guard_rows(
        self, cuts: Cuts, x_C: np.ndarray, chosen: np.ndarray | None
    ) -> tuple[list[tuple[str, int]], csr_array, np.ndarray, np.ndarray] | None:
        """Rows of the guards that are violated even with their slacks."""
        position = {name: i for i, name in enumerate(self.model.problem.targets)}
        place = np.array([position[label[1]] for label in cuts.labels])
        slack = np.array([self._guarded[int(i)] for i in place])
        missing = cuts.lower_R - cuts.rows_RC @ x_C[: self._first] - x_C[self._first + slack]
        is_violated = missing > 4e-9 * self._finder.scales()[place]
        if chosen is not None:
            is_violated &= chosen[slack]
        if not is_violated.any():
            return None
        slack = slack[is_violated]
        count = len(slack)
        shape = (count, len(self.limits))
        own = csr_array((np.ones(count), (np.arange(count), slack)), shape=shape)
        rows = hstack([csr_array(cuts.rows_RC[is_violated]), own], format="csr")
        labels = [("limit", int(k)) for k in slack]
        return labels, csr_array(rows), cuts.lower_R[is_violated], np.full(count, np.inf)


def _upward(value: float, step: float) -> str:
    """The value with six digits, rounded to the feasible side, so that the advice is enough."""
    if value == 0:
        return "0"
    digits = 10.0 ** (5 - np.floor(np.log10(abs(value))))
    rounded = np.ceil(value * digits - 1e-6) if step > 0 else np.floor(value * digits + 1e-6)
    return f"{rounded / digits:.6g}"


def _guard_limit(model: Model, i: int, scale: float) -> _Limit:
    name, guard = model.problem.targets[i], float(model.guard_T[i])
    return _Limit(
        words=f"the guard of target {name!r} (may lose at most {guard:.6g})",
        advice=f"let target {name!r} lose {{to}} (guard now {guard:.6g})",
        index=np.zeros(0, np.int64),
        coefficient=np.zeros(0),
        bound=-guard,
        value=guard,
        step=1.0,
        size=max(guard, scale),
    )


def _limits(model: Model) -> list[_Limit]:
    """All limits except budget and guards, in the order in which messages name them."""
    S, budget = model.num_sources, model.budget
    room = budget / model.length_S
    limits = [
        _Limit(
            words=f"the trust region (move = {model.options.move:g} of the budget)",
            advice=f"raise move from {model.options.move:g} to {{to}}",
            index=np.arange(S),
            coefficient=-model.length_S,
            bound=-model.move_budget,
            value=model.options.move,
            step=1.0 / budget,
            size=budget,
        )
    ]
    # A row limits the change from the base, so the base count moves to the right-hand side.
    for group in model.groups:
        base_count = float(model.base_S[group.members].sum())
        index = np.r_[group.members, S + group.members]
        added = np.repeat([1.0, -1.0], len(group.members))
        size = float(room[group.members].max())
        if group.lower > 0:
            limits.append(
                _Limit(
                    words=f"the minimum of group {group.name!r} ({group.lower:.10g})",
                    advice=f"lower the minimum of group {group.name!r} to {{to}}",
                    index=index,
                    coefficient=added,
                    bound=group.lower - base_count,
                    value=group.lower,
                    step=-1.0,
                    size=size,
                )
            )
        if np.isfinite(group.upper):
            limits.append(
                _Limit(
                    words=f"the maximum of group {group.name!r} ({group.upper:.10g})",
                    advice=f"raise the maximum of group {group.name!r} to {{to}}",
                    index=index,
                    coefficient=-added,
                    bound=base_count - group.upper,
                    value=group.upper,
                    step=1.0,
                    size=size,
                )
            )
    for j in range(S):
        limits += _category_limits(model, j, float(room[j]))
    return limits


def _category_limits(model: Model, j: int, size: float) -> list[_Limit]:
    S, name = model.num_sources, model.problem.categories[j]
    base, cap = float(model.base_S[j]), float(model.cap_S[j])
    lower, ceiling = float(model.lower_S[j]), float(model.ceiling_S[j])
    both, added = np.array([j, S + j]), np.array([1.0, -1.0])
    limits = []
    if lower > 0:
        limits.append(
            _Limit(
                words=f"the lower limit of category {name!r} ({lower:.10g})",
                advice=f"lower the lower limit of category {name!r} to {{to}}",
                index=both,
                coefficient=added,
                bound=lower - base,
                value=lower,
                step=-1.0,
                size=size,
            )
        )
    if np.isfinite(ceiling):
        epochs = model.options.max_epochs
        words = f"the upper limit of category {name!r} ({ceiling:.10g})"
        advice = f"raise the upper limit of category {name!r} to {{to}}"
        if model.is_supply_S[j]:
            words = f"the supply of category {name!r} ({ceiling / epochs:.10g} x {epochs:g} epochs)"
            advice = f"use {{to}} examples of category {name!r} ({{by}} more: collect them, or "
            advice += "raise max_epochs)"
        limits.append(
            _Limit(
                words=words,
                advice=advice,
                index=both,
                coefficient=-added,
                bound=base - ceiling,
                value=ceiling,
                step=1.0,
                size=size,
            )
        )
    # A cap limits u and v separately, so it is two rows under one name.
    if np.isfinite(cap):
        for column in both:
            limits.append(
                _Limit(
                    words=f"the cap on the move of category {name!r} ({cap:.10g} examples)",
                    advice=f"let category {name!r} move by {{to}} examples (cap now {cap:.10g})",
                    index=np.array([column]),
                    coefficient=np.array([-1.0]),
                    bound=-cap,
                    value=cap,
                    step=1.0,
                    size=size,
                )
            )
    return limits
