"""Which category depends on which: tests of help and asymmetry, edge weights, noise to draw from.

Shape suffixes: R replications, T target (measured on), S source (trained on); both axes hold the
same categories in the same order.  `[i, j]` speaks of "i depends on j".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from system.taxonomy.records import AsymmetryUnit

PRIOR_PRODUCTS = 10  # weight of "no correlation" against the products observed


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectTable:
    """Checked input; entries that may not be used are 0 with error 0."""

    categories: tuple[str, ...]
    effect_TS: np.ndarray
    se_TS: np.ndarray
    df_TS: np.ndarray
    usable_TS: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTests:
    """What the tests say of every ordered pair."""

    weight_TS: np.ndarray
    """> 0 exactly where the pair is significant."""
    z_TS: np.ndarray
    p_TS: np.ndarray
    tested_TS: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class DependenceRule:
    """When i depends on j, and how much the edge weighs."""

    false_discovery_rate: float
    asymmetry_unit: AsymmetryUnit
    smallest_effect: float
    rho: float

    def test(self, table: EffectTable) -> PairTests:
        """All ordered pairs of the table."""
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
        significant_TS[tested_TS] = benjamini_hochberg(p_TS[tested_TS], self.false_discovery_rate)
        # A pair cannot be significant both ways unless the level is above one half.
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


def benjamini_hochberg(p: np.ndarray, level: float) -> np.ndarray:
    """Which hypotheses are rejected at this false discovery rate ([n] bool for [n] p-values).

    Source: Benjamini and Hochberg, J. R. Statist. Soc. B 57 (1995), procedure (1).
    """
    ascending = np.sort(p)
    passing = np.flatnonzero(ascending <= level * np.arange(1, len(p) + 1) / max(len(p), 1))
    return p <= ascending[passing[-1]] if len(passing) else np.zeros(len(p), dtype=bool)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """`over / under`; where `under` is 0: plus or minus infinity by the sign of `over`, or 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(over / under, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _per_own_effect(table: EffectTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gamma, its delta-method error, and [T] bool: where the own effect allows it."""
    own_T, own_se_T = np.diagonal(table.effect_TS), np.diagonal(table.se_TS)
    allowed_T = np.diagonal(table.usable_TS) & (own_T > 0)
    safe_T = np.where(allowed_T, own_T, 1.0)[:, None]
    gamma_TS = table.effect_TS / safe_T
    return gamma_TS, np.hypot(table.se_TS, gamma_TS * own_se_T[:, None]) / safe_T, allowed_T


def direction_correlation(table: EffectTable, effect_RTS: np.ndarray | None) -> float:
    """Correlation of the errors of effect[i, j] and effect[j, i], one number for all pairs.

    Covariance of the means over R replications, in units of the full standard errors (which hold
    held-out sampling too: that part is not shared), averaged over pairs and drawn towards 0 where
    few products stand behind it: two replications of one pair always correlate at +-1.
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

    Without replications: normal around the effects.  With R >= 2: deviations of the replications
    from their mean, each times one normal number, keep variance and correlations of the mean's
    error; what the standard error holds beyond that (held-out sampling) is added independently.
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
