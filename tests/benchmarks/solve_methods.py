"""The optimiser's competitors in `bench_solve.py`, and the problems that all of them get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MOVE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One problem: m categories that are their own targets, gamma with a unit diagonal."""

    m: int
    guard: float | None
    gamma_TS: np.ndarray
    base_S: np.ndarray
    supply_S: np.ndarray

    @property
    def beta(self) -> np.ndarray:
        return self.base_S / self.base_S.sum()

    @property
    def score(self) -> np.ndarray:
        return self.beta @ self.gamma_TS

    @property
    def floors(self) -> np.ndarray | None:
        return None if self.guard is None else self.guard * np.abs(self.gamma_TS @ self.base_S)


def make_case(m: int, guard: float | None, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    gamma = np.empty((m, m))
    for start in range(0, m, 500):
        gamma[start : start + 500] = rng.normal(0.0, 0.05, (min(500, m - start), m))
    np.fill_diagonal(gamma, 1.0)
    base = np.round(rng.lognormal(6.0, 1.0, m)) + 1.0
    return Case(m=m, guard=guard, gamma_TS=gamma, base_S=base, supply_S=2.0 * base)


def ours(case: Case) -> np.ndarray:
    from system.solve import MixOptions, MixProblem, solve_mix

    names = tuple(f"c{i}" for i in range(case.m))
    problem = MixProblem(
        categories=names,
        targets=names,
        base_S=case.base_S,
        effect_add_TS=case.gamma_TS,
        supply_S=case.supply_S,
    )
    mix = solve_mix(problem, MixOptions(move=MOVE, guard=case.guard))
    return np.array([c.count for c in mix.categories])


def scipy_linprog(case: Case) -> np.ndarray:
    from scipy.optimize import linprog

    m, total = case.m, case.base_S.sum()
    rows, bounds = [np.r_[np.ones(m), np.zeros(m)]], [MOVE * total]
    if case.floors is not None:
        rows = np.concatenate([rows, np.concatenate([-case.gamma_TS, case.gamma_TS], axis=1)])
        bounds = np.r_[bounds, case.floors]
    answer = linprog(
        -np.r_[case.score, -case.score],
        A_ub=np.asarray(rows),
        b_ub=bounds,
        A_eq=np.r_[np.ones(m), -np.ones(m)][None, :],
        b_eq=[0.0],
        bounds=np.stack([np.zeros(2 * m), np.r_[case.supply_S - case.base_S, case.base_S]], axis=1),
        method="highs",
    )
    assert answer.status == 0, answer.message
    return case.base_S + answer.x[:m] - answer.x[m:]


def cvxpy_model(case: Case) -> np.ndarray:
    import cvxpy as cp

    w = cp.Variable(case.m)
    move = w - case.base_S
    limits = [
        cp.sum(w) == case.base_S.sum(),
        w >= 0,
        w <= case.supply_S,
        cp.sum(cp.pos(move)) <= MOVE * case.base_S.sum(),
    ]
    if case.floors is not None:
        limits.append(case.gamma_TS @ move >= -case.floors)
    model = cp.Problem(cp.Maximize(case.score @ move), limits)
    model.solve()
    assert model.status in ("optimal", "optimal_inaccurate"), model.status
    return np.asarray(w.value)


def adam_signs(case: Case, *, torch_autograd: bool) -> np.ndarray:
    """The paper's scheme: Adam on -a'Gw / sum(w) from w = a, then equal moves by sign."""
    a = case.beta
    weights = adam_torch(case, a) if torch_autograd else adam_numpy(case, a)
    return equal_moves(case, np.sign(weights - a))


def adam_numpy(case: Case, a: np.ndarray, *, smallest: float = 1e-5) -> np.ndarray:
    w, first, second = a.copy(), np.zeros(case.m), np.zeros(case.m)
    for step in range(1, 2001):
        total = w.sum()
        value = a @ (case.gamma_TS @ w)
        gradient = -(a @ case.gamma_TS) / total + value / total**2
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9**step), second / (1 - 0.999**step)
        w = w - 1e-4 * mean / (np.sqrt(spread) + 1e-8)
        if w.min() < smallest:
            break
    return w


def adam_torch(case: Case, a: np.ndarray, *, smallest: float = 1e-5) -> np.ndarray:
    import torch

    gamma, start = torch.from_numpy(case.gamma_TS), torch.from_numpy(a)
    w = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([w], lr=1e-4)
    for _ in range(2000):
        optimiser.zero_grad()
        loss = -(start @ (gamma @ w)) / w.sum()
        loss.backward()
        optimiser.step()
        if float(w.detach().min()) < smallest:
            break
    return w.detach().numpy()


def equal_moves(case: Case, sign_S: np.ndarray) -> np.ndarray:
    """Move as much as the trust region allows, in equal parts per category, within supplies."""
    room_up = np.where(sign_S > 0, case.supply_S - case.base_S, 0.0)
    room_down = np.where(sign_S < 0, case.base_S, 0.0)
    amount = min(MOVE * case.base_S.sum(), room_up.sum(), room_down.sum())
    return case.base_S + _level(room_up, amount) - _level(room_down, amount)


def _level(room_S: np.ndarray, amount: float) -> np.ndarray:
    """Equal parts of ``amount``, each at most its room."""
    low, high = 0.0, float(room_S.max(initial=0.0))
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if np.minimum(room_S, middle).sum() > amount else (middle, high)
    return np.minimum(room_S, low)


def exponentiated_gradient(case: Case) -> np.ndarray:
    """p <- p exp(eta s) / Z for 100 rounds, then as far along that direction as limits allow."""
    p = case.beta.copy()
    score = case.beta @ case.gamma_TS
    score = (score - score.mean()) / (np.abs(score - score.mean()).max() or 1.0)
    for _ in range(100):
        p = p * np.exp(0.05 * score)
        p = p / p.sum()
    direction = p * case.base_S.sum() - case.base_S
    step = 1.0
    up, down = direction > 0, direction < 0
    room = case.supply_S - case.base_S
    step = min(step, float((room[up] / direction[up]).min(initial=1.0)))
    step = min(step, float((case.base_S[down] / -direction[down]).min(initial=1.0)))
    step = min(step, MOVE * case.base_S.sum() / max(float(direction[up].sum()), 1e-300))
    if case.floors is not None:
        change = case.gamma_TS @ direction
        falls = change < 0
        step = min(step, float((case.floors[falls] / -change[falls]).min(initial=1.0)))
    return case.base_S + step * direction


METHODS: dict[str, Callable[[Case], np.ndarray]] = {
    "instructmix": ours,
    "scipy linprog (HiGHS)": scipy_linprog,
    "cvxpy (default solver)": cvxpy_model,
    "exponentiated gradient": exponentiated_gradient,
    "paper's Adam (numpy)": lambda case: adam_signs(case, torch_autograd=False),
    "paper's Adam (torch)": lambda case: adam_signs(case, torch_autograd=True),
}
LARGEST = {
    "cvxpy (default solver)": {"guarded": 300, "free": 10_000},
    "scipy linprog (HiGHS)": {"guarded": 1_000, "free": 10_000},
    "paper's Adam (numpy)": {"guarded": 1_000, "free": 1_000},
    "paper's Adam (torch)": {"guarded": 1_000, "free": 1_000},
}
"""Sizes beyond which a method takes minutes."""
