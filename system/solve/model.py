"""From problem and options to arrays: base mix, room to move, limits in the user's own words.

``w = w0 + u - v``: ``u`` examples added, ``v`` removed. Columns of every program: ``u`` [S],
``v`` [S], then whatever an objective needs. Source: arXiv 2409.07045, section 3; trust region,
guards and caps are ours, without them the optimum is one single category.
"""

from dataclasses import dataclass

import numpy as np

from system.errors import ConfigError, DataError
from system.solve.basemix import integer_base, scaled_base
from system.solve.curves import Curve, CurvedEffects, build_curve
from system.solve.effects import Effects
from system.solve.problem import MixOptions, MixProblem
from system.solve.program import Program


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """A group limit with its members resolved."""

    name: str
    members: np.ndarray
    """Indices of categories."""
    lower: float
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """Everything the solvers need, in examples (or tokens, where it says so)."""

    problem: MixProblem
    options: MixOptions
    effects: Effects
    budget: float
    """In ``options.unit``."""
    length_S: np.ndarray
    """[S] budget units per example: 1, or tokens."""
    base_S: np.ndarray
    """[S] w0: counts scaled and clipped so that they spend the budget."""
    lower_S: np.ndarray
    """[S] least count."""
    ceiling_S: np.ndarray
    """[S] greatest count: upper limit and supply together; may be inf."""
    is_supply_S: np.ndarray
    """[S] bool: the ceiling is the supply, not the upper limit."""
    cap_S: np.ndarray
    """[S] most examples a category may move; may be inf."""
    up_S: np.ndarray
    """[S] upper bound of u."""
    down_S: np.ndarray
    """[S] upper bound of v."""
    base_effect_T: np.ndarray
    guard_T: np.ndarray
    """[T] nats that may be lost; inf: unguarded."""
    groups: tuple[Group, ...]
    score_add_S: np.ndarray
    """[S] importance-weighted, pessimistic where the objective is."""
    score_remove_S: np.ndarray
    move_budget: float
    """Trust region in budget units."""
    unspent: float
    """Budget units that may stay unspent: less than the longest example, for whole examples."""
    must_remove_S: np.ndarray
    """[S] lower bound of v: all of a category that was closed."""
    curve: Curve | None = None
    """Several doses (``concave``): solved segment by segment (``segments.py``)."""

    @property
    def num_sources(self) -> int:
        """S."""
        return len(self.problem.categories)

    @property
    def unit(self) -> float:
        """Column scale: a power of two near a thousandth of the budget, in examples."""
        if self.options.integer:
            return 1.0
        examples = max(float(self.base_S.sum()), 1e-9)
        return float(np.exp2(np.floor(np.log2(examples / 1024.0))))

    def split(self, x_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(u, v)`` of a point, netted so that nothing is added and removed at once."""
        S = self.num_sources
        move_S = x_C[:S] - x_C[S : 2 * S]
        return np.maximum(move_S, 0.0), np.maximum(-move_S, 0.0)

    def zeros(self) -> np.ndarray:
        """[S] zeros."""
        return np.zeros(self.num_sources)


def build_model(problem: MixProblem, options: MixOptions) -> Model:
    """Resolve defaults and check what problem and options must agree on.

    Raises:
        ConfigError, DataError: options that the problem cannot serve.
        InfeasibleMixError: the budget does not fit between the lower and upper limits.
    """
    _check_agreement(problem, options)
    length_S = np.ones(len(problem.categories))
    if options.unit == "tokens":
        assert problem.tokens_S is not None
        length_S = problem.tokens_S
    whole = float(length_S @ problem.base_S)
    budget = whole if options.budget is None else float(options.budget)
    infinite_S = np.full(len(length_S), np.inf)
    lower_S = np.zeros(len(length_S)) if problem.lower_S is None else problem.lower_S
    upper_S = infinite_S if problem.upper_S is None else problem.upper_S
    supply_S = infinite_S if problem.supply_S is None else problem.supply_S * options.max_epochs
    cap_S = infinite_S if problem.cap_S is None else problem.cap_S
    if options.cap is not None:
        cap_S = np.minimum(cap_S, options.cap * budget / length_S)
    ceiling_S = np.minimum(upper_S, supply_S)
    make_base = integer_base if options.integer else scaled_base
    if options.integer:
        # What whole examples can reach of a fractional limit.
        lower_S, ceiling_S = np.ceil(lower_S - 1e-9), np.floor(ceiling_S + 1e-9)
        cap_S = np.floor(cap_S + 1e-9)
    base_S = make_base(
        problem, lower_S=lower_S, ceiling_S=ceiling_S, length_S=length_S, budget=budget
    )
    curve, effects = _effects(problem, options)
    base_effect_T = effects.base_effect(base_S)
    score_add_S, score_remove_S = effects.score(problem.importance_T)
    # A bound that never binds (no mix holds twice the budget of one category) keeps every column
    # boxed, which the dual simplex needs to start without a first phase.
    never_S = np.ceil(2.0 * budget / length_S)
    return Model(
        problem=problem,
        options=options,
        effects=effects,
        budget=budget,
        length_S=length_S,
        base_S=base_S,
        lower_S=lower_S,
        ceiling_S=ceiling_S,
        is_supply_S=supply_S <= upper_S,
        cap_S=cap_S,
        up_S=np.maximum(np.minimum(np.minimum(ceiling_S - base_S, cap_S), never_S), 0.0),
        down_S=np.maximum(np.minimum(base_S - lower_S, cap_S), 0.0),
        base_effect_T=base_effect_T,
        guard_T=_guards(problem, options, base_effect_T),
        groups=_groups(problem, options),
        score_add_S=score_add_S,
        score_remove_S=score_remove_S,
        move_budget=options.move * budget,
        # Whole examples rarely add up to a token budget.
        unspent=float(length_S.max()) * (1.0 - 1e-6) if options.integer else 0.0,
        must_remove_S=np.zeros(len(base_S)),
        curve=curve,
    )


def _effects(problem: MixProblem, options: MixOptions) -> tuple[Curve | None, Effects]:
    curve = build_curve(problem, options)
    if curve is None:
        return None, Effects(problem, options)
    return curve, CurvedEffects(problem, options, curve)


def new_program(
    model: Model,
    *,
    cost_C: np.ndarray,
    extra_upper: np.ndarray | None = None,
    extra_lower: np.ndarray | None = None,
    extra_unit: np.ndarray | None = None,
) -> Program:
    """Columns ``u, v`` and the extras, with the rows that every objective shares."""
    none = np.zeros(0)
    extra_upper = none if extra_upper is None else extra_upper
    extra_lower = np.zeros(len(extra_upper)) if extra_lower is None else extra_lower
    extra_unit = np.ones(len(extra_upper)) if extra_unit is None else extra_unit
    S = model.num_sources
    is_integer_C = None
    if model.options.integer:
        is_integer_C = np.r_[np.ones(2 * S, bool), np.zeros(len(extra_upper), bool)]
    program = Program(
        cost_C=cost_C,
        lower_C=np.r_[np.zeros(S), model.must_remove_S, extra_lower],
        upper_C=np.r_[model.up_S, model.down_S, extra_upper],
        unit_C=np.r_[np.full(2 * S, model.unit), extra_unit],
        is_integer_C=is_integer_C,
        gap=model.options.mip_gap,
    )
    labels, rows, lower, upper = shared_rows(model)
    padded = np.zeros((len(rows), len(cost_C)))
    padded[:, : 2 * S] = rows
    program.add_rows(labels, padded, lower, upper)
    return program


def shared_rows(
    model: Model,
) -> tuple[list[tuple[str, ...]], np.ndarray, np.ndarray, np.ndarray]:
    """Budget, trust region and groups as rows over ``(u, v)``: labels, rows, lower, upper."""
    S, length_S = model.num_sources, model.length_S
    rows = [np.r_[length_S, -length_S], np.r_[length_S, np.zeros(S)]]
    labels: list[tuple[str, ...]] = [("budget",), ("move",)]
    spent = float(length_S @ model.base_S)
    slack = model.budget - spent
    if abs(slack) <= 1e-12 * model.budget:
        slack = 0.0
    lower, upper = [slack - model.unspent, -np.inf], [slack, model.move_budget]
    for group in model.groups:
        row = np.zeros(2 * S)
        row[group.members], row[S + group.members] = 1.0, -1.0
        held = float(model.base_S[group.members].sum())
        rows.append(row)
        labels.append(("group", group.name))
        lower.append(group.lower - held if group.lower > 0 else -np.inf)
        upper.append(group.upper - held)
    return labels, np.array(rows), np.array(lower), np.array(upper)


def _check_agreement(problem: MixProblem, options: MixOptions) -> None:
    if options.unit == "tokens" and problem.tokens_S is None:
        raise ConfigError(
            "a budget in tokens needs the mean tokens per example of every category; give them "
            "(column 'tokens' of the base table) or use unit: examples"
        )
    if options.objective == "concave" and problem.effect_remove_TS is None:
        raise ConfigError(
            "objective 'concave' needs the effect of removing as well as of adding, but only one "
            "matrix was given; give the remove matrix or use objective 'linear'"
        )
    if options.objective == "robust" and problem.se_TS is None:
        raise ConfigError(
            "objective 'robust' needs the standard error of every effect, but none were given; "
            "give the table of standard errors or use another objective"
        )


def _guards(problem: MixProblem, options: MixOptions, base_effect_T: np.ndarray) -> np.ndarray:
    guard_T = np.full(len(problem.targets), np.inf)
    if options.guard is not None:
        guard_T = options.guard * np.abs(base_effect_T)
    elif options.guard_nats is not None:
        guard_T = np.full(len(problem.targets), options.guard_nats)
    return guard_T if problem.guard_T is None else np.minimum(guard_T, problem.guard_T)


def _groups(problem: MixProblem, options: MixOptions) -> tuple[Group, ...]:
    column = {name: j for j, name in enumerate(problem.categories)}
    groups = []
    for limit in options.groups:
        if limit.members is not None:
            unknown = [name for name in limit.members if name not in column]
            members = [column[name] for name in limit.members if name in column]
        else:
            unknown = []
            members = [j for j, name in enumerate(problem.group_S or ()) if name == limit.name]
        if unknown or not members:
            known = sorted({g for g in problem.group_S or () if g})
            raise DataError(
                f"the limit of group {limit.name!r} names "
                + (f"unknown categories {unknown}" if unknown else "no category")
                + f"; known categories: {list(problem.categories)[:8]}, known groups: {known[:8]}"
            )
        groups.append(
            Group(
                name=limit.name,
                members=np.array(sorted(set(members))),
                lower=limit.lower,
                upper=limit.upper,
            )
        )
    return tuple(groups)
