"""Checks the arrays that a taxonomy is estimated from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from system.errors import DataError
from system.taxonomy.dependence import EffectTable


def read_table(
    categories: Sequence[str],
    effect_TS: np.ndarray,
    effect_se_TS: np.ndarray,
    effect_RTS: np.ndarray | None,
    degrees_of_freedom: np.ndarray | float,
    identifiable: np.ndarray | None,
) -> EffectTable:
    """The arguments of `estimate_taxonomy` as one table; DataError where they do not fit."""
    names = tuple(categories)
    num = len(names)
    if len(set(names)) != num or num == 0:
        raise DataError(
            f"A taxonomy needs at least one category and no name twice; got {num} names, "
            f"{len(set(names))} of them different."
        )
    usable_TS = np.ones((num, num), dtype=bool) if identifiable is None else identifiable
    for what, array, num_axes in (
        ("effect", effect_TS, 2),
        ("standard error", effect_se_TS, 2),
        ("identifiable", usable_TS, 2),
        ("replication effect", effect_RTS, 3),
    ):
        shape = np.shape(array) if array is not None else (1, num, num)
        if shape[-2:] != (num, num) or len(shape) != num_axes:
            raise DataError(
                f"The {what} array must be square over the {num} categories (targets x sources, "
                f"both in the given order); its shape is {shape}. Leave out targets that are no "
                "sources."
            )
    usable_TS = np.asarray(usable_TS, dtype=bool)
    df_TS = np.broadcast_to(np.asarray(degrees_of_freedom, dtype=float), (num, num))
    se_TS = np.asarray(effect_se_TS, dtype=float)
    checks = [
        ("effect", "a finite number", np.isfinite(effect_TS)),
        ("standard error", "a finite number from 0 up", np.isfinite(se_TS) & (se_TS >= 0)),
        ("number of degrees of freedom", "a positive number", df_TS > 0),
    ]
    if effect_RTS is not None:
        are_finite = np.isfinite(effect_RTS).all(axis=0)
        checks.append(("replicated effect", "a finite number in each replication", are_finite))
    for what, expected, is_good_TS in checks:
        bad = np.argwhere(usable_TS & ~is_good_TS)
        if len(bad):
            target, source = names[bad[0][0]], names[bad[0][1]]
            raise DataError(
                f"The {what} of source {source!r} on target {target!r} must be {expected} and is "
                f"not; {len(bad)} of {usable_TS.sum()} usable entries are like this. Mark such "
                "entries as not identifiable or repair them."
            )
    return EffectTable(
        categories=names,
        effect_TS=np.where(usable_TS, effect_TS, 0.0),
        se_TS=np.where(usable_TS, se_TS, 0.0),
        df_TS=np.where(usable_TS, df_TS, np.inf),
        usable_TS=usable_TS,
    )
