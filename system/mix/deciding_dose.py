"""Chooses which of several measured doses gives the effects that decide the mix.

An effect is a secant: (performance with d rows - performance without) / d.  For a move of x rows
the optimiser predicts x times the effect, which is exact at x = d.  With diminishing returns a
smaller dose predicts too much for a larger move, and a larger dose too little for a smaller move.
Moreover the noise of a run hardly depends on the dose, so effects of small doses are noisier.

The rule: in each direction, each source uses the dose nearest (by ratio) to the largest move that
the limits allow it; of two equally near doses, the larger.  `solve.dose` overrides the rule.

Legend of shape suffixes: T targets, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from system.influence.estimate.matrix import EffectMatrix

_VERB = {"add": "adding", "remove": "removing"}


def choose_doses(
    levels: Sequence[EffectMatrix], rule: str | int, move_S: np.ndarray
) -> EffectMatrix:
    """One matrix whose columns come from the dose that is chosen for each source.

    Args:
        levels: one direction at each dose, ascending; the same targets and sources.
        rule: `nearest`, `largest`, `smallest`, or a number of rows (the nearest dose to it).
        move_S: [S] largest move of each source in this direction, examples; used by `nearest`.
    """
    if len(levels) == 1 or rule == "largest":
        return levels[-1]
    if rule == "smallest":
        return levels[0]
    aim_S = move_S if rule == "nearest" else np.full(len(levels[0].sources), float(rule))
    return _columns(levels, _nearest(np.stack([level.dose_S for level in levels]), aim_S))


def _nearest(dose_KS: np.ndarray, aim_S: np.ndarray) -> np.ndarray:
    """[S] index of the nearest dose; the smallest for a source that cannot move."""
    with np.errstate(divide="ignore"):
        distance_KS = np.abs(np.log(dose_KS) - np.log(aim_S))
    last = dose_KS.shape[0] - 1
    # argmin takes the first of equal distances: reversed, that is the larger dose.
    nearest_S = last - np.argmin(distance_KS[::-1], axis=0)
    return np.where(aim_S > 0, nearest_S, 0)


def _columns(levels: Sequence[EffectMatrix], level_S: np.ndarray) -> EffectMatrix:
    """A matrix with each source's column from its level."""
    place = np.arange(level_S.size)
    grids = {
        field.name: np.stack([getattr(level, field.name) for level in levels], axis=2)[
            :, place, level_S
        ]
        for field in fields(EffectMatrix)
        if field.name.endswith("_TS") and field.name != "replicate_effects_RTS"
    }
    return replace(
        levels[-1],
        dose_S=np.stack([level.dose_S for level in levels])[level_S, place],
        replicate_effects_RTS=None,
        **grids,
    )


def deciding_note(chosen: Mapping[str, EffectMatrix], rule: str | int) -> str:
    """One sentence about the doses that decide the mix.

    Args:
        chosen: direction -> result of `choose_doses`.
        rule: as in `choose_doses`.
    """
    parts = []
    for direction, matrix in chosen.items():
        doses, counts = np.unique(matrix.dose_S, return_counts=True)
        shares = ", ".join(
            f"{dose:,.0f} rows" + ("" if doses.size == 1 else f" for {count}")
            for dose, count in zip(doses, counts, strict=True)
        )
        parts.append(f"{_VERB[direction]} {shares}")
    why = {
        "nearest": "nearest to the largest moves that the limits allow",
        "largest": "the largest measured",
        "smallest": "the smallest measured",
    }.get(str(rule), f"nearest to {rule} rows")
    of = " categories" if any(np.ptp(matrix.dose_S) > 0 for matrix in chosen.values()) else ""
    return f"the effects that decide are those of {' and '.join(parts)}{of} ({why}: solve.dose)"
