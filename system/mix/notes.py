"""Notes on a mix as text: how reliable its effects are, and where it extrapolates.

The solve stage puts them into `mix.json` and the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system.config import SolveConfig
from system.influence.design.estimators import FIRST_ORDER
from system.influence.estimate.summary import worth_agreement
from system.solve import Mix

EXTRAPOLATES = 1.5
"""A move or a budget above this multiple of the measured one is called an extrapolation."""


def extrapolation_notes(
    mix: Mix, dose_S: Mapping[str, float], measured_rows: float
) -> tuple[str, ...]:
    """Notes where a mix extrapolates: moves beyond the doses, or a budget beyond the runs.

    Effects are slopes: they were measured with the proxy model, for a dose of each category, on a
    base with a few hundred rows of it.  Returns diminish, so slopes predict too much beyond that.

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
            "far: there the predicted gain extrapolates and is probably too large (raise "
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


def base_notes(
    solve: SolveConfig, mix: Mix, rows_S: Mapping[str, float], supply_S: Mapping[str, float]
) -> tuple[str, ...]:
    """Notes on the base mix: which one it is, and how far it is from the mix that was measured.

    Args:
        solve: `base`.
        mix: the solved mix.
        rows_S: category -> rows of it that a reference run of the influence stage trains on.
        supply_S: category -> train rows.
    """
    notes = []
    if solve.base != "natural":
        natural = _apart(
            {item.category: item.base for item in mix.categories},
            {item.category: supply_S[item.category] for item in mix.categories},
        )
        what = "equal shares" if solve.base == "uniform" else "the given weights"
        notes.append(
            f"the base mix, from which moves and gains are counted, has {what} (solve.base), as "
            f"far as the limits allow: {natural:.0%} of its examples lie elsewhere than in the "
            "train split's own shares"
        )
    measured = _apart(
        {item.category: item.base for item in mix.categories},
        {item.category: rows_S[item.category] for item in mix.categories},
    )
    if measured > max(mix.moved, 0.1):
        hint = " (solve.base: uniform starts next to it)" if solve.base == "natural" else ""
        notes.append(
            f"effects were measured at a mix that differs from the base mix in {measured:.0%} of "
            f"its examples, which is more than the {mix.moved:.0%} that are moved: predicted gains "
            f"use slopes that were measured at another mix{hint}"
        )
    return tuple(notes)


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Share of the examples that two mixes do not have in common (total variation distance)."""
    totals = sum(one.values()), sum(other.values())
    return sum(abs(one[name] / totals[0] - other[name] / totals[1]) for name in one) / 2


def appended_notes(mix: Mix, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Note that a mix uses appended entries (`influence.append`); empty if it does not.

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
        "that has no rows of them; if they matter much, measure all categories at one base "
        "(influence.append: false)",
    )


def why_not_believed(summary: Mapping[str, Any]) -> str:
    """Why the mix must stay at the base; an empty text if the matrix is believed."""
    if summary["is_believed"]:
        return ""
    if summary["replications"] < 2:
        return (
            "the matrix has one replication, so nothing shows that its effects are reproducible: "
            "the mix stays at the base, or as near to it as the limits allow (raise "
            "influence.replications)"
        )
    return (
        "independent halves of the matrix, scored on different held-out rows, agree less on the "
        f"worth of the categories than influence.min_agreement {summary['min_agreement']:g}: the "
        "mix stays at the base, or as near to it as the limits allow"
    )


def choose_shrinkage(
    solve: SolveConfig, summary: Mapping[str, Any]
) -> tuple[SolveConfig, tuple[str, ...]]:
    """Replaces `solve.shrinkage: auto` by the choice that predicts better, and adds a note.

    Args:
        solve: configuration; a setting other than `auto` stays as it is.
        summary: of the influence stage.
    """
    if solve.shrinkage != "auto" or solve.matrix == "gamma":
        return solve, ()
    predictions = [part["prediction"] for part in summary["directions"].values()]
    if any(prediction is None for prediction in predictions):
        return solve.model_copy(update={"shrinkage": True}), (
            "solved with shrunken effects: with one replication nothing tells whether they predict "
            "better than the raw ones",
        )
    raw, shrunk = (sum(item[name] for item in predictions) for name in ("raw", "shrunk"))
    is_shrunk = bool(shrunk <= raw)
    note = (
        f"solved with {'shrunken' if is_shrunk else 'raw'} effects: they are better predictions of "
        "a replication that was left out (mean squared error "
        f"{min(raw, shrunk):.3g} against {max(raw, shrunk):.3g})"
    )
    return solve.model_copy(update={"shrinkage": is_shrunk}), (note,)


def evidence_notes(mix: Mix, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on missing evidence for a mix that moves; empty if it stays at the base.

    Args:
        mix: the solved mix.
        summary: of the influence stage.
    """
    if not summary["is_believed"] or mix.moved == 0:
        return ()
    notes = []
    if worth_agreement(summary["directions"]) is None:
        notes.append(
            "whether the effects are reproducible could not be checked (fewer than three "
            "categories, or all have the same worth): the mix moves without that check"
        )
    if summary["estimator"] == "gradient":
        notes.append(
            f"{FIRST_ORDER}. On eight real categories their order had a rank correlation of 0 to "
            "0.3 with retraining, and own effects were 3 to 6 times too large: expect less than is "
            "predicted"
        )
    return tuple(notes)


def mix_lines(mix: Mix) -> tuple[str, ...]:
    """Lines of text about a mix, for the log of the run."""
    error = "" if mix.expected_gain_se is None else f" +- {mix.expected_gain_se:.4f}"
    lines = [
        f"moved {mix.moved:.1%} of {mix.budget:,.0f} {mix.unit}; predicted gain "
        f"{mix.expected_gain:+.4f}{error} {mix.effect_unit}"
    ]
    if mix.expected_regret is not None:
        lines[0] += f"; knowing the effects exactly would add {mix.expected_regret:.4f} on average"
    if mix.status != "optimal":
        share = "" if mix.gap_share is None else f", {mix.gap_share:.2%} of its gain"
        lines.append(
            "the search for whole counts stopped at its limit: this is the best mix found, within "
            f"{mix.solver.gap:.2g} {mix.effect_unit} of the proven bound{share}; "
            "solve.mip_max_nodes raises the limit"
        )
    changes = sorted(mix.categories, key=lambda item: item.count - item.base)
    up = [item for item in reversed(changes) if item.count - item.base >= 1][:3]
    down = [item for item in changes if item.base - item.count >= 1][:3]
    for word, items in (("more", up), ("less", down)):
        if items:
            parts = [f"{i.category} {i.base:,.0f} -> {i.count:,.0f}" for i in items]
            lines.append(f"{word}: {', '.join(parts)}")
    return (*lines, *mix.notes)
