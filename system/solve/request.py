"""`instructmix solve`: turns command-line arguments and tables into the input of the solver.

`system.solve.command` calls `read_request`; `system.solve.tables` reads the files.
"""

import argparse
from typing import Any

import numpy as np

from system.errors import ConfigError, DataError
from system.solve.problem import GroupLimit, MixOptions, MixProblem
from system.solve.tables import LARGEST, BaseTable, align, read_base, read_limits, read_matrix

_OPTION_FLAGS = (
    "budget",
    "unit",
    "max_epochs",
    "move",
    "cap",
    "guard",
    "guard_nats",
    "objective",
    "uncertainty",
    "radius",
    "sources_off",
    "max_categories",
    "mip_max_nodes",
)
_CATEGORY_LIMITS = ("lower", "upper", "cap", "supply")


def read_request(args: argparse.Namespace) -> tuple[MixProblem, MixOptions]:
    """Read every file that the arguments name.

    Raises:
        DataError: a table is invalid.
        ConfigError: an option is invalid, or a value is set in two places.
    """
    for flag in _OPTION_FLAGS:
        value = getattr(args, flag)
        if isinstance(value, int | float) and LARGEST < abs(value) < float("inf"):
            raise ConfigError(
                f"--{flag.replace('_', '-')}: expected a number up to {LARGEST:g}, found {value:g}"
            )
    base = read_base(args.base)
    limits = _Limits(args.limits, base) if args.limits else None
    main = read_matrix(args.gamma or args.effect, base)
    # `align` words the error, which must come before the test of targets against sources.
    if set(main.categories) != set(base.categories):
        align(main, main.targets, base.categories)
    if args.gamma and set(main.targets) != set(main.categories):
        raise DataError(
            f"{main.path}: gamma is square, with the same names as rows and as columns, found "
            f"{len(main.targets)} targets {list(main.targets)[:5]} and {len(main.categories)} "
            f"sources {list(main.categories)[:5]}; use --effect for a table with other targets"
        )
    targets = base.categories if args.gamma else main.targets
    effect_TS, mask_TS = align(main, targets, base.categories)
    others: dict[str, np.ndarray | None] = {}
    for flag in ("remove", "stderr", "stderr_remove"):
        path = getattr(args, flag)
        others[flag] = None
        if path is not None:
            values_TS, measured_TS = align(read_matrix(path, base), targets, base.categories)
            others[flag] = _complete(values_TS, measured_TS, mask_TS, path, flag)
            # An effect that was measured in one direction only counts as not measured.
            if flag == "remove":
                mask_TS = mask_TS & measured_TS
    numbers = dict(base.numbers)
    importance_T = _importance(numbers, limits, targets, base)
    if limits is not None:
        limits.merge_categories(numbers)
    _refuse_repeats(args, numbers)
    problem = MixProblem(
        categories=base.categories,
        targets=targets,
        base_S=numbers["count"],
        effect_add_TS=effect_TS,
        effect_remove_TS=others["remove"],
        se_TS=others["stderr"],
        se_remove_TS=others["stderr_remove"],
        identifiable_TS=None if mask_TS.all() else np.array(mask_TS),
        importance_T=importance_T,  # type: ignore[arg-type]
        supply_S=_filled(numbers, "supply", np.inf),
        lower_S=_filled(numbers, "lower", 0.0),
        upper_S=_filled(numbers, "upper", np.inf),
        cap_S=_filled(numbers, "cap", np.inf),
        tokens_S=_tokens(numbers, base),
        group_S=base.groups,
        guard_T=None if limits is None else limits.guards(targets),
    )
    # A flag that was not used keeps the default of MixOptions.
    used = {name: getattr(args, name) for name in _OPTION_FLAGS if getattr(args, name) is not None}
    groups = () if limits is None else limits.groups()
    return problem, MixOptions(**used, integer=args.integer, groups=groups)


def _complete(
    values_TS: np.ndarray, measured_TS: np.ndarray, mask_TS: np.ndarray, path: str, flag: str
) -> np.ndarray:
    """The values, after a check that every measured effect has a standard error.

    An empty standard error is allowed only where the effect is empty too, since it is not used.
    """
    if flag == "remove":
        return values_TS
    is_missing = ~measured_TS & mask_TS
    if is_missing.any():
        raise DataError(
            f"{path}: expected a standard error for every measured effect, found "
            f"{int(is_missing.sum())} empty cells; fill them"
        )
    return values_TS


