"""Problems and independent answers for the tests of the optimiser.

The reference writes the limits down again, over counts ``w`` and moves ``u, v``, and gives them to
scipy; it shares no code with the package but the base mix and the resolved limits.
"""

import itertools
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import linprog

from system.solve import GroupLimit, MixOptions, MixProblem
from system.solve.model import Model, build_model

Question = tuple[MixProblem, MixOptions]


def named(count: int, prefix: str = "c") -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def problem(effect_TS, base_S, **fields) -> MixProblem:
    """A problem with names made up; square ones name targets after sources."""
    effect_TS = np.array(effect_TS, dtype=float)
    T, S = effect_TS.shape
    targets = named(S) if T == S else named(T, "t")
    fields = {"categories": named(S), "targets": targets} | fields
    return MixProblem(effect_add_TS=effect_TS, base_S=base_S, **fields)


@st.composite
def questions(draw, objectives=("linear", "max-min", "concave", "robust")):
    """A random problem and options; scales, ties, shapes and limits of every kind."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return random_question(rng, str(rng.choice(objectives)))


@st.composite
def feasible_questions(draw, objectives=("linear", "max-min", "concave", "robust")):
    """A random question that some mix satisfies: the solver may not call it infeasible."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return question_where(rng, str(rng.choice(objectives)), is_feasible)


def is_feasible(p: MixProblem, options: MixOptions) -> bool:
    """Whether scipy finds a mix within the limits."""
    return reference_gain(build_model(p, options)) is not None


def question_where(
    rng: np.random.Generator,
    objective: str,
    holds: Callable[[MixProblem, MixOptions], bool],
    change: Callable[[MixProblem, MixOptions], Question] | None = None,
) -> Question:
    """The first random question, changed by ``change``, for which ``holds`` is true."""
    for _ in range(500):
        p, options = random_question(rng, objective)
        if change is not None:
            p, options = change(p, options)
        if holds(p, options):
            return p, options
    raise AssertionError("500 random questions in a row were not of the kind that the test needs")


