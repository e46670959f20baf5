"""From a solved point to the record that users read."""

import time

import numpy as np

from system.solve.explain import Prices, Ranges
from system.solve.highs import Solver
from system.solve.mix import (
    At,
    CategoryMix,
    GroupMix,
    Mix,
    Relaxation,
    SolverInfo,
    TargetMix,
)
from system.solve.model import Model
from system.solve.objectives import Outcome
from system.solve.verify import check_limits


def assemble_mix(model: Model, outcome: Outcome, *, start: float) -> Mix:
    """The ``Mix`` of an outcome; ``start`` is the ``perf_counter`` at which work began.

    Raises:
        StageError: the point breaks a limit.
    """
    problem, options = model.problem, model.options
    prices, ranges = outcome.prices, outcome.ranges
    u_S, v_S = model.split(outcome.x_C)
    count_S = _counts(model, u_S, v_S)
    check_limits(model, u_S, v_S, count_S)
    change_T = model.effects.change(u_S, v_S, nominal=True)
    base_objective = 0.0
    if options.objective != "max-min":
        base_objective = float(problem.importance_T @ model.base_effect_T)
    expected_gain = float(problem.importance_T @ change_T)
    return Mix(
        status="optimal" if outcome.is_proven else "feasible",
        kind=options.objective,
        objective=base_objective + outcome.gain,
        base_objective=base_objective,
        gain=outcome.gain,
        expected_gain=expected_gain,
        expected_gain_se=gain_error(model, u_S, v_S),
        budget=model.budget,
        unit=options.unit,
        move=options.move,
        moved=float(model.length_S @ u_S) / model.budget,
        categories=_categories(model, count_S, prices, ranges),
        targets=_targets(model, u_S, v_S, change_T, prices),
        groups=_group_records(model, count_S, prices),
        move_price=None if prices is None else prices.move,
        budget_price=None if prices is None else prices.budget,
        solver=SolverInfo(
            name="HiGHS",
            version=Solver.version(),
            seconds=time.perf_counter() - start,
            iterations=outcome.iterations,
            rows=outcome.rows,
            gap=outcome.gap,
        ),
        relaxation=_relaxation(model, outcome),
        notes=_notes(model, u_S),
    )


def _relaxation(model: Model, outcome: Outcome) -> Relaxation | None:
    if outcome.relaxed_prices is None:
        return None
    prices, problem = outcome.relaxed_prices, model.problem
    # What stops u is the nearer of supply and cap; only the supply's price is one of supply.
    is_stock_S = model.is_supply_S & (model.ceiling_S <= model.base_S + model.cap_S)
    ceiling_S = _ceiling_prices(model, prices)
    value_S = np.where(is_stock_S, ceiling_S, 0.0) * model.options.max_epochs
    limit_S = np.maximum(ceiling_S, np.maximum(prices.reduced_remove_S, 0.0))
    return Relaxation(
        gain=outcome.relaxed_gain,
        move_price=prices.move,
        budget_price=prices.budget,
        supply_prices=dict(zip(problem.categories, value_S.tolist(), strict=True)),
        limit_prices=dict(zip(problem.categories, limit_S.tolist(), strict=True)),
        guard_prices=dict(zip(problem.targets, prices.guard_T.tolist(), strict=True)),
    )


def _ceiling_prices(model: Model, prices: Prices) -> np.ndarray:
    """[S] gain per example by which a ceiling rises.

    A ceiling below the base is the least that must be removed, so its price is that of less of it.
    """
    is_forced_S = model.must_remove_S > 0
    return np.maximum(np.where(is_forced_S, -prices.reduced_remove_S, prices.reduced_add_S), 0.0)


def gain_error(model: Model, u_S: np.ndarray, v_S: np.ndarray) -> float | None:
    """Standard error of the expected gain: sources independent, one source's errors in step.

    One run measures a source on all targets at once, so its errors across targets add up rather
    than average out: ``sqrt(sum_j (sum_i beta_i se_ij (u_j + v_j))^2)``.
    """
    se_TS = model.problem.se_TS
    if se_TS is None:
        return None
    weight_T = model.problem.importance_T
    remove_TS = model.problem.se_remove_TS
    moved_S = (weight_T @ se_TS) * u_S
    moved_S = moved_S + (weight_T @ (se_TS if remove_TS is None else remove_TS)) * v_S
    return float(np.sqrt(moved_S @ moved_S))


def _counts(model: Model, u_S: np.ndarray, v_S: np.ndarray) -> np.ndarray:
    """[S] counts; those at a bound are exactly the bound."""
    count_S = model.base_S + u_S - v_S
    count_S = np.where((u_S == 0) & (v_S == 0), model.base_S, count_S)
    at_ceiling = (u_S > 0) & (u_S == model.up_S) & (model.ceiling_S <= model.base_S + model.cap_S)
    at_lower = (v_S > 0) & (v_S == model.down_S) & (model.lower_S >= model.base_S - model.cap_S)
    count_S = np.where(at_ceiling, np.minimum(model.ceiling_S, count_S), count_S)
    return np.where(at_lower, model.lower_S, count_S) + 0.0


