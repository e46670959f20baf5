"""Reads a YAML file and `--set` values into a checked RunConfig.

Every error names the key, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from system.config import RunConfig, Unexpanded
from system.errors import ConfigError
from system.redact import without_secrets
from system.yaml_text import parse_yaml

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""Numbers that YAML 1.1 reads as strings, such as 1e-4."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
"""As `os.path.expandvars` reads them."""


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML (or JSON) file and applies `a.b=value` overrides.

    Relative paths in the file start from the current directory of the command.  Environment
    variables (`${HOME}`) in strings are expanded.

    Raises:
        ConfigError: the file is missing or is not YAML, a key is unknown, or a value is invalid.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"{path}: expected a configuration file, found "
            f"{'a directory' if file.is_dir() else 'nothing'} there. Examples are in configs/."
        )
    try:
        value = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: expected YAML, but it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: expected a mapping such as `run_dir: runs/first`, found "
            f"{type(value).__name__}. Examples are in configs/."
        )
    apply_overrides(value, overrides)
    unexpanded = _read_variables(value)
    config = parse_config(_expand(value), where=path, unexpanded=unexpanded)
    return config.with_unexpanded(unexpanded)


def apply_overrides(value: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies overrides `a.b=value` to the raw configuration, in place; values are YAML.

    Raises:
        ConfigError: an override has another form, or its path leads through a plain value.
    """
    for override in overrides:
        _apply_override(value, override)


def parse_config(
    value: dict[str, Any], where: str, unexpanded: Unexpanded | None = None
) -> RunConfig:
    """Checks a raw configuration.

    Args:
        value: its variables are expanded.
        where: the name of the file, for messages.
        unexpanded: what was written before, for messages.

    Raises:
        ConfigError: names every invalid key, the value found, and the nearest known key.
    """
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(_describe(item) for item in error.errors())
        variables = None if unexpanded is None else unexpanded.variables
        raise ConfigError(f"{where}: {without_secrets(problems, variables)}.") from error


def _apply_override(value: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(
            f"--set {override[:200]!r}: expected a.b=value, such as --set train.learning_rate=1e-4"
        )
    try:
        parsed = parse_yaml(text) if text.strip() else ""
    except ValueError as error:
        raise ConfigError(
            f"--set {override[:200]!r}: the value is not YAML that can be read: {error}"
        ) from error
    if isinstance(parsed, str) and _SCIENTIFIC.fullmatch(parsed):
        parsed = float(parsed)
    *parents, last = name.strip().split(".")
    node: Any = value
    for depth, key in enumerate(parents):
        node = _child(node, key, override, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, key: str, override: str, path: str) -> Any:
    place: Any = _index(node, key, override) if isinstance(node, list) else key
    child = node[place] if isinstance(node, list) else node.setdefault(place, {})
    # A section that is null in the file, such as `lora:`, is empty until a key of it is set.
    if child is None:
        child = node[place] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"--set {override[:200]!r}: expected a section at {path}, found the value "
            f"{child!r:.200}"
        )
    return child


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
        raise ConfigError(
            f"--set {override[:200]!r}: expected an index from 0 to {len(node) - 1}, found "
            f"{key!r:.100}"
        )
    return int(key)


def _expand(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner) for inner in value]
    if isinstance(value, str):
        return os.path.expandvars(os.path.expanduser(value))
    return value


def _read_variables(value: Any) -> Unexpanded:
    """The variables in a raw configuration, and the texts that hold them."""
    texts: dict[tuple[str, ...], tuple[str, str]] = {}
    variables: dict[str, str] = {}

    def read(place: tuple[str, ...], inner: Any) -> None:
        if isinstance(inner, dict | list):
            for key, item in inner.items() if isinstance(inner, dict) else enumerate(inner):
                read((*place, str(key)), item)
        elif isinstance(inner, str):
            names = {one or other for one, other in _VARIABLE.findall(inner)} & os.environ.keys()
            if names:
                texts[place] = (inner, _expand(inner))
                variables.update({name: os.environ[name] for name in names})

    read((), value)
    return Unexpanded(texts=texts, variables=variables)


def _describe(item: Any) -> str:
    location = [key for key in item["loc"] if key != "function-after"]
    name = ".".join(str(key) for key in location)
    if item["type"] == "extra_forbidden":
        keys = _section_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), keys, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(keys)}"
        return f"{name}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{name}: required, but missing"
    message = item["msg"].removeprefix("Value error, ")
    value = item["input"]
    # A whole section as the value found would bury the message.
    shown = "" if isinstance(value, dict | list) or not name else f", found {reprlib.repr(value)}"
    return f"{name}: {message}{shown}" if name else message


def _section_keys(location: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for key in location:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(key)
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
        section = _section_of(inner)
        if section is not None:
            return section
    return None