def random_question(rng: np.random.Generator, objective: str) -> Question:
    S = int(rng.integers(1, 7))
    T = S if rng.random() < 0.6 else int(rng.integers(1, 6))
    scale = float(rng.choice([1.0, 1e-6, 1e3]))
    whole = rng.random() < 0.3

    def table():
        values = rng.integers(-2, 3, (T, S)) if whole else rng.normal(0, 1, (T, S))
        return values * scale

    effect_TS, fields, options = table(), {}, {}
    base_S = rng.integers(0, 200, S).astype(float)
    base_S[rng.integers(S)] += 10
    if objective == "concave" or (objective != "linear" and rng.random() < 0.3):
        fields["effect_remove_TS"] = effect_TS + np.abs(table()) - 0.2 * np.abs(table())
    if objective == "robust":
        fields["se_TS"] = 0.3 * np.abs(table())
    if rng.random() < 0.4:
        fields["supply_S"] = base_S * rng.uniform(1, 2) + rng.integers(0, 3, S)
    if rng.random() < 0.3:
        fields["lower_S"] = base_S * rng.uniform(0, 0.9, S)
    if rng.random() < 0.3:
        fields["upper_S"] = base_S * rng.uniform(1, 1.5, S) + 1
    if rng.random() < 0.2:
        fields["identifiable_TS"] = rng.random((T, S)) < 0.8
    if rng.random() < 0.3:
        fields["tokens_S"] = rng.integers(10, 400, S).astype(float)
        options["unit"] = "tokens"
    if rng.random() < 0.4:
        options["guard"] = float(rng.choice([0.0, 0.01, 0.1]))
    elif rng.random() < 0.3:
        options["guard_nats"] = float(rng.choice([0.0, 1.0])) * scale
    if rng.random() < 0.3:
        options["cap"] = float(rng.uniform(0, 0.1))
    if rng.random() < 0.3 and S > 1:
        half = base_S[: S // 2].sum()
        options["groups"] = (
            GroupLimit(
                name="half",
                members=named(S)[: S // 2],
                lower=float(half * rng.uniform(0.5, 1.1)),
                upper=float(half * rng.uniform(1.1, 1.4) + 1),
            ),
        )
    move = float(rng.choice([0.0, 0.05, 0.1, 0.3, 1.0]))
    return problem(effect_TS, base_S, **fields), MixOptions(
        objective=objective, move=move, **options
    )


def slopes(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Add and remove slopes from their definition."""
    p, options = model.problem, model.options
    add, remove = p.effect_add_TS, p.effect_remove_TS
    remove = add if remove is None else remove
    if p.identifiable_TS is not None:
        add, remove = np.where(p.identifiable_TS, add, 0), np.where(p.identifiable_TS, remove, 0)
    mean = (add + remove) / 2
    crossed = add > remove
    add, remove = np.where(crossed, mean, add), np.where(crossed, mean, remove)
    if options.objective == "robust" and options.uncertainty == "box":
        off = options.radius * p.se_TS
        add, remove = add - off, remove + off
    return add, remove


def reference_gain(model: Model) -> float | None:
    """The best objective by scipy's linprog, or None when it finds no feasible point."""
    p, options = model.problem, model.options
    S, T = len(p.categories), len(p.targets)
    add, remove = slopes(model)
    # scipy's tolerances are absolute: hand it numbers of size 1.
    scale = max(np.abs(add).max(), np.abs(remove).max()) or 1.0
    add, remove = add / scale, remove / scale
    n = 3 * S + 1
    A, b, A_eq, b_eq = [], [], [np.r_[model.length_S, np.zeros(2 * S + 1)]], [model.budget]
    for j in range(S):
        row = np.zeros(n)
        row[[j, S + j, 2 * S + j]] = 1, -1, 1
        A_eq.append(row)
        b_eq.append(model.base_S[j])
    A.append(np.r_[np.zeros(S), model.length_S, np.zeros(S + 1)])
    b.append(options.move * model.budget)
    for group in model.groups:
        row = np.zeros(n)
        row[group.members] = 1
        A += [row, -row]
        b += [min(group.upper, 1e9), -group.lower]
    for i in range(T):
        row = np.r_[np.zeros(S), -add[i], remove[i], 0.0]
        if np.isfinite(model.guard_T[i]):
            A.append(row.copy())
            b.append(model.guard_T[i] / scale)
        if options.objective == "max-min" and p.importance_T[i] > 0:
            row[-1] = 1
            A.append(row)
            b.append(0.0)
    cost = np.zeros(n)
    if options.objective == "max-min":
        cost[-1] = -1
    else:
        cost[S : 2 * S], cost[2 * S : 3 * S] = -p.importance_T @ add, p.importance_T @ remove
    bounds = [(model.lower_S[j], min(model.ceiling_S[j], 1e9)) for j in range(S)]
    bounds += [(0, min(model.cap_S[j], 1e9)) for j in range(S)] * 2 + [(-1e7, 1e7)]
    answer = linprog(cost, A_ub=np.array(A), b_ub=b, A_eq=np.array(A_eq), b_eq=b_eq, bounds=bounds)
    return -answer.fun * scale if answer.status == 0 else None


def best_whole_gain(model: Model) -> float | None:
    """The best objective over all whole-number mixes, by trying every one of them."""
    options, p = model.options, model.problem
    add, remove = slopes(model)
    low = np.maximum(model.lower_S, np.ceil(model.base_S - model.cap_S))
    high = np.minimum(model.ceiling_S, np.floor(model.base_S + model.cap_S))
    high = np.minimum(high, model.budget / model.length_S)
    best = None
    ranges = [range(int(a), int(b) + 1) for a, b in zip(low, high, strict=True)]
    for counts in itertools.product(*ranges):
        w = np.array(counts, float)
        u, v = np.maximum(w - model.base_S, 0), np.maximum(model.base_S - w, 0)
        spent = model.length_S @ w
        if not model.budget - model.length_S.max() + 1e-9 < spent <= model.budget + 1e-9:
            continue
        if model.length_S @ u > options.move * model.budget + 1e-9:
            continue
        if options.max_categories is not None and (w > 0).sum() > options.max_categories:
            continue
        change = add @ u - remove @ v
        value = p.importance_T @ change
        if options.objective == "robust" and options.uncertainty == "budget":
            moved = options.radius * p.se_TS * (u + v)
            change = change - [_worst(row, options.sources_off) for row in moved]
            value -= _worst(p.importance_T @ moved, options.sources_off)
        if np.any(change < -model.guard_T - 1e-9):
            continue
        if options.objective == "max-min":
            value = change[p.importance_T > 0].min()
        best = value if best is None else max(best, value)
    return best


def _worst(losses: np.ndarray, count: float) -> float:
    """The ``count`` largest losses together, the last of them in part."""
    ranked = np.sort(losses)[::-1]
    whole = int(count)
    rest = (count - whole) * ranked[whole] if whole < len(ranked) else 0.0
    return float(ranked[:whole].sum() + rest)