def _places(model: Model, count_S: np.ndarray) -> list[At]:
    """[S] what holds each count: the first of ceiling, lower limit, base, cap that it is at."""
    near = 1e-9 * max(float(model.base_S.sum()), 1.0)
    with np.errstate(invalid="ignore"):
        at_ceiling_S = np.abs(count_S - model.ceiling_S) <= near
        at_cap_S = np.abs(np.abs(count_S - model.base_S) - model.cap_S) <= near
    names = np.select(
        [
            at_ceiling_S & model.is_supply_S,
            at_ceiling_S,
            np.abs(count_S - model.lower_S) <= near,
            np.abs(count_S - model.base_S) <= near,
            at_cap_S,
        ],
        ["supply", "upper", "lower", "base", "cap"],
        "free",
    )
    return names.tolist()


def _categories(
    model: Model, count_S: np.ndarray, prices: Prices | None, ranges: Ranges | None
) -> tuple[CategoryMix, ...]:
    weight_S = model.length_S * count_S
    share_S = weight_S / weight_S.sum() if weight_S.sum() > 0 else weight_S
    epochs = model.options.max_epochs
    records, places = [], _places(model, count_S)
    ceiling_S = None if prices is None else _ceiling_prices(model, prices)
    for j, name in enumerate(model.problem.categories):
        at = places[j]
        reduced = supply = limit = None
        if prices is not None and ceiling_S is not None:
            up, down = float(prices.reduced_add_S[j]), float(prices.reduced_remove_S[j])
            is_below = count_S[j] < model.base_S[j] or (at == "lower" and down > 0)
            reduced = (-down if is_below else up) + 0.0
            limit = 0.0
            if at in ("supply", "upper"):
                limit = float(ceiling_S[j])
            elif at in ("lower", "cap"):
                limit = max(down if is_below or at == "lower" else up, 0.0)
            supply = limit * epochs if at == "supply" else 0.0
        low = high = supply_low = supply_high = None
        score = float(model.score_add_S[j])
        if ranges is not None:
            low = _end(score - ranges.score_down_S[j])
            high = _end(score + ranges.score_up_S[j])
            supply_S = model.problem.supply_S
            if at == "supply":
                stock = float(model.ceiling_S[j]) / epochs
                supply_low = _end(max(stock - ranges.bound_down_S[j] / epochs, 0.0))
                supply_high = _end(stock + ranges.bound_up_S[j] / epochs)
            elif supply_S is not None and np.isfinite(supply_S[j]):
                supply_low = float(count_S[j]) / epochs
        records.append(
            CategoryMix(
                category=name,
                base=float(model.base_S[j]),
                count=float(count_S[j]),
                share=float(share_S[j]),
                reduced_cost=reduced,
                supply_price=supply,
                at=at,
                limit_price=limit,
                score=score,
                score_low=low,
                score_high=high,
                supply_low=supply_low,
                supply_high=supply_high,
            )
        )
    return tuple(records)


def _end(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _targets(
    model: Model,
    u_S: np.ndarray,
    v_S: np.ndarray,
    change_T: np.ndarray,
    prices: Prices | None,
) -> tuple[TargetMix, ...]:
    problem = model.problem
    se_T = None
    if problem.se_TS is not None:
        remove_TS = problem.se_TS if problem.se_remove_TS is None else problem.se_remove_TS
        se_T = np.sqrt(problem.se_TS**2 @ u_S**2 + remove_TS**2 @ v_S**2)
    return tuple(
        TargetMix(
            target=name,
            base_effect=float(model.base_effect_T[i]),
            effect=float(model.base_effect_T[i] + change_T[i]),
            guard_price=None if prices is None else float(prices.guard_T[i]),
            change=float(change_T[i]),
            change_se=None if se_T is None else float(se_T[i]),
            guard=_end(model.guard_T[i]),
            importance=float(problem.importance_T[i]),
        )
        for i, name in enumerate(problem.targets)
    )


def _group_records(
    model: Model, count_S: np.ndarray, prices: Prices | None
) -> tuple[GroupMix, ...]:
    return tuple(
        GroupMix(
            group=group.name,
            count=float(count_S[group.members].sum()),
            lower=group.lower,
            upper=_end(group.upper),
            price=None if prices is None else float(prices.group_G[g]),
        )
        for g, group in enumerate(model.groups)
    )


def _notes(model: Model, u_S: np.ndarray) -> tuple[str, ...]:
    problem, notes = model.problem, []
    if problem.identifiable_TS is not None and not problem.identifiable_TS.all():
        missing = int((~problem.identifiable_TS).sum())
        notes.append(
            f"{missing} of {problem.identifiable_TS.size} effects were not identifiable and count "
            "as zero"
        )
    if problem.effect_remove_TS is not None and model.options.objective == "linear":
        notes.append(
            "the effects of adding and of removing were pooled into one matrix, since the linear "
            "objective knows one; objective 'concave' uses both"
        )
    if model.curve is not None:
        notes.append(model.curve.note)
    if model.effects.num_projected:
        notes.append(
            f"{model.effects.num_projected} effects had adding above removing and were set to "
            "their pooled value, so that nothing is added and removed at once"
        )
    silent = [t for t, b in zip(problem.targets, problem.importance_T, strict=True) if b == 0]
    if silent:
        notes.append(
            f"{len(silent)} targets have importance 0 and only count through their guards: "
            + ", ".join(silent[:5])
        )
    if not (model.up_S > 0).any() or not (model.down_S > 0).any():
        notes.append(
            "no category has room to move: the budget takes the whole supply or the limits fix "
            "every count; the mix is the base mix"
        )
    elif not u_S.any():
        notes.append("no move within the limits improves the objective; the mix is the base mix")
    return tuple(notes)
