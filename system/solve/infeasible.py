"""Why no mix exists: the limits that conflict, and the smallest change that would help.

Every limit but the budget gets a slack. A minimal conflict is found by the deletion filter
(Chinneck 2008, "Feasibility and infeasibility in optimization", section 6.2); then each limit of it
is relaxed alone, as little as possible, all others held.
"""

from dataclasses import dataclass, replace

import numpy as np

from system.errors import InfeasibleMixError
from system.solve.highs import ModelInfeasibleError
from system.solve.model import Model, new_program
from system.solve.program import Program
from system.solve.row_generation import Cuts, GuardCuts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Limit:
    """One of the user's limits as ``row @ (u, v) >= bound``."""

    words: str
    advice: str
    """How to loosen it; ``{to}`` is the value that just fits, ``{by}`` the difference."""
    row_C: np.ndarray
    bound: float
    value: float
    """As the user gave it."""
    step: float
    """Change of ``value`` per unit of slack."""
    size: float
    """What a slack is measured against, > 0."""


_MOST_FILTERED = 40
"""Larger conflicts are named as the prices give them: filtering takes one LP a limit."""
_MOST_TOLD = 12
"""No one reads more limits than this."""


def infeasibility(model: Model) -> InfeasibleMixError:
    """The error to raise for a model whose limits no mix satisfies."""
    fractional = replace(model.options, max_categories=None, integer=False)
    relaxed = replace(model, options=fractional)
    conflict = _Conflict(relaxed)
    if conflict.is_feasible():
        if model.options.max_categories is not None:
            return _too_few_categories(model)
        return InfeasibleMixError(
            "no whole-number mix satisfies all limits (fractional counts would); widen the trust "
            "region (move), the caps or the guards slightly, or leave integer out"
        )
    limits = conflict.minimal()
    asked = limits[:_MOST_TOLD]
    advice = [words for limit in asked if (words := conflict.relaxation(limit)) is not None]
    names = "; ".join(conflict.limits[k].words for k in asked)
    if len(limits) > len(asked):
        names += f"; and {len(limits) - len(asked)} more of the kind"
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
    from system.solve.whole import is_possible

    while low < high:
        middle = (low + high) // 2
        if is_possible(replace(model, options=replace(model.options, max_categories=middle))):
            high = middle
        else:
            low = middle + 1
    return InfeasibleMixError(
        f"no mix with at most {model.options.max_categories} categories (max_categories) satisfies "
        f"the other limits: from a base of {int((model.base_S > 0).sum())} categories the trust "
        f"region (move = {model.options.move:g}), caps, lower limits, groups and guards do not let "
        f"enough of them be emptied; raise max_categories to {high}, or widen move"
    )


