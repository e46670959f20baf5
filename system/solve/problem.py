"""The input of the optimiser: the measured problem and the user's options, both validated.

Shape suffixes in the whole package: ``T`` target (measured on), ``S`` source category (trained
on), ``C`` column of a linear program, ``R`` row of a linear program. `system.mix` builds this
input from a run, and `system.solve.request` from the tables of `instructmix solve`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from system.errors import ConfigError, DataError

Objective = Literal["linear", "max-min", "concave", "robust"]
OBJECTIVES: tuple[Objective, ...] = ("linear", "max-min", "concave", "robust")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DoseCurve:
    """Effects of several doses of every source, in one direction: K doses in ascending order.

    Raises:
        DataError: shapes do not match, a dose is not positive, or doses do not ascend.
    """

    dose_KS: np.ndarray
    """[K, S] rows; a source with fewer doses repeats its largest."""
    effect_KTS: np.ndarray
    """[K, T, S] effect per example, mean over the dose."""
    se_KTS: np.ndarray
    """[K, T, S] standard error of ``effect_KTS``, >= 0."""

    def __post_init__(self) -> None:
        """Check what the optimiser requires."""
        count, size = self.dose_KS.shape
        fits = self.effect_KTS.shape == self.se_KTS.shape and self.effect_KTS.shape[::2] == (
            count,
            size,
        )
        numbers = (self.dose_KS, self.effect_KTS, self.se_KTS)
        if not fits or not all(np.isfinite(values).all() for values in numbers):
            raise DataError(
                f"a dose curve needs finite effects and errors [doses, targets, sources], found "
                f"{self.effect_KTS.shape} and {self.se_KTS.shape} for doses {self.dose_KS.shape}"
            )
        if (self.dose_KS[0] <= 0).any() or (np.diff(self.dose_KS, axis=0) < 0).any():
            raise DataError("the doses of a dose curve must be positive and ascend")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixProblem:
    """The categories, their supply and limits, and their measured effects on every target.

    Effects are nats per response token *per example* of the source (or, for the paper's own
    objective, the dimensionless gamma); positive means that more of the source helps the target.
    Arrays are converted to float64; ``None`` in an optional field means "no such limit".
    Source: arXiv 2409.07045, section 3 (EE-CPO), with separate add and remove slopes and errors.

    Raises:
        DataError: a shape, a name or a number that cannot be used; the message names the entry.

    Example:
        >>> MixProblem(categories=("a", "b"), targets=("a", "b"), base_S=[10, 10],
        ...            effect_add_TS=[[1.0, 0.5], [-0.2, 1.0]]).importance_T.tolist()
        [0.5, 0.5]
    """

    categories: tuple[str, ...]
    """[S] source names, unique."""
    targets: tuple[str, ...]
    """[T] target names, unique; they need not be categories."""
    base_S: np.ndarray
    """[S] examples in the base mix, before the solver scales them to the budget."""
    effect_add_TS: np.ndarray
    """[T, S] effect of one more example of S on T."""
    effect_remove_TS: np.ndarray | None = None
    """[T, S] effect per example when examples of S are removed; None: the same as when added."""
    se_TS: np.ndarray | None = None
    """[T, S] standard error of ``effect_add_TS``, same unit, >= 0."""
    se_remove_TS: np.ndarray | None = None
    """[T, S] standard error of ``effect_remove_TS``; None: ``se_TS``."""
    identifiable_TS: np.ndarray | None = None
    """[T, S] bool; a False entry counts as zero effect and keeps its standard error."""
    importance_T: np.ndarray = None  # type: ignore[assignment]
    """[T] weights beta >= 0, used without scaling. None: base shares of the targets that are
    categories (zero for the others); uniform when no target is a category."""
    supply_S: np.ndarray | None = None
    """[S] number of distinct examples; a mix may use ``supply * max_epochs`` of them."""
    lower_S: np.ndarray | None = None
    """[S] smallest number of examples."""
    upper_S: np.ndarray | None = None
    """[S] largest number of examples."""
    cap_S: np.ndarray | None = None
    """[S] largest number of examples by which a category may move from the base mix, up or down."""
    tokens_S: np.ndarray | None = None
    """[S] mean tokens per example, > 0, finite; needed for a budget in tokens."""
    group_S: tuple[str | None, ...] | None = None
    """[S] name of the group that each category belongs to."""
    guard_T: np.ndarray | None = None
    """[T] largest decrease of each target in nats; inf: no limit. Applies beside the guard of the
    options."""
    curve_add: DoseCurve | None = None
    """Several doses, for ``concave``: with ``curve_remove`` it replaces both effect matrices."""
    curve_remove: DoseCurve | None = None

    def __post_init__(self) -> None:
        """Convert, check, and fill the default importance."""
        set_field = object.__setattr__  # the dataclass is frozen for everyone else
        set_field(self, "categories", _names(self.categories, "categories"))
        set_field(self, "targets", _names(self.targets, "targets"))
        S, T = len(self.categories), len(self.targets)
        set_field(self, "base_S", _vector(self.base_S, "base count", self.categories))
        if not self.base_S.sum() > 0:
            raise DataError(
                "the base mix: expected at least one category with a positive count, but all "
                f"{S} counts are 0; use the counts of the data you would train on by default"
            )
        for field, label in _SOURCE_VECTORS.items():
            set_field(self, field, _optional_vector(getattr(self, field), label, self.categories))
        guard_T = _optional_vector(self.guard_T, "guard", self.targets)
        set_field(self, "guard_T", guard_T)
        for field in ("effect_add_TS", "effect_remove_TS", "se_TS", "se_remove_TS"):
            matrix = getattr(self, field)
            if matrix is not None or field == "effect_add_TS":
                set_field(self, field, self._matrix(matrix, field))
        if self.identifiable_TS is not None:
            mask = np.asarray(self.identifiable_TS)
            if mask.shape != (T, S) or mask.dtype != np.bool_:
                raise DataError(
                    f"identifiable_TS must be a bool table of {T} targets x {S} sources, found "
                    f"{mask.dtype} of shape {mask.shape}"
                )
        self._check_vectors()
        if self.importance_T is None:
            set_field(self, "importance_T", self._default_importance())
        else:
            weights = _vector(self.importance_T, "importance", self.targets)
            set_field(self, "importance_T", weights)
        if not self.importance_T.sum() > 0:
            raise DataError(
                "at least one target needs a positive importance, but all are 0; there is "
                "nothing to optimise"
            )

    def _check_vectors(self) -> None:
        if self.tokens_S is not None:
            is_usable_S = np.isfinite(self.tokens_S) & (self.tokens_S > 0)
            for j in np.flatnonzero(~is_usable_S)[:1]:
                raise DataError(
                    f"tokens per example must be > 0 and finite, found {self.tokens_S[j]} for "
                    f"category {self.categories[j]!r}"
                )
        for (low, low_name), (high, high_name) in (
            ((self.lower_S, "lower"), (self.upper_S, "upper")),
        ):
            if low is None or high is None:
                continue
            for j in np.flatnonzero(low > high)[:1]:
                raise DataError(
                    f"category {self.categories[j]!r} has {low_name} limit {low[j]:g} above its "
                    f"{high_name} limit {high[j]:g}; swap or widen them"
                )
        if self.group_S is not None and len(self.group_S) != len(self.categories):
            raise DataError(
                f"{len(self.group_S)} group names for {len(self.categories)} categories; give one "
                "name (or nothing) for each category"
            )

    def _matrix(self, matrix: Any, field: str) -> np.ndarray:
        S, T = len(self.categories), len(self.targets)
        array = np.asarray(matrix)
        if array.dtype != np.float64:
            array = array.astype(np.float64)
        if array.shape != (T, S):
            raise DataError(
                f"{field} must have one row for each of the {T} targets and one column for each "
                f"of the {S} source categories, found shape {array.shape}"
            )
        for start in range(0, T, 512):
            bad = np.argwhere(~np.isfinite(array[start : start + 512]))
            if len(bad):
                i, j = start + int(bad[0, 0]), int(bad[0, 1])
                raise DataError(
                    f"{field} must hold finite numbers, found {array[i, j]} for target "
                    f"{self.targets[i]!r}, source {self.categories[j]!r}; mark an entry that "
                    "could not be measured as not identifiable instead (an empty cell in a table)"
                )
        if field.startswith("se_") and array.size and array.min() < 0:
            i, j = np.unravel_index(int(np.argmin(array)), array.shape)
            raise DataError(
                f"standard errors must be >= 0, found {array[i, j]} for target "
                f"{self.targets[i]!r}, source {self.categories[j]!r}"
            )
        return array

    def _default_importance(self) -> np.ndarray:
        column = {name: j for j, name in enumerate(self.categories)}
        shares_S = self.base_S / self.base_S.sum()
        weights = [shares_S[column[t]] if t in column else 0.0 for t in self.targets]
        if not any(t in column for t in self.targets):
            weights = [1.0 / len(self.targets)] * len(self.targets)
        return np.array(weights)


_SOURCE_VECTORS = {
    "supply_S": "supply",
    "lower_S": "lower limit",
    "upper_S": "upper limit",
    "cap_S": "cap",
    "tokens_S": "tokens per example",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """The examples of several categories together lie in ``[lower, upper]``."""

    name: str
    members: tuple[str, ...] | None = None
    """Category names; None: the categories whose ``group_S`` is ``name``."""
    lower: float = 0.0
    upper: float = float("inf")

    def __post_init__(self) -> None:
        """Refuse limits that cross."""
        if not 0 <= self.lower <= self.upper:
            raise ConfigError(
                f"group {self.name!r} needs 0 <= min <= max, found min {self.lower:g} and max "
                f"{self.upper:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixOptions:
    """The objective and the limits of the mix.

    Raises:
        ConfigError: a value is outside its range, or two options exclude each other.
    """

    objective: Objective = "linear"
    budget: float | None = None
    """Size of the mix in ``unit``. None: the sum of the base mix."""
    unit: Literal["examples", "tokens"] = "examples"
    max_epochs: float = 1.0
    """Largest number of uses of an example; limits each category to ``supply * max_epochs``."""
    move: float = 0.1
    """Trust region: the largest share of the budget that may be added to categories."""
    cap: float | None = None
    """The largest share of the budget by which a single category may move, up or down."""
    guard: float | None = None
    """Largest decrease of a target, as a share of the absolute value of its base effect."""
    guard_nats: float | None = None
    """Largest decrease of a target, in the unit of the effects."""
    integer: bool = False
    """Whether counts are whole numbers."""
    max_categories: int | None = None
    """Largest number of categories in the mix."""
    groups: tuple[GroupLimit, ...] = ()
    radius: float = 1.0
    """``robust``: number of standard errors by which an effect may be off."""
    uncertainty: Literal["box", "budget"] = "box"
    """``robust``: all sources may be off at the same time, or only ``sources_off`` of them."""
    sources_off: float | None = None
    """``robust`` with ``budget``: number of sources that may be off at the same time. None:
    sqrt(sources)."""
    mip_gap: float = 1e-4
    """Integer search: it stops when the gain is this close to its bound, relative to the gain."""
    mip_max_nodes: int | None = None
    """Integer search: largest number of nodes. It is a count and not a time, so the answer is the
    same on every machine. None: 2,000, fewer if nodes are large (``whole.py``)."""

    def __post_init__(self) -> None:
        """Check every range."""
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {OBJECTIVES}, found {self.objective!r}")
        if self.unit not in ("examples", "tokens"):
            raise ConfigError(f"unit must be 'examples' or 'tokens', found {self.unit!r}")
        if self.uncertainty not in ("box", "budget"):
            raise ConfigError(f"uncertainty must be 'box' or 'budget', found {self.uncertainty!r}")
        _in_range("budget", self.budget, 0, open_low=True)
        _in_range("max_epochs", self.max_epochs, 0, open_low=True)
        _in_range("move", self.move, 0, 1)
        for name in ("cap", "guard", "guard_nats", "radius", "sources_off", "mip_gap"):
            _in_range(name, getattr(self, name), 0)
        if self.guard is not None and self.guard_nats is not None:
            raise ConfigError("guard (a share) and guard_nats exclude each other; give one of them")
        if self.max_categories is not None and self.max_categories < 1:
            raise ConfigError(f"max_categories must be at least 1, found {self.max_categories}")
        if self.mip_max_nodes is not None and self.mip_max_nodes < 1:
            raise ConfigError(f"mip_max_nodes must be at least 1, found {self.mip_max_nodes}")
        names = [g.name for g in self.groups]
        if len(set(names)) != len(names):
            raise ConfigError(f"group limits must have different names, found {names}")


def _in_range(
    name: str,
    value: float | None,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
) -> None:
    if value is None:
        return
    above = value > low if open_low else value >= low
    if not (above and value <= high and np.isfinite(value)):
        allowed = f"> {low:g}" if open_low else f">= {low:g}"
        allowed += f" and <= {high:g}" if np.isfinite(high) else ""
        raise ConfigError(f"{name} must be a finite number {allowed}, found {value}")


def _names(names: Any, label: str) -> tuple[str, ...]:
    names = tuple(names)
    if not names or not all(isinstance(n, str) and n for n in names):
        raise DataError(f"{label} must be one or more non-empty names, found {list(names)[:5]}")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DataError(f"{label} must be different names, found {twice!r} more than once")
    return names


def _vector(
    values: Any, label: str, names: tuple[str, ...], *, allow_inf: bool = False
) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    if array.shape != (len(names),):
        raise DataError(
            f"expected one {label} for each of the {len(names)} names, found shape {array.shape}"
        )
    bad = ~(array >= 0) | (np.isinf(array) & (not allow_inf))
    if bad.any():
        j = int(np.argmax(bad))
        raise DataError(
            f"every {label} must be a number >= 0{'' if allow_inf else ' and finite'}, found "
            f"{array[j]} for {names[j]!r}"
        )
    return array


def _optional_vector(values: Any, label: str, names: tuple[str, ...]) -> np.ndarray | None:
    return None if values is None else _vector(values, label, names, allow_inf=True)
