"""From a measured matrix and the user's limits to the optimiser's question, and to the order.

The optimiser (`system.solve`) knows nothing of runs; this module fills in what a run knows: the
supply is what the train split holds, the base mix its shares (or equal ones, or the user's),
effects come from the influence stage, raw or shrunken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from system.config import SolveConfig
from system.errors import ConfigError
from system.influence.estimate.matrix import EffectMatrix
from system.solve import GroupLimit, MixOptions, MixProblem, solve_mix
from system.solve.model import build_model
from system.solve.problem import DoseCurve

SWEEP_MOVES = (0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Shares of the budget whose predicted gain the report shows, beside the configured share."""


def mix_problem(
    solve: SolveConfig,
    matrices: Mapping[str, EffectMatrix],
    counts: Mapping[str, int],
    tokens: Mapping[str, float] | None,
    levels: Mapping[str, Sequence[EffectMatrix]] | None = None,
) -> MixProblem:
    """The optimiser's question.

    Args:
        solve: the limits.
        matrices: by direction (`add`, `remove`); with one, it serves both.
        counts: train rows of each category: supply, and natural base.
        tokens: mean response tokens of an example of each category, where the budget is in tokens.
        levels: several doses, by direction and ascending: break points of objective `concave`.

    Raises:
        ConfigError: a limit or a weight names no category or target.
    """
    add = matrices.get("add", matrices.get("remove"))
    remove = matrices.get("remove", matrices.get("add"))
    assert add is not None and remove is not None, "the influence stage measures one direction"
    add_TS, se_add_TS = _values(add, solve)
    remove_TS, se_remove_TS = _values(remove, solve)
    return _problem(
        solve,
        add.sources,
        add.targets,
        counts,
        tokens,
        add_TS,
        remove_TS,
        se_TS=se_add_TS,
        se_remove_TS=se_remove_TS,
        identifiable_TS=_usable(add, remove, solve),
        importance_T=_importance(solve, add.targets),
        **_curves(solve, levels or {}),
    )


def _curves(
    solve: SolveConfig, levels: Mapping[str, Sequence[EffectMatrix]]
) -> dict[str, DoseCurve]:
    """The curves of objective `concave`; none for one dose, or for gamma, which is no slope.

    Where one direction was measured, the other side goes on with the slope next to the base, that
    of the smallest dose.
    """
    is_curved = any(len(found) > 1 for found in levels.values())
    if solve.objective != "concave" or solve.matrix == "gamma" or not is_curved:
        return {}
    either = next(iter(levels.values()))
    return {
        f"curve_{direction}": _curve(levels.get(direction, either[:1]), solve)
        for direction in ("add", "remove")
    }


def _curve(levels: Sequence[EffectMatrix], solve: SolveConfig) -> DoseCurve:
    values = [_values(matrix, solve) for matrix in levels]
    return DoseCurve(
        dose_KS=np.stack([matrix.dose_S for matrix in levels]),
        effect_KTS=np.stack([effect_TS for effect_TS, _ in values]),
        se_KTS=np.stack([se_TS for _, se_TS in values]),
    )


def check_limits(
    solve: SolveConfig, counts: Mapping[str, int], tokens: Mapping[str, float] | None
) -> None:
    """Whether any mix satisfies the limits, before hours are spent on measuring effects.

    Guards are left out: without effects nothing is known of them, and the base mix keeps them.

    Raises:
        InfeasibleMixError: names the limits that conflict and the smallest relaxation.
        ConfigError: a limit names no category.
    """
    solve_mix(*_without_effects(solve, counts, tokens))


def largest_moves(
    solve: SolveConfig, counts: Mapping[str, int], tokens: Mapping[str, float] | None
) -> dict[str, np.ndarray]:
    """Direction -> [S] most examples by which the limits let each category move from the base.

    Groups and guards, which bind several categories at once, are left out.

    Args:
        solve: the limits.
        counts: train rows of each category: supply, and natural base.
        tokens: mean response tokens of an example of each category, where the budget is in tokens.

    Raises:
        InfeasibleMixError: the budget does not fit between the limits.
        ConfigError: a limit names no category.
    """
    model = build_model(*_without_effects(solve, counts, tokens))
    moved_S = model.move_budget / model.length_S
    return {
        "add": np.minimum(model.up_S, moved_S),
        "remove": np.minimum(model.down_S, moved_S),
    }