class _Conflict:
    """An elastic twin of the model: columns ``u, v`` and one slack for each limit."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.limits = _limits(model)
        self._num_rows = len(self.limits)
        self._finder = GuardCuts(model, -model.guard_T)
        S = model.num_sources
        self._first = 2 * S
        guarded = np.flatnonzero(np.isfinite(model.guard_T))
        self._guarded = {int(i): self._num_rows + k for k, i in enumerate(guarded)}
        for i in guarded:
            self.limits.append(_guard_limit(model, int(i), float(self._finder.scales()[i])))
        open_model = replace(
            model,
            up_S=np.full(S, 2.0 * model.budget / model.length_S.min()),
            down_S=model.base_S,
            groups=(),
            move_budget=float(model.length_S.sum() * 2.0 * model.budget),
        )
        slacks = len(self.limits)
        size_K = np.array([limit.size for limit in self.limits])
        self._weight_K = 1.0 / size_K
        self.program: Program = new_program(
            open_model,
            cost_C=np.r_[np.zeros(2 * S), -self._weight_K],
            extra_upper=np.full(slacks, np.inf),
            extra_unit=np.exp2(np.floor(np.log2(size_K))),
        )
        rows = np.zeros((self._num_rows, 2 * S + slacks))
        for k in range(self._num_rows):
            rows[k, : 2 * S] = self.limits[k].row_C
            rows[k, 2 * S + k] = 1.0
        bound_K = np.array([limit.bound for limit in self.limits[: self._num_rows]])
        self.program.add_rows(
            [("limit", k) for k in range(self._num_rows)],
            rows,
            bound_K,
            np.full(self._num_rows, np.inf),
        )

    def is_feasible(self) -> bool:
        """Whether all limits hold together with fractional counts."""
        return self._violation(set(range(len(self.limits)))) <= 1e-7

    def minimal(self) -> list[int]:
        """A set of limits that conflict; none could be left out, unless it is a large set."""
        self._violation(set(range(len(self.limits))))
        point = self._solve()
        reduced = np.abs(np.asarray(point.reduced_cost_C)[self._first :] + self._weight_K)
        # A slack whose limit has a price takes part in this infeasibility; only those can be in
        # a minimal conflict, the filter removes what is left over.
        active = {k for k in range(len(self.limits)) if reduced[k] > 1e-7 * self._weight_K[k]}
        if self._violation(active) <= 1e-7:
            active = set(range(len(self.limits)))
        for k in sorted(active) if len(active) <= _MOST_FILTERED else ():
            if self._violation(active - {k}) > 1e-7:
                active = active - {k}
        return sorted(active)

    def relaxation(self, k: int) -> str | None:
        """What to do to limit ``k`` alone, or None when that cannot be enough."""
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
        """The cheapest change of several limits at once, relative to their sizes."""
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
        """Least weighted violation of the given limits, the others left out."""
        chosen = np.zeros(len(self.limits), bool)
        chosen[sorted(active)] = True
        upper_C = self.program.upper_C.copy()
        upper_C[self._first :] = np.inf
        self.program.set_column_bounds(self.program.lower_C, upper_C)
        cost_C = np.zeros(len(upper_C))
        cost_C[self._first :] = np.where(chosen, -self._weight_K, 0.0)
        self.program.set_costs(cost_C)
        return -self._solve(chosen).objective

    def _solve(self, chosen: np.ndarray | None = None):
        while True:
            point = self.program.solve()
            cuts = self._finder(point.x_C)
            rows = None if cuts is None else self._guard_rows(cuts, point.x_C, chosen)
            if rows is None:
                return point
            self.program.add_rows(*rows)

    def _guard_rows(self, cuts: Cuts, x_C: np.ndarray, chosen: np.ndarray | None):
        """The guards' rows that their own slacks do not cover yet."""
        position = {name: i for i, name in enumerate(self.model.problem.targets)}
        scale_T = self._finder.scales()
        labels, rows, lower = [], [], []
        for label, row_C, bound in zip(cuts.labels, cuts.rows_RC, cuts.lower_R, strict=True):
            i = position[label[1]]
            k = self._guarded[i]
            column = self._first + k
            missing = bound - float(row_C @ x_C[: self._first]) - float(x_C[column])
            is_left_out = chosen is not None and not chosen[k]
            if is_left_out or missing <= 4e-9 * scale_T[i]:
                continue
            full_C = np.zeros(len(x_C))
            full_C[: self._first] = row_C
            full_C[column] = 1.0
            labels.append(("limit", k))
            rows.append(full_C)
            lower.append(bound)
        if not rows:
            return None
        return labels, np.array(rows), np.array(lower), np.full(len(rows), np.inf)


def _upward(value: float, step: float) -> str:
    """Six digits, rounded to the feasible side."""
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
        row_C=np.zeros(0),
        bound=-guard,
        value=guard,
        step=1.0,
        size=max(guard, scale),
    )


def _limits(model: Model) -> list[_Limit]:
    """All limits but budget and guards, in the order in which messages name them."""
    S, budget = model.num_sources, model.budget
    room = budget / model.length_S
    limits = [
        _Limit(
            words=f"the trust region (move = {model.options.move:g} of the budget)",
            advice=f"raise move from {model.options.move:g} to {{to}}",
            row_C=-np.r_[model.length_S, np.zeros(S)],
            bound=-model.move_budget,
            value=model.options.move,
            step=1.0 / budget,
            size=budget,
        )
    ]
    for group in model.groups:
        held = float(model.base_S[group.members].sum())
        row_C = np.zeros(2 * S)
        row_C[group.members], row_C[S + group.members] = 1.0, -1.0
        size = float(room[group.members].max())
        if group.lower > 0:
            limits.append(
                _Limit(
                    words=f"the minimum of group {group.name!r} ({group.lower:.10g})",
                    advice=f"lower the minimum of group {group.name!r} to {{to}}",
                    row_C=row_C,
                    bound=group.lower - held,
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
                    row_C=-row_C,
                    bound=held - group.upper,
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
    up_C, down_C = np.zeros(2 * S), np.zeros(2 * S)
    up_C[j], down_C[S + j] = 1.0, 1.0
    limits = []
    if lower > 0:
        limits.append(
            _Limit(
                words=f"the lower limit of category {name!r} ({lower:.10g})",
                advice=f"lower the lower limit of category {name!r} to {{to}}",
                row_C=up_C - down_C,
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
                row_C=down_C - up_C,
                bound=base - ceiling,
                value=ceiling,
                step=1.0,
                size=size,
            )
        )
    if np.isfinite(cap):
        for row_C in (up_C, down_C):
            limits.append(
                _Limit(
                    words=f"the cap on the move of category {name!r} ({cap:.10g} examples)",
                    advice=f"let category {name!r} move by {{to}} examples (cap now {cap:.10g})",
                    row_C=-row_C,
                    bound=-cap,
                    value=cap,
                    step=1.0,
                    size=size,
                )
            )
    return limits
