"""From a YAML file and `--set` values to a checked RunConfig, with errors a person can act on."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from system.config import RunConfig
from system.errors import ConfigError

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""What YAML 1.1 reads as a string although a person means a number: 1e-4."""


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML (or JSON) file, with `a.b=value` overrides applied.

    Relative paths inside mean what they mean to the person who runs the command: they start from
    the current directory.  Environment variables (`${HOME}`) are expanded in strings.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a bad value.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"{path}: expected a configuration file, found "
            f"{'a directory' if file.is_dir() else 'nothing'} there. Examples are in configs/."
        )
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, but it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: expected a mapping such as `run_dir: runs/first`, found "
            f"{type(value).__name__}. Examples are in configs/."
        )
    apply_overrides(value, overrides)
    return parse_config(_expand(value), where=path)


def apply_overrides(value: dict[str, Any], overrides: Sequence[str]) -> None:
    """Changes the raw configuration in place by `a.b=value` texts; values are YAML.

    Raises:
        ConfigError: an override has another form, or leads through something that is no section.
    """
    for override in overrides:
        _apply_override(value, override)


def parse_config(value: dict[str, Any], where: str) -> RunConfig:
    """A checked configuration.

    Raises:
        ConfigError: names every bad field, what was found, and the nearest known key.
    """
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(_describe(item) for item in error.errors())
        raise ConfigError(f"{where}: {problems}.") from error


def _apply_override(value: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(
            f"--set {override!r}: expected a.b=value, such as --set train.learning_rate=1e-4"
        )
    try:
        parsed = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
    if isinstance(parsed, str) and _SCIENTIFIC.fullmatch(parsed):
        parsed = float(parsed)
    *parents, last = name.strip().split(".")
    node: Any = value
    for depth, part in enumerate(parents):
        node = _child(node, part, override, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, part: str, override: str, so_far: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    child = node.setdefault(part, {})
    if child is None:
        child = node[part] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {so_far} is a value ({child!r}), not a section")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"--set {override!r}: expected an index from 0 to {len(node) - 1}, found {part!r}"
        )
    return int(part)


def _expand(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner) for inner in value]
    if isinstance(value, str):
        return os.path.expandvars(os.path.expanduser(value))
    return value


def _describe(item: Any) -> str:
    location = [part for part in item["loc"] if part != "function-after"]
    name = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{name}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{name}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    found = item["input"]
    shown = "" if isinstance(found, dict | list) or not name else f", found {found!r}"
    return f"{name}: {message}{shown}" if name else message


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        model = _section_of(field.annotation)
        if model is None:
            return []
    return sorted(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