def control_counts(
    solve: SolveConfig,
    name: Literal["natural", "uniform"],
    counts: Mapping[str, int],
    tokens: Mapping[str, float] | None,
) -> dict[str, int]:
    """A mix that a solved one is compared with: whole examples that spend the same budget.

    Args:
        solve: the budget and the limits.  `natural` keeps the lower and upper limits, as a base mix
            does; `uniform` is as equal as supply allows.
        name: which.
        counts: train rows of each category.
        tokens: mean response tokens of an example of each category, where the budget is in tokens.

    Raises:
        InfeasibleMixError: the budget does not fit between the limits.
    """
    changes: dict[str, Any] = {"base": name, "groups": {}, "max_categories": None}
    if name == "uniform":
        changes |= {"lower": {}, "upper": {}}
    model = build_model(*_without_effects(solve.model_copy(update=changes), counts, tokens))
    return {category: round(count) for category, count in zip(counts, model.base_S, strict=True)}


def _without_effects(
    solve: SolveConfig, counts: Mapping[str, int], tokens: Mapping[str, float] | None
) -> tuple[MixProblem, MixOptions]:
    """The question as far as it is known before anything is measured; without guards."""
    categories = tuple(counts)
    nothing = np.zeros((len(categories), len(categories)))
    problem = _problem(solve, categories, categories, counts, tokens, nothing, nothing)
    unguarded = solve.model_copy(
        update={"objective": "linear", "guard": None, "guard_nats": None, "importance": "uniform"}
    )
    return problem, mix_options(unguarded, is_believed=True)


def mix_options(solve: SolveConfig, *, is_believed: bool) -> MixOptions:
    """The user's options; a matrix that does not agree with itself moves nothing."""
    return MixOptions(
        objective=solve.objective,
        budget=float(solve.budget),
        unit=solve.unit,
        max_epochs=solve.max_epochs,
        move=solve.move if is_believed else 0.0,
        guard=solve.guard,
        guard_nats=solve.guard_nats,
        integer=True,
        max_categories=solve.max_categories,
        mip_max_nodes=solve.mip_max_nodes,
        groups=tuple(
            GroupLimit(
                name=name,
                members=limit.categories,
                lower=limit.lower,
                upper=float("inf") if limit.upper is None else limit.upper,
            )
            for name, limit in solve.groups.items()
        ),
        radius=solve.robust_radius,
        uncertainty="box" if solve.robust_sources is None else "budget",
        sources_off=solve.robust_sources,
    )


def _problem(
    solve: SolveConfig,
    categories: tuple[str, ...],
    targets: tuple[str, ...],
    counts: Mapping[str, int],
    tokens: Mapping[str, float] | None,
    add_TS: np.ndarray,
    remove_TS: np.ndarray,
    **measured: Any,
) -> MixProblem:
    for name, given in (("solve.lower", solve.lower), ("solve.upper", solve.upper)):
        _check_names(name, given, categories)
    for group, limit in solve.groups.items():
        _check_names(f"solve.groups.{group}", limit.categories, categories)
    base_S = base_weights(solve, categories, counts)
    weights_S = base_S if tokens is None else base_S * _per_category(tokens, categories, 1.0)
    return MixProblem(
        categories=categories,
        targets=targets,
        base_S=base_S,
        effect_add_TS=add_TS,
        effect_remove_TS=remove_TS,
        supply_S=_per_category(counts, categories, 0.0),
        lower_S=_per_category(solve.lower, categories, 0.0) if solve.lower else None,
        upper_S=_per_category(solve.upper, categories, np.inf) if solve.upper else None,
        cap_S=solve.category_cap * base_S * (solve.budget / weights_S.sum()),
        tokens_S=None if tokens is None else _per_category(tokens, categories, 1.0),
        **measured,
    )


