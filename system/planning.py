"""From a measured matrix and the user's limits to the optimiser's question, and to the order.

The optimiser (`system.solve`) knows nothing of runs; this module fills in what a run knows: the
base mix is what the train split holds, the supply is the same, effects come from the influence
stage, raw or shrunken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from system.config import SolveConfig
from system.errors import ConfigError
from system.influence.estimators import FIRST_ORDER
from system.influence.matrix import EffectMatrix
from system.influence.summary import worth_agreement
from system.solve import GroupLimit, Mix, MixOptions, MixProblem, solve_mix
from system.solve.model import build_model
from system.solve.problem import DoseCurve

EXTRAPOLATES = 1.5
"""A move or a budget this many times what was measured is called an extrapolation."""
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
        counts: train rows of each category: base mix and supply.
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
        counts: train rows of each category: base mix and supply.
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
    base_S = np.array([counts[name] for name in categories], dtype=np.float64)
    weights_S = base_S if tokens is None else base_S * _per_category(tokens, categories, 1.0)
    return MixProblem(
        categories=categories,
        targets=targets,
        base_S=base_S,
        effect_add_TS=add_TS,
        effect_remove_TS=remove_TS,
        supply_S=base_S,
        lower_S=_per_category(solve.lower, categories, 0.0) if solve.lower else None,
        upper_S=_per_category(solve.upper, categories, np.inf) if solve.upper else None,
        cap_S=solve.category_cap * base_S * (solve.budget / weights_S.sum()),
        tokens_S=None if tokens is None else _per_category(tokens, categories, 1.0),
        **measured,
    )


def extrapolation_notes(
    mix: Mix, dose_S: Mapping[str, float], measured_rows: float
) -> tuple[str, ...]:
    """Where a mix leaves what was measured: moves beyond the doses, a budget beyond the runs.

    Effects are slopes, measured for a dose of each category on a base of a few hundred rows of it
    with the proxy model.  Returns diminish, so slopes promise too much beyond that.

    Args:
        mix: the solved mix.
        dose_S: category -> rows of its dose (the largest of the doses and directions).
        measured_rows: rows that a reference run of the influence stage trains on.
    """
    beyond = {
        item.category: abs(item.count - item.base) / dose_S[item.category]
        for item in mix.categories
        if abs(item.count - item.base) > EXTRAPOLATES * dose_S[item.category]
    }
    notes = []
    if beyond:
        farthest = max(beyond, key=lambda name: (beyond[name], name))
        notes.append(
            f"{len(beyond)} of {len(mix.categories)} categories move farther than the largest dose "
            f"at which their effects were measured, {farthest!r} {beyond[farthest]:.1f} times as "
            "far: there the predicted gain extrapolates and is likely to promise too much (raise "
            "influence.dose_rows and influence.rows_per_category, or lower solve.move)"
        )
    examples = sum(item.count for item in mix.categories)
    if examples > EXTRAPOLATES * measured_rows:
        notes.append(
            f"the mix has {examples / measured_rows:.1f} times the rows of a run of the influence "
            "stage: the order of the categories may hold at that size, the size of the gain will "
            "not (compare two sizes with `instructmix compare`)"
        )
    return tuple(notes)


def appended_notes(mix: Mix, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a mix rests on appended entries (`influence.append`); nothing where there are none.

    Args:
        mix: the solved mix.
        summary: of the influence stage.
    """
    append = summary.get("append")
    if append is None or not append["categories"]:
        return ()
    names = append["categories"]
    moved = [
        item.category
        for item in mix.categories
        if item.category in names and abs(item.count - item.base) >= 1
    ]
    how = f"of which the mix moves {', '.join(moved)}" if moved else "none of which the mix moves"
    return (
        f"effects of and on {', '.join(names)} ({how}) were appended: measured at an earlier base "
        "that has no rows of them; where much hangs on them, measure all categories at one base "
        "(influence.append: false)",
    )


def why_not_believed(summary: Mapping[str, Any]) -> str:
    """Why the mix stays at the base, or an empty text where the matrix may move it."""
    if summary["is_believed"]:
        return ""
    if summary["replications"] < 2:
        return (
            "the matrix has one replication, so nothing shows that it would come out the same "
            "again: the mix stays at the base (raise influence.replications)"
        )
    return (
        "independent halves of the matrix, scored on different held-out rows, agree less on the "
        f"worth of the categories than influence.min_agreement {summary['min_agreement']:g}: the "
        "mix stays at the base"
    )


def choose_shrinkage(
    solve: SolveConfig, summary: Mapping[str, Any]
) -> tuple[SolveConfig, tuple[str, ...]]:
    """`solve.shrinkage: auto` settled by what predicts better, and a note that says so.

    Args:
        solve: any setting; one that is not `auto` comes back as it is.
        summary: of the influence stage.
    """
    if solve.shrinkage != "auto" or solve.matrix == "gamma":
        return solve, ()
    found = [part["prediction"] for part in summary["directions"].values()]
    if any(prediction is None for prediction in found):
        return solve.model_copy(update={"shrinkage": True}), (
            "solved with shrunken effects: with one replication nothing tells whether they predict "
            "better than the raw ones",
        )
    raw, shrunk = (sum(prediction[name] for prediction in found) for name in ("raw", "shrunk"))
    is_shrunk = bool(shrunk <= raw)
    note = (
        f"solved with {'shrunken' if is_shrunk else 'raw'} effects: they predict a replication "
        "that was left out better (mean squared error "
        f"{min(raw, shrunk):.3g} against {max(raw, shrunk):.3g})"
    )
    return solve.model_copy(update={"shrinkage": is_shrunk}), (note,)


def evidence_notes(mix: Mix, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What a mix that was allowed to move is not known by; nothing where it stays at the base.

    Args:
        mix: the solved mix.
        summary: of the influence stage.
    """
    if not summary["is_believed"] or mix.moved == 0:
        return ()
    notes = []
    if worth_agreement(summary["directions"]) is None:
        notes.append(
            "whether the effects would come out the same again could not be checked (fewer than "
            "three categories, or all are worth the same): the mix moves by them unchecked"
        )
    if summary["estimator"] == "gradient":
        notes.append(
            f"{FIRST_ORDER}. On eight real categories their order had a rank correlation of 0 to "
            "0.3 with retraining, and own effects were 3 to 6 times too large: expect less than is "
            "predicted"
        )
    return tuple(notes)


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
        solve: `importance`.
        targets: in the matrix's order.
        counts: train rows of each category.

    Raises:
        ConfigError: a weight names no target.
    """
    weight_T = _importance(solve, targets)
    if weight_T is None:
        weight_T = _per_category(counts, targets, 0.0)
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
