"""The effect matrix: how a dose of one category changes the held-out loss of every other.

Source of the quantities: arXiv 2409.07045, section 2 (effect equivalence coefficient gamma).  Row =
target (measured on), column = source (trained on).

    effect[i,j] = (P_i with a dose of j - P_i without it) / dose_j,   P = - mean held-out token loss
    gamma[i,j]  = effect[i,j] / effect[i,i],                          gamma[i,i] = 1

The errors come from `system.influence.estimate.noise`, gamma's intervals from
`system.influence.estimate.fieller` with the covariance through the shared reference, shrunken
effects from `system.influence.estimate.shrinkage`.

Legend of shape suffixes: R replications, T targets, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy import stats

from system.errors import DataError
from system.influence.design.doses import at_level
from system.influence.estimate.fieller import fieller_interval
from system.influence.estimate.measurements import Measurements, own_mask
from system.influence.estimate.noise import ErrorModel, fit_errors
from system.influence.estimate.shrinkage import Shrunken, shrink
from system.schema import MATRIX, check_table

DataUnit = Literal["examples", "tokens"]

MATRIX_FILE = pa.schema(
    [
        *MATRIX,
        pa.field("effect_low", pa.float64(), nullable=False),
        pa.field("effect_high", pa.float64(), nullable=False),
        pa.field("effect_df", pa.float64(), nullable=False),  # degrees of freedom of effect_se
        pa.field("effect_shrunk_se", pa.float64(), nullable=False),  # posterior deviation
        pa.field("appended", pa.bool_(), nullable=False),  # at the base of an earlier design
    ]
)
"""Schema of `influence/matrix.parquet`: the columns of every matrix table, then intervals, then
whether the entry belongs to an appended category.  A table may lack the last column; then no entry
is appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectMatrix:
    """Effects of one direction with their errors, in nats per response token per unit of data."""

    estimator: str
    direction: str
    """`add` or `remove`; in both, a positive effect means that the source's data helps."""
    unit: DataUnit
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    dose_S: np.ndarray
    """[S] dose, in `unit`."""
    effect_TS: np.ndarray
    effect_se_TS: np.ndarray
    """[T, S] standard errors: training noise, shared reference and held-out sampling."""
    effect_df_TS: np.ndarray
    """[T, S] degrees of freedom of the standard errors."""
    effect_low_TS: np.ndarray
    effect_high_TS: np.ndarray
    """[T, S] ends of the t intervals at the configured confidence."""
    shrunk_TS: np.ndarray
    """[T, S] empirical-Bayes posterior means."""
    shrunk_se_TS: np.ndarray
    """[T, S] posterior standard deviations."""
    gamma_TS: np.ndarray
    """[T, S] NaN if the target's own effect is not identifiable."""
    gamma_low_TS: np.ndarray
    gamma_high_TS: np.ndarray
    """[T, S] ends of the Fieller intervals; NaN where gamma is NaN."""
    identifiable_TS: np.ndarray
    """[T, S] bool: gamma may be used.  Never true with one replication."""
    appended_TS: np.ndarray
    """[T, S] bool: the category was appended to an earlier design and measured at its base."""
    replicate_effects_RTS: np.ndarray | None = None
    """[R, T, S] effects of each replication; None if the matrix was read from a table."""

    @property
    def own_TS(self) -> np.ndarray:
        """[T, S] bool: the effects of a category on itself."""
        return np.array([[t == s for s in self.sources] for t in self.targets])

    def part(self, targets: Sequence[str], sources: Sequence[str]) -> EffectMatrix:
        """The submatrix of these targets and sources, in this order.

        Raises:
            ValueError: the matrix has no such target or source.
        """
        rows = [self.targets.index(name) for name in targets]
        columns = [self.sources.index(name) for name in sources]
        grids = {
            field.name: getattr(self, field.name)[np.ix_(rows, columns)]
            for field in fields(self)
            if field.name.endswith("_TS")
        }
        replicates = self.replicate_effects_RTS
        return replace(
            self,
            targets=tuple(targets),
            sources=tuple(sources),
            dose_S=self.dose_S[columns],
            replicate_effects_RTS=None
            if replicates is None
            else replicates[:, rows][:, :, columns],
            **grids,
        )

    def to_table(self) -> pa.Table:
        """One row per entry, schema `MATRIX_FILE`, targets outermost."""
        num_targets, num_sources = self.effect_TS.shape
        count = num_targets * num_sources
        columns = {
            "target": np.repeat(np.array(self.targets, dtype=object), num_sources),
            "source": np.tile(np.array(self.sources, dtype=object), num_targets),
            "direction": [self.direction] * count,
            "dose": np.tile(self.dose_S, num_targets),
            "unit": [self.unit] * count,
            "estimator": [self.estimator] * count,
            "effect": self.effect_TS.ravel(),
            "effect_se": self.effect_se_TS.ravel(),
            "effect_shrunk": self.shrunk_TS.ravel(),
            "gamma": _nullable(self.gamma_TS),
            "gamma_low": _nullable(self.gamma_low_TS),
            "gamma_high": _nullable(self.gamma_high_TS),
            "identifiable": self.identifiable_TS.ravel(),
            "effect_low": self.effect_low_TS.ravel(),
            "effect_high": self.effect_high_TS.ravel(),
            "effect_df": self.effect_df_TS.ravel(),
            "effect_shrunk_se": self.shrunk_se_TS.ravel(),
            "appended": self.appended_TS.ravel(),
        }
        return pa.table(columns, schema=MATRIX_FILE)

    @classmethod
    def from_table(
        cls,
        table: pa.Table,
        *,
        direction: str,
        unit: DataUnit = "examples",
        where: str = "matrix",
        level: int = -1,
    ) -> EffectMatrix:
        """Reads the matrix of one direction and unit, at one dose.

        Args:
            table: schema `MATRIX_FILE`.
            direction: `add` or `remove`.
            unit: unit of the doses.
            where: name of the table in error messages.
            level: which of several doses: 0 is the smallest, -1 the largest (its effects have the
                smallest relative errors).  A source with fewer doses gives its largest.

        Raises:
            DataError: the direction or unit is missing, or an entry is missing or duplicated.
        """
        if "appended" not in table.column_names:
            table = table.append_column("appended", pa.array([False] * table.num_rows))
        table = check_table(table, MATRIX_FILE, where)
        targets, sources, rows = _entries(table.to_pylist(), direction, unit, level, where)
        entry = {(row["target"], row["source"]): row for row in rows}

        def grid(name: str) -> np.ndarray:
            values = [[entry[t, s][name] for s in sources] for t in targets]
            return np.array(values, dtype=float)

        return cls(
            estimator=rows[0]["estimator"],
            direction=direction,
            unit=unit,
            targets=targets,
            sources=sources,
            dose_S=grid("dose")[0],
            effect_TS=grid("effect"),
            effect_se_TS=grid("effect_se"),
            effect_df_TS=grid("effect_df"),
            effect_low_TS=grid("effect_low"),
            effect_high_TS=grid("effect_high"),
            shrunk_TS=grid("effect_shrunk"),
            shrunk_se_TS=grid("effect_shrunk_se"),
            gamma_TS=grid("gamma"),
            gamma_low_TS=grid("gamma_low"),
            gamma_high_TS=grid("gamma_high"),
            identifiable_TS=grid("identifiable").astype(bool),
            appended_TS=grid("appended").astype(bool),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An effect matrix with its error model and its priors."""

    matrix: EffectMatrix
    errors: ErrorModel
    shrunken: Shrunken


def estimate_effects(
    measured: Measurements,
    *,
    unit: DataUnit = "examples",
    confidence: float = 0.95,
    gamma_floor: float = 1e-6,
    gamma_max_width: float = 2.0,
) -> Estimate:
    """Estimates effects, errors, gamma and shrunken effects of one direction.

    Args:
        measured: paired losses of all runs.
        unit: unit of the doses.
        confidence: level of all intervals.
        gamma_floor: nats per response token per example.  If the interval of a target's own effect
            does not lie above it, gamma is not usable in that row.
        gamma_max_width: widest interval of an identifiable gamma.

    Raises:
        DataError: a loss is not finite.
    """
    _check_finite(measured)
    errors = fit_errors(measured)
    dose_S = measured.dose_S if unit == "examples" else measured.dose_tokens_S
    replicate_RTS = measured.mean_RTS / dose_S
    effect_TS = replicate_RTS.mean(axis=0)
    variance_TS = errors.variance_TS / dose_S**2
    own_T = measured.own_T
    own_TS = own_mask(own_T, dose_S.size)
    quantile_TS = stats.t.ppf(0.5 + confidence / 2.0, np.maximum(errors.df_TS, 1.0))
    se_TS = np.sqrt(variance_TS)
    floor_T = np.full(own_T.size, gamma_floor)
    if unit == "tokens":
        # The floor is per example: convert it, so that both units have the same usable rows.
        owned = own_T >= 0
        floor_T[owned] *= (measured.dose_S / measured.dose_tokens_S)[own_T[owned]]
    gamma = gamma_intervals(effect_TS, variance_TS, errors, dose_S, own_T, quantile_TS, floor_T)
    # With one replication training noise is unknown, so intervals are too narrow to be trusted.
    identifiable_TS = np.zeros(effect_TS.shape, dtype=bool)
    if errors.training is not None:
        width_TS = gamma[2] - gamma[1]
        identifiable_TS = np.isfinite(width_TS) & (width_TS <= gamma_max_width)
    shared_TS = np.sqrt(errors.common_T)[:, None] / dose_S
    shrunken = shrink(
        effect_TS, np.maximum(variance_TS, 1e-300), shared_TS, own_TS, measured.unresponsive_T
    )
    matrix = EffectMatrix(
        estimator=measured.estimator,
        direction=measured.direction,
        unit=unit,
        targets=measured.targets,
        sources=measured.sources,
        dose_S=dose_S,
        effect_TS=effect_TS,
        effect_se_TS=se_TS,
        effect_df_TS=errors.df_TS,
        effect_low_TS=effect_TS - quantile_TS * se_TS,
        effect_high_TS=effect_TS + quantile_TS * se_TS,
        shrunk_TS=shrunken.effect_TS,
        shrunk_se_TS=shrunken.effect_se_TS,
        gamma_TS=gamma[0],
        gamma_low_TS=gamma[1],
        gamma_high_TS=gamma[2],
        identifiable_TS=identifiable_TS,
        appended_TS=np.zeros(effect_TS.shape, dtype=bool),
        replicate_effects_RTS=replicate_RTS,
    )
    return Estimate(matrix=matrix, errors=errors, shrunken=shrunken)


def _entries(
    table: list[dict[str, Any]], direction: str, unit: DataUnit, level: int, where: str
) -> tuple[tuple[str, ...], tuple[str, ...], list[dict[str, Any]]]:
    """Targets, sources and one row per pair at this dose; see `EffectMatrix.from_table`."""
    rows = [row for row in table if row["direction"] == direction and row["unit"] == unit]
    if not rows:
        present = sorted({(row["direction"], row["unit"]) for row in table})
        raise DataError(
            f"{where}: expected rows with direction {direction!r} and unit {unit!r}, found "
            f"{present}. Add the direction to influence.directions and run that stage again."
        )
    targets = tuple(dict.fromkeys(row["target"] for row in rows))
    sources = tuple(dict.fromkeys(row["source"] for row in rows))
    rows = at_level(rows, level)
    if len(rows) != len(targets) * len(sources):
        raise DataError(
            f"{where}: expected one row for each of {len(targets)} targets x {len(sources)} "
            f"sources ({direction}, {unit}), found {len(rows)} rows"
        )
    return targets, sources, rows


def _check_finite(measured: Measurements) -> None:
    for target, difference_RSH in zip(measured.targets, measured.differences, strict=True):
        bad = ~np.isfinite(difference_RSH)
        if bad.any():
            source = measured.sources[int(np.argwhere(bad)[0][1])]
            raise DataError(
                f"influence: expected finite losses of target {target!r}, found {int(bad.sum())} "
                f"that are not, first after {measured.direction} of source {source!r}. A run "
                "diverged: lower influence.learning_rate, or look at the model's precision."
            )


def gamma_intervals(
    effect_TS: np.ndarray,
    variance_TS: np.ndarray,
    errors: ErrorModel,
    dose_S: np.ndarray,
    own_T: np.ndarray,
    quantile_TS: np.ndarray,
    floor_T: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gamma and its Fieller interval, [T, S] each; NaN if the own effect is not above the floor."""
    gamma_TS = np.full(effect_TS.shape, np.nan)
    low_TS, high_TS = gamma_TS.copy(), gamma_TS.copy()
    for row, own in enumerate(own_T):
        if own < 0:
            continue
        own_effect, own_variance = effect_TS[row, own], variance_TS[row, own]
        if own_effect - quantile_TS[row, own] * np.sqrt(own_variance) <= floor_T[row]:
            continue
        gamma_TS[row] = effect_TS[row] / own_effect
        # Of the two variances use the quantile with fewer degrees of freedom: never too narrow.
        low_TS[row], high_TS[row] = fieller_interval(
            effect_TS[row],
            np.full_like(effect_TS[row], own_effect),
            variance_TS[row],
            np.full_like(variance_TS[row], own_variance),
            errors.own_covariance_TS[row] / (dose_S * dose_S[own]),
            np.maximum(quantile_TS[row], quantile_TS[row, own]),
        )
        gamma_TS[row, own] = low_TS[row, own] = high_TS[row, own] = 1.0
    gamma_TS = np.where(np.isfinite(low_TS), gamma_TS, np.nan)
    return gamma_TS, low_TS, high_TS


def _nullable(values_TS: np.ndarray) -> pa.Array:
    flat = values_TS.ravel()
    return pa.array(flat, mask=~np.isfinite(flat))
