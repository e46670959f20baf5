"""The base mix w0: the given counts scaled and clipped so that they spend exactly the budget.

One factor scales all counts; a count that would leave its bounds stops there and the factor makes
up for it. So the base always respects bounds and budget, staying put is always possible, and where
no bound interferes it is simply ``count * budget / total``.
"""

import numpy as np

from system.errors import InfeasibleMixError
from system.solve.problem import MixProblem


def scaled_base(
    problem: MixProblem,
    *,
    lower_S: np.ndarray,
    ceiling_S: np.ndarray,
    length_S: np.ndarray,
    budget: float,
) -> np.ndarray:
    """[S] ``clip(factor * count, lower, ceiling)`` with the factor that spends the budget.

    Raises:
        InfeasibleMixError: the budget does not fit between all lower and all upper limits.
    """
    _check_room(problem, lower_S, ceiling_S, length_S, budget)
    counts_S = problem.base_S
    total = float(length_S @ counts_S)
    plain_S = counts_S if total == budget else counts_S * (budget / total)
    if np.all(plain_S >= lower_S) and np.all(plain_S <= ceiling_S):
        return plain_S.copy()
    positive_S = counts_S > 0
    most_S = np.where(positive_S, ceiling_S, lower_S)
    if float(length_S @ most_S) >= budget:
        return _spend(counts_S, lower_S, ceiling_S, length_S, budget)
    # Every category with a count is full: the rest goes evenly to those without one.
    start_S = np.where(positive_S, ceiling_S, lower_S)
    even_S = np.where(positive_S, 0.0, 1.0)
    return _spend(even_S, start_S, ceiling_S, length_S, budget)


def integer_base(
    problem: MixProblem,
    *,
    lower_S: np.ndarray,
    ceiling_S: np.ndarray,
    length_S: np.ndarray,
    budget: float,
) -> np.ndarray:
    """[S] the scaled base in whole examples, by largest remainders; ties by position.

    It spends at most the budget and leaves less than the longest example unspent, unless every
    category that would still fit is at its ceiling.

    Raises:
        InfeasibleMixError: as ``scaled_base``, with limits in whole examples.
    """
    base_S = scaled_base(
        problem, lower_S=lower_S, ceiling_S=ceiling_S, length_S=length_S, budget=budget
    )
    whole_S = np.maximum(np.floor(base_S + 1e-9), lower_S)
    left = budget - float(length_S @ whole_S)
    longest = float(length_S.max())
    order = np.argsort(-(base_S - whole_S), kind="stable")
    while left >= longest * (1.0 - 1e-9):
        before = left
        for j in order:
            if whole_S[j] + 1 <= ceiling_S[j] and length_S[j] <= left + 1e-9:
                whole_S[j] += 1
                left -= float(length_S[j])
        if left == before:
            break
    return whole_S


def _spend(
    counts_S: np.ndarray,
    lower_S: np.ndarray,
    ceiling_S: np.ndarray,
    length_S: np.ndarray,
    budget: float,
) -> np.ndarray:
    """Exact: the spending is piecewise linear and rising in the factor; find its segment."""
    with np.errstate(divide="ignore", invalid="ignore"):
        knots = np.concatenate([lower_S / counts_S, ceiling_S / counts_S])
    knots = np.unique(knots[np.isfinite(knots) & (knots >= 0)])

    def spent(factor: float) -> float:
        return float(length_S @ np.clip(factor * counts_S, lower_S, ceiling_S))

    low, high = 0, len(knots)
    while low < high:
        middle = (low + high) // 2
        if spent(knots[middle]) < budget:
            low = middle + 1
        else:
            high = middle
    start = 0.0 if low == 0 else float(knots[low - 1])
    end = float(knots[low]) if low < len(knots) else start + 1.0
    probe = 0.5 * (start + end)
    is_free_S = (probe * counts_S > lower_S) & (probe * counts_S < ceiling_S)
    fixed_S = np.clip(probe * counts_S, lower_S, ceiling_S)
    slope = float(length_S[is_free_S] @ counts_S[is_free_S])
    if slope == 0.0:
        return fixed_S
    factor = (budget - float(length_S[~is_free_S] @ fixed_S[~is_free_S])) / slope
    return np.clip(factor * counts_S, lower_S, ceiling_S)


def _check_room(
    problem: MixProblem,
    lower_S: np.ndarray,
    ceiling_S: np.ndarray,
    length_S: np.ndarray,
    budget: float,
) -> None:
    for j in np.flatnonzero(lower_S > ceiling_S * (1 + 1e-12))[:1]:
        raise InfeasibleMixError(
            f"category {problem.categories[j]!r} must have at least {lower_S[j]:g} examples (lower "
            f"limit) but can have at most {ceiling_S[j]:g} (upper limit, supply times max_epochs, "
            f"whole examples); lower the first by {lower_S[j] - ceiling_S[j]:g} or raise the second"
        )
    least, most = float(length_S @ lower_S), float(length_S @ ceiling_S)
    unit = "examples" if np.all(length_S == 1.0) else "tokens"
    if least > budget * (1 + 1e-12):
        raise InfeasibleMixError(
            f"the lower limits ({_named(problem, lower_S)}) add up to {least:.10g} {unit}, more "
            f"than the budget of {budget:.10g}; raise the budget by {least - budget:.10g} or lower "
            "the limits by as much together"
        )
    if most < budget * (1 - 1e-12):
        raise InfeasibleMixError(
            f"supply (times max_epochs) and upper limits of all categories allow {most:.10g} "
            f"{unit} together, less than the budget of {budget:.10g}; lower the budget by "
            f"{budget - most:.10g}, or raise max_epochs by the factor {budget / most:.4g} or more, "
            "or collect more data"
        )


def _named(problem: MixProblem, count_S: np.ndarray, most: int = 6) -> str:
    """The largest counts with their categories: "code 100, chat 90, and 3 more"."""
    order = [j for j in np.argsort(-count_S, kind="stable") if count_S[j] > 0]
    parts = [f"{problem.categories[j]} {count_S[j]:g}" for j in order[:most]]
    return ", ".join(parts) + (f", and {len(order) - most} more" if len(order) > most else "")
