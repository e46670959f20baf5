"""Tests which category depends on which: help, asymmetry, edge weights; bootstrap draws.

`estimate.py` describes the rules and calls this module.

Shape suffixes: R replications, T target (measured on), S source (trained on); both axes have the
same categories in the same order.  Entry `[i, j]` stands for "i depends on j".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from system.errors import DataError
from system.taxonomy.records import AsymmetryUnit

PRIOR_PRODUCTS = 10  # weight of "no correlation" against the products observed


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectTable:
    """The checked input of the tests; unusable entries are 0 with error 0."""

    categories: tuple[str, ...]
    effect_TS: np.ndarray
    se_TS: np.ndarray
    df_TS: np.ndarray
    usable_TS: np.ndarray


def read_table(
    categories: Sequence[str],
    effect_TS: np.ndarray,
    effect_se_TS: np.ndarray,
    effect_RTS: np.ndarray | None,
    degrees_of_freedom: np.ndarray | float,
    identifiable: np.ndarray | None,
) -> EffectTable:
    """Checks the arguments of `estimate_taxonomy` and joins them; DataError if they do not fit."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTests:
    """The results of the tests for every ordered pair."""

    weight_TS: np.ndarray
    """> 0 exactly where the pair is significant."""
    z_TS: np.ndarray
    p_TS: np.ndarray
    tested_TS: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class DependenceRule:
    """The rule that decides when i depends on j, and the weight of that edge."""

    false_discovery_rate: float
    asymmetry_unit: AsymmetryUnit
    smallest_effect: float
    rho: float

    def test(self, table: EffectTable) -> PairTests:
        """Tests all ordered pairs of the table."""
        effect_TS, se_TS, df_TS = table.effect_TS, table.se_TS, table.df_TS
        tested_TS = table.usable_TS & table.usable_TS.T & ~np.eye(len(effect_TS), dtype=bool)
        help_z_TS = _ratio(effect_TS - self.smallest_effect, se_TS)
        help_p_TS = stats.t.sf(help_z_TS, df_TS)
        if self.asymmetry_unit == "gamma":
            effect_TS, se_TS, own_T = _per_own_effect(table)
            tested_TS &= own_T[:, None] & own_T[None, :]
        difference_TS = effect_TS - effect_TS.T
        variance_TS, back_TS = se_TS**2, se_TS.T**2
        both_TS = np.sqrt(np.maximum(variance_TS + back_TS - 2 * self.rho * se_TS * se_TS.T, 0.0))
        # Welch-Satterthwaite; an error of 0 has no term, and two of them leave nothing to test.
        both_df_TS = _ratio(
            (variance_TS + back_TS) ** 2, variance_TS**2 / df_TS + back_TS**2 / df_TS.T
        )
        both_df_TS = np.where(both_df_TS > 0, both_df_TS, np.inf)
        asymmetry_z_TS = _ratio(difference_TS, both_TS)
        p_TS = np.maximum(help_p_TS, stats.t.sf(asymmetry_z_TS, both_df_TS))
        p_TS = np.where(tested_TS, p_TS, 1.0)
        significant_TS = np.zeros_like(tested_TS)
        # Benjamini-Hochberg over all tested pairs.
        adjusted = stats.false_discovery_control(p_TS[tested_TS])
        significant_TS[tested_TS] = adjusted <= self.false_discovery_rate
        # Only a level above one half could make both directions of a pair significant.
        significant_TS &= difference_TS > 0
        with np.errstate(over="ignore"):
            shrink_TS = np.where(
                np.isinf(asymmetry_z_TS), 1.0, 1 - 1 / (1 + np.nan_to_num(asymmetry_z_TS) ** 2)
            )
        return PairTests(
            weight_TS=np.where(significant_TS, difference_TS * shrink_TS, 0.0),
            z_TS=np.minimum(help_z_TS, asymmetry_z_TS),
            p_TS=p_TS,
            tested_TS=tested_TS,
        )


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """`over / under`; if `under` is 0: infinity with the sign of `over`, or 0 for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(over / under, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _per_own_effect(table: EffectTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gamma, its delta-method error, and [T] bool: whether the own effect allows gamma."""
    own_T, own_se_T = np.diagonal(table.effect_TS), np.diagonal(table.se_TS)
    allowed_T = np.diagonal(table.usable_TS) & (own_T > 0)
    safe_T = np.where(allowed_T, own_T, 1.0)[:, None]
    gamma_TS = table.effect_TS / safe_T
    return gamma_TS, np.hypot(table.se_TS, gamma_TS * own_se_T[:, None]) / safe_T, allowed_T


def direction_correlation(table: EffectTable, effect_RTS: np.ndarray | None) -> float:
    """Correlation between the errors of effect[i, j] and effect[j, i], one number for all pairs.

    It is the covariance of the means over R replications, divided by the full standard errors and
    averaged over pairs.  (The full errors include held-out sampling, which the two directions do
    not share.)  The average is shrunk towards 0 if it rests on few products: two replications of
    one pair always correlate at +-1.
    """
    if effect_RTS is None or len(effect_RTS) < 2:
        return 0.0
    num = len(effect_RTS)
    known_TS = table.usable_TS & (table.se_TS > 0)
    pairs_TS = np.triu(known_TS & known_TS.T, 1)
    num_products = int(pairs_TS.sum()) * (num - 1)
    if num_products == 0:
        return 0.0
    deviation_RTS = np.where(known_TS, effect_RTS - effect_RTS.mean(axis=0), 0.0)
    deviation_RTS = deviation_RTS / np.where(known_TS, table.se_TS, 1.0)
    covariance_TS = (deviation_RTS * deviation_RTS.transpose(0, 2, 1)).sum(axis=0)
    rho = float(covariance_TS[pairs_TS].mean()) / (num * (num - 1))
    return float(np.clip(rho, -1.0, 1.0)) * num_products / (num_products + PRIOR_PRODUCTS)


def draw_effects(
    table: EffectTable, effect_RTS: np.ndarray | None, generator: np.random.Generator
) -> np.ndarray:
    """One bootstrap draw of the effects, [T, S].

    Without replications the draw is normal around the effects.  With R >= 2 the deviation of each
    replication from the mean is multiplied by one normal number; this keeps the variance and the
    correlations of the error of the mean.  The rest of the standard error (held-out sampling) is
    added independently.
    """
    noise_TS = generator.standard_normal(table.se_TS.shape)
    if effect_RTS is None or len(effect_RTS) < 2:
        return table.effect_TS + table.se_TS * noise_TS
    num = len(effect_RTS)
    multiplier_R = generator.standard_normal(num)
    deviation_RTS = np.where(table.usable_TS, effect_RTS - effect_RTS.mean(axis=0), 0.0)
    deviation_RTS = deviation_RTS / np.sqrt(num * (num - 1))
    rest_TS = np.sqrt(np.maximum(table.se_TS**2 - (deviation_RTS**2).sum(axis=0), 0.0))
    shared_TS = np.tensordot(multiplier_R, deviation_RTS, axes=1)
    return table.effect_TS + shared_TS + rest_TS * noise_TS
