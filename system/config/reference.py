"""Writes the reference of the configuration, `docs/config.md`, from the pydantic models.

The meaning of a key is the docstring under its field.  Its possible values come from its type.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from system.config import RunConfig

_INTRODUCTION = """\
# The configuration

This page lists every key of a run's YAML file; `instructmix config` prints it, and
`instructmix config --defaults` prints all defaults as YAML. Complete files are in `configs/`.
`--set a.b=value` overrides one key. `${NAME}` in a text of the file stands for a variable of the
environment; keep passwords and signed addresses in variables, because everything that a run writes
has the name instead of the value. Unknown keys are errors. `instructmix check CONFIG` reports
what is wrong with a file. `null` leaves a key unset.
"""
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_NUMBERS = (int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a section."""

    name: str
    type: str
    """Its possible values, in words."""
    default: str
    """One line of YAML in backticks, or `required`, or `see section`."""
    text: str
    """Its meaning, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionReference:
    """One section: all keys of one pydantic model."""

    paths: tuple[str, ...]
    """Places of the section, such as `influence.lora` and `train.lora`; `` for the top level."""
    text: str
    """Its meaning, in one line."""
    keys: tuple[Key, ...]


def read_sections() -> tuple[SectionReference, ...]:
    """All sections, each once, in the order of the configuration, the top level first."""
    paths: dict[type[BaseModel], list[str]] = {}
    _collect(RunConfig, "", paths)
    return tuple(
        SectionReference(
            paths=tuple(model_paths),
            text=_one_line(model.__doc__),
            keys=tuple(_key(name, field) for name, field in model.model_fields.items()),
        )
        for model, model_paths in paths.items()
    )


def render_reference() -> str:
    """The whole page as Markdown, with one table for each section."""
    parts = [_INTRODUCTION]
    for section in read_sections():
        title = (
            ", ".join(f"`{path}`" for path in section.paths) if section.paths[0] else "Top level"
        )
        lines = [f"## {title}", "", section.text, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            cells = (f"`{key.name}`", key.type, key.default, key.text)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def render_defaults() -> str:
    """All defaults as a YAML file, whose first line lists the required keys.

    Sections that are unset by default (`lora`) are null; the reference has their keys.
    """
    required: list[str] = []
    values = _defaults(RunConfig, "", required)
    head = f"# Required as well: {', '.join(required)}.\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _collect(model: type[BaseModel], path: str, paths: dict[type[BaseModel], list[str]]) -> None:
    paths.setdefault(model, []).append(path)
    for name, field in model.model_fields.items():
        for inner, suffix in _sections_in(field.annotation):
            _collect(inner, f"{path}.{name}{suffix}".removeprefix("."), paths)


def _sections_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The sections inside a type, each with its path suffix: `[]` in a list, `.NAME` in a map."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
        return
    origin = get_origin(annotation)
    if origin is tuple:
        suffix += "[]"
    elif origin is dict:
        suffix += ".NAME"
    for inner in get_args(annotation):
        yield from _sections_in(inner, suffix)


def _key(name: str, field: FieldInfo) -> Key:
    section = next(_sections_in(field.annotation), None)
    text = field.description or (section[0].__doc__ if section else "")
    return Key(
        name=name,
        # Where null is the default, the default says that it is allowed.
        type=_describe(field.annotation, field.metadata).removesuffix(" or null"),
        default=_default(field),
        text=_one_line(text),
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see section"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(inner[0], _limits(inner[1:]))
    if origin in (Union, types.UnionType):
        parts = [_describe(part, metadata) for part in inner if part is not type(None)]
        return " or ".join([*parts, *(["null"] if type(None) in inner else [])])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is tuple:
        return _describe_list(inner)
    if origin is dict:
        return f"map: name -> {_describe(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    bounds = _bounds(metadata) if annotation in _NUMBERS else ""
    return " ".join(filter(None, (_NAMES[annotation], bounds)))


def _describe_list(inner: tuple[Any, ...]) -> str:
    if inner[-1] is not Ellipsis:
        return f"[{', '.join(_describe(part) for part in inner)}]"
    return f"list of {_describe(inner[0])}"


def _limits(metadata: Sequence[Any]) -> list[Any]:
    """The bounds in the metadata of a type, including those inside a `Field(...)`."""
    limits: list[Any] = []
    for item in metadata:
        limits += item.metadata if isinstance(item, FieldInfo) else [item]
    return limits


def _bounds(metadata: Sequence[Any]) -> str:
    low = high = ""
    for limit in metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f">= {limit.ge:g}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"> {limit.gt:g}"
        elif isinstance(limit, annotated_types.Le):
            high = f"<= {limit.le:g}"
        elif isinstance(limit, annotated_types.Lt):
            high = f"< {limit.lt:g}"
    return ", ".join(filter(None, (low, high)))


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _defaults(model: type[BaseModel], path: str, required: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        where = f"{path}.{name}".removeprefix(".")
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            values[name] = _defaults(section, where, required)
        elif field.is_required():
            required.append(where)
        else:
            value = field.get_default(call_default_factory=True)
            values[name] = list(value) if isinstance(value, tuple) else value
    return values
