"""Reads and checks the settings of a curriculum; every error message gives the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from system.curriculum.records import Preset
from system.errors import ConfigError


def check_choices(preset: str, num_stages: int, epochs: int, tilt: float, rehearsal: float) -> None:
    """Raises a ConfigError if the preset, a number or a share is outside its range."""
    if preset not in get_args(Preset):
        raise ConfigError(
            f"Curriculum preset must be one of {', '.join(get_args(Preset))}; got {preset!r}."
        )
    for name, value in (("num_stages", num_stages), ("epochs", epochs)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ConfigError(f"Curriculum {name} must be a whole number from 1 up; got {value!r}.")
    for name, value in (("tilt", tilt), ("rehearsal", rehearsal)):
        if not 0 <= value <= 1:
            raise ConfigError(f"Curriculum {name} must be between 0 and 1; got {value!r}.")


def read_counts(
    counts: Mapping[str, int] | Sequence[int] | np.ndarray,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Category names and [S] int64 counts; ConfigError for anything but whole numbers from 0 up."""
    by_name = counts if isinstance(counts, Mapping) else {str(i): n for i, n in enumerate(counts)}
    for name, n in by_name.items():
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
            raise ConfigError(
                f"Curriculum counts must be whole numbers from 0 up; category {name!r} has {n!r}. "
                "Solve the mix with integer counts, or round it before planning stages."
            )
    if sum(by_name.values()) == 0:
        raise ConfigError(
            f"The mix holds no examples: all {len(by_name)} categories have the count 0. A "
            "curriculum needs at least one example."
        )
    return tuple(by_name), np.array(list(by_name.values()), dtype=np.int64)


def read_levels(
    levels: Mapping[str, int | None] | Sequence[int | None] | np.ndarray, names: tuple[str, ...]
) -> dict[str, int | None]:
    """Level by name, in the order of `names`; ConfigError where names or values do not fit."""
    if isinstance(levels, Mapping):
        if set(levels) != set(names):
            raise ConfigError(
                "Levels and counts must name the same categories; without a level: "
                f"{sorted(set(names) - set(levels)) or 'none'}, without a count: "
                f"{sorted(set(levels) - set(names)) or 'none'}."
            )
        values = [levels[name] for name in names]
    else:
        values = list(levels)
        if len(values) != len(names):
            raise ConfigError(
                f"Levels must be as many as counts: got {len(values)} levels for {len(names)} "
                "categories."
            )
    for name, level in zip(names, values, strict=True):
        if level is not None and (not isinstance(level, int | np.integer) or level < 0):
            raise ConfigError(
                f"A level must be a whole number from 0 up, or None; category {name!r} has "
                f"{level!r}."
            )
    return {n: None if v is None else int(v) for n, v in zip(names, values, strict=True)}


def read_sizes(
    stage_sizes: Sequence[int] | None,
    num_stages: int,
    totals_S: np.ndarray,
    level_S: np.ndarray,
    preset: Preset,
) -> np.ndarray:
    """[T] int64 stage sizes: the given ones, or those of the preset; ConfigError if impossible."""
    total = int(totals_S.sum())
    if stage_sizes is not None:
        sizes_T = np.array(stage_sizes, dtype=object)
        if any(not isinstance(n, int | np.integer) or n < 1 for n in sizes_T):
            raise ConfigError(
                f"Stage sizes must be whole numbers from 1 up; got {list(stage_sizes)}."
            )
        if len(sizes_T) != num_stages or sum(sizes_T) != total:
            raise ConfigError(
                f"Stage sizes must be {num_stages} numbers (num_stages) with the sum {total} (the "
                f"mix times the epochs); got {len(sizes_T)} numbers with the sum {sum(sizes_T)}."
            )
        return sizes_T.astype(np.int64)
    if num_stages > total:
        raise ConfigError(
            f"{num_stages} stages need at least {num_stages} examples, but the mix times the "
            f"epochs has {total}; lower num_stages."
        )
    used_S = totals_S[totals_S > 0]
    placed_S = ~np.isnan(level_S)
    present = np.unique(level_S[placed_S])
    if preset == "sequential" and len(present) == num_stages > 1:
        per_level_T = np.array([used_S[level_S == level].sum() for level in present])
        return _apportion(total, per_level_T)
    sizes_T = _apportion(total, np.ones(num_stages))
    return sizes_T[::-1] if preset == "reversed" else sizes_T


def _apportion(total: int, weight_T: np.ndarray) -> np.ndarray:
    """Divides `total` by weight into integers: largest remainder, then the earlier part."""
    exact_T = total * (weight_T / weight_T.sum())
    parts_T = np.floor(exact_T + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-np.round(exact_T - parts_T, 9), kind="stable")
    parts_T[by_remainder[: total - parts_T.sum()]] += 1
    return parts_T