def dependency_effects(
    matrices: Mapping[str, EffectMatrix],
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Effects among categories for the taxonomy: mean over directions.

    Returns:
        Categories, effects [C, C] in nats per response token per example, their standard errors,
        and the degrees of freedom behind these (the fewest of the directions).
    """
    first = next(iter(matrices.values()))
    categories = tuple(name for name in first.sources if name in first.targets)
    rows = [first.targets.index(name) for name in categories]
    columns = [first.sources.index(name) for name in categories]
    grid = np.ix_(rows, columns)
    effects = np.mean([matrix.effect_TS[grid] for matrix in matrices.values()], axis=0)
    variances = [matrix.effect_se_TS[grid] ** 2 for matrix in matrices.values()]
    errors = np.sqrt(np.sum(variances, axis=0)) / len(variances)
    freedom = np.min([matrix.effect_df_TS[grid] for matrix in matrices.values()], axis=0)
    return categories, effects, errors, freedom


def base_weights(
    solve: SolveConfig, categories: tuple[str, ...], counts: Mapping[str, int]
) -> np.ndarray:
    """[S] weights of the base mix, not scaled.

    Args:
        solve: `base`.
        categories: in the order wanted.
        counts: train rows of each.

    Raises:
        ConfigError: a weight names no category, or none is above zero.
    """
    if solve.base == "natural":
        return _per_category(counts, categories, 0.0)
    if solve.base == "uniform":
        return np.ones(len(categories))
    _check_names("solve.base", solve.base, categories)
    weight_S = _per_category(solve.base, categories, 0.0)
    if not weight_S.any():
        raise ConfigError(f"solve.base {solve.base}: expected a weight above 0, found none")
    return weight_S


def _values(matrix: EffectMatrix, solve: SolveConfig) -> tuple[np.ndarray, np.ndarray]:
    if solve.matrix == "gamma":
        width = (matrix.gamma_high_TS - matrix.gamma_low_TS) / 4.0
        return np.nan_to_num(matrix.gamma_TS), np.nan_to_num(width)
    if solve.shrinkage:
        return matrix.shrunk_TS, matrix.shrunk_se_TS
    return matrix.effect_TS, matrix.effect_se_TS


def _usable(add: EffectMatrix, remove: EffectMatrix, solve: SolveConfig) -> np.ndarray | None:
    """Effects in nats are usable with their errors; gamma only where it is identifiable."""
    if solve.matrix == "gamma":
        return add.identifiable_TS & remove.identifiable_TS
    return None


def importance_weights(
    solve: SolveConfig, targets: tuple[str, ...], counts: Mapping[str, int]
) -> np.ndarray:
    """[T] weights by which a mix is judged, the sum is one; as `MixProblem` has them.

    Args:
        solve: `importance` and `base`.
        targets: in the matrix's order.
        counts: train rows of each category.

    Raises:
        ConfigError: a weight names no target.
    """
    weight_T = _importance(solve, targets)
    if weight_T is None:
        base = dict(zip(counts, base_weights(solve, tuple(counts), counts), strict=True))
        weight_T = _per_category(base, targets, 0.0)
    total = weight_T.sum()
    return weight_T / total if total > 0 else np.full(len(targets), 1.0 / len(targets))


def _importance(solve: SolveConfig, targets: tuple[str, ...]) -> np.ndarray | None:
    if solve.importance == "base":
        return None
    if solve.importance == "uniform":
        return np.full(len(targets), 1.0 / len(targets))
    _check_names("solve.importance", solve.importance, targets)
    weight_T = _per_category(solve.importance, targets, 0.0)
    # A gain is a mean over targets, whatever numbers the weights were given in.
    return weight_T / weight_T.sum() if weight_T.sum() > 0 else weight_T


def _per_category(
    values: Mapping[str, float], names: tuple[str, ...], default: float
) -> np.ndarray:
    return np.array([values.get(name, default) for name in names], dtype=np.float64)


def _check_names(where: str, given: Any, known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{where} names {unknown}, but there are only {sorted(known)}")
