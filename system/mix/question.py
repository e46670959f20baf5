"""Builds the optimisation problem of a run from the effect matrix and the user's limits.

The optimiser (`system.solve`) does not know runs, so this module provides the data.  The supply is
the number of train rows.  The base mix has the shares of the train split, equal shares, or the
user's weights.  Effects come from the influence stage, raw or shrunken.  It also prepares effects
for the taxonomy and the counts of control arms.
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
"""Shares of the budget for which the report shows the predicted gain, plus the configured one."""


def mix_problem(
    solve: SolveConfig,
    matrices: Mapping[str, EffectMatrix],
    counts: Mapping[str, int],
    tokens: Mapping[str, float] | None,
    levels: Mapping[str, Sequence[EffectMatrix]] | None = None,
) -> MixProblem:
    """Builds the optimisation problem.

    Args:
        solve: the limits.
        matrices: by direction (`add`, `remove`); a single one is used for both.
        counts: train rows of each category: the supply and the natural base mix.
        tokens: mean response tokens of an example by category, if the budget is in tokens.
        levels: with several doses: direction -> matrices, ascending; they are the break points of
            objective `concave`.

    Raises:
        ConfigError: a limit or a weight names an unknown category or target.
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
    """The curves of objective `concave`; none with one dose, or with gamma, which is not a slope.

    If only one direction was measured, the other side continues with the slope next to the base,
    which is that of the smallest dose.
    """
    is_curved = any(len(matrices) > 1 for matrices in levels.values())
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
    """Checks that some mix satisfies the limits, before hours are spent on measuring effects.

    Guards are not checked: they depend on effects, and the base mix always satisfies them.

    Raises:
        InfeasibleMixError: limits conflict; the message names them and the smallest relaxation.
        ConfigError: a limit names an unknown category.
    """
    solve_mix(*_without_effects(solve, counts, tokens))


def largest_moves(
    solve: SolveConfig, counts: Mapping[str, int], tokens: Mapping[str, float] | None
) -> dict[str, np.ndarray]:
    """Direction -> [S] largest move from the base, in examples, that the limits allow a category.

    Groups and guards are ignored, because they restrict several categories together.

    Args:
        solve: the limits.
        counts: train rows of each category: the supply and the natural base mix.
        tokens: mean response tokens of an example by category, if the budget is in tokens.

    Raises:
        InfeasibleMixError: the budget does not fit between the limits.
        ConfigError: a limit names an unknown category.
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
    """The counts of a control mix, in whole examples with the same budget as the solved mix.

    Args:
        solve: the budget and the limits.
        name: `natural` respects the lower and upper limits, as a base mix does; `uniform` is as
            equal as the supply allows.
        counts: train rows of each category.
        tokens: mean response tokens of an example by category, if the budget is in tokens.

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
    """The problem before effects are measured: all effects are zero, and there are no guards."""
    categories = tuple(counts)
    nothing = np.zeros((len(categories), len(categories)))
    problem = _problem(solve, categories, categories, counts, tokens, nothing, nothing)
    unguarded = solve.model_copy(
        update={"objective": "linear", "guard": None, "guard_nats": None, "importance": "uniform"}
    )
    return problem, mix_options(unguarded, is_believed=True)


def mix_options(solve: SolveConfig, *, is_believed: bool) -> MixOptions:
    """The user's options; with a matrix that is not believed, no move from the base is allowed."""
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
    for name, bounds in (("solve.lower", solve.lower), ("solve.upper", solve.upper)):
        _check_names(name, bounds, categories)
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
    """The effects between categories for the taxonomy: the mean over directions.

    Returns:
        Categories; effects [C, C] in nats per response token per example; their standard errors;
        their degrees of freedom (the minimum over directions).
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
    """[S] weights of the base mix, not scaled to the budget.

    Args:
        solve: its setting `base` is used.
        categories: in the order of the result.
        counts: train rows of each category.

    Raises:
        ConfigError: a weight names an unknown category, or no weight is above zero.
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
    """Effects (or gamma) and their standard errors, as `solve` selects them."""
    if solve.matrix == "gamma":
        # A 95 % interval is about four standard errors wide.
        width = (matrix.gamma_high_TS - matrix.gamma_low_TS) / 4.0
        return np.nan_to_num(matrix.gamma_TS), np.nan_to_num(width)
    if solve.shrinkage:
        return matrix.shrunk_TS, matrix.shrunk_se_TS
    return matrix.effect_TS, matrix.effect_se_TS


def _usable(add: EffectMatrix, remove: EffectMatrix, solve: SolveConfig) -> np.ndarray | None:
    """Which entries may be used: all effects in nats (None), but only identifiable gammas."""
    if solve.matrix == "gamma":
        return add.identifiable_TS & remove.identifiable_TS
    return None


def importance_weights(
    solve: SolveConfig, targets: tuple[str, ...], counts: Mapping[str, int]
) -> np.ndarray:
    """[T] importance of the targets, with sum one, as `MixProblem` uses it.

    Args:
        solve: its settings `importance` and `base` are used.
        targets: in the order of the matrix.
        counts: train rows of each category.

    Raises:
        ConfigError: a weight names an unknown target.
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
    # Normalised, so that a gain is a weighted mean over targets for weights of any scale.
    return weight_T / weight_T.sum() if weight_T.sum() > 0 else weight_T


def _per_category(
    values: Mapping[str, float], names: tuple[str, ...], default: float
) -> np.ndarray:
    return np.array([values.get(name, default) for name in names], dtype=np.float64)


def _check_names(where: str, names: Any, valid_names: tuple[str, ...]) -> None:
    unknown = sorted(set(names) - set(valid_names))
    if unknown:
        raise ConfigError(f"{where} names {unknown}, but there are only {sorted(valid_names)}")