def _importance(
    numbers: dict[str, np.ndarray],
    limits: "_Limits | None",
    targets: tuple[str, ...],
    base: BaseTable,
) -> np.ndarray | None:
    """[T] from the base table (targets that are categories) and the limits file (any target)."""
    column = numbers.pop("importance", None)
    extra = {} if limits is None else limits.numbers_of("importance")
    if column is None and not extra:
        return None
    position = {name: i for i, name in enumerate(targets)}
    weights_T = np.zeros(len(targets))
    if column is not None:
        for name, weight in zip(base.categories, column.tolist(), strict=True):
            if name in position and not np.isnan(weight):
                weights_T[position[name]] = weight
            if name in extra and not np.isnan(weight):
                raise ConfigError(
                    f"the importance of {name!r} is given twice, in a column of {base.path} and in "
                    "the limits file; remove one"
                )
    for name, weight in extra.items():
        if name not in position:
            raise DataError(
                f"the limits file: importance: unknown target {name!r}; the targets are "
                f"{', '.join(targets[:8])}{', ...' if len(targets) > 8 else ''}"
            )
        weights_T[position[name]] = weight
    return weights_T


def _refuse_repeats(args: argparse.Namespace, numbers: dict[str, np.ndarray]) -> None:
    """Refuse a value that a flag and a column both set: neither should win silently."""
    if args.cap is not None and "cap" in numbers:
        raise ConfigError(
            "the cap is set twice, by --cap and as a 'cap' for single categories (base table or "
            "limits file); keep one of them"
        )


def _filled(numbers: dict[str, np.ndarray], name: str, empty: float) -> np.ndarray | None:
    if name not in numbers:
        return None
    return np.where(np.isnan(numbers[name]), empty, numbers[name])


def _tokens(numbers: dict[str, np.ndarray], base: BaseTable) -> np.ndarray | None:
    if "tokens" not in numbers:
        return None
    for j in np.flatnonzero(np.isnan(numbers["tokens"]))[:1]:
        raise DataError(
            f"{base.path}: category {base.categories[j]!r} has no tokens per example; fill the "
            "column 'tokens' or leave it out"
        )
    return numbers["tokens"]


class _Limits:
    """The limits file, validated against the base table."""

    def __init__(self, path: str, base: BaseTable) -> None:
        self._path, self._base = path, base
        self._content = read_limits(path)
        allowed = ("groups", "categories", "guards", "importance")
        unknown = [key for key in self._content if key not in allowed]
        if unknown:
            raise ConfigError(f"{path}: unknown keys {unknown}; known keys are {list(allowed)}")

    def groups(self) -> tuple[GroupLimit, ...]:
        """The group limits."""
        limits = []
        for name, body in self._section("groups").items():
            body = self._mapping(body, f"groups: {name}", ("min", "max", "categories"))
            members = body.get("categories")
            if members is not None and not isinstance(members, list):
                raise ConfigError(f"{self._path}: groups: {name}: categories must be a list")
            limits.append(
                GroupLimit(
                    name=str(name),
                    members=None if members is None else tuple(str(m) for m in members),
                    lower=self._value(body.get("min", 0.0), f"groups: {name}: min"),
                    upper=self._value(body.get("max", float("inf")), f"groups: {name}: max"),
                )
            )
        return tuple(limits)

    def merge_categories(self, numbers: dict[str, np.ndarray]) -> None:
        """Add limits of single categories to the columns; a limit set twice is an error."""
        position = {name: j for j, name in enumerate(self._base.categories)}
        for key, body in self._section("categories").items():
            name = str(key)
            if name not in position:
                raise DataError(f"{self._path}: categories: unknown category {name!r}")
            body = self._mapping(body, f"categories: {name}", _CATEGORY_LIMITS)
            for limit, value in body.items():
                empty = np.full(len(position), np.nan)
                column = numbers.get(limit, empty).copy()
                if not np.isnan(column[position[name]]):
                    raise ConfigError(
                        f"the {limit} of category {name!r} is given twice, in {self._base.path} "
                        f"and in {self._path}; remove one"
                    )
                column[position[name]] = self._value(value, f"categories: {name}: {limit}")
                numbers[limit] = column

    def guards(self, targets: tuple[str, ...]) -> np.ndarray | None:
        """[T] guards in nats; inf for targets without one."""
        guards = self.numbers_of("guards")
        unknown = [name for name in guards if name not in targets]
        if unknown:
            raise DataError(f"{self._path}: guards: unknown targets {unknown}")
        if not guards:
            return None
        return np.array([guards.get(name, np.inf) for name in targets])

    def numbers_of(self, section: str) -> dict[str, float]:
        """A section that maps names to numbers."""
        return {
            str(name): self._value(value, f"{section}: {name}")
            for name, value in self._section(section).items()
        }

    def _section(self, name: str) -> dict[Any, Any]:
        section = self._content.get(name)
        section = {} if section is None else section
        if not isinstance(section, dict):
            raise ConfigError(f"{self._path}: {name}: expected names with values below it")
        return section

    def _mapping(self, body: Any, where: str, allowed: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(body, dict) or any(key not in allowed for key in body):
            raise ConfigError(
                f"{self._path}: {where}: expected keys among {list(allowed)}, found {body}"
            )
        return body

    def _value(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ConfigError(f"{self._path}: {where}: expected a number >= 0, found {value!r}")
        return float(value)
