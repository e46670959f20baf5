"""Reads YAML that a person wrote: bounded, and without surprises.

Aliases may repeat a part of the text (`*name`), but not so often that the value becomes huge, and
not inside itself.  Dates stay text, because no setting is a date.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_TEXT = 16 * 2**20
"""Largest number of characters."""
_MAX_NODES = 1_000_000
"""Largest number of values, with every alias replaced by what it repeats."""
_MAX_DEPTH = 100
_MAX_BITS = 1000
"""Largest number of bits of a whole number; float64 holds a few more."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that neither a file name nor UTF-8 can hold."""


class _Loader(yaml.SafeLoader):
    """The safe loader without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str) -> Any:
    """Reads one document; parts that aliases repeat become separate values.

    Raises:
        ValueError: the text is not YAML, a value cannot be built, a key occurs twice in a mapping,
            or the value is too large or too deep.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has {len(text):,} characters, more than {MAX_TEXT:,}")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _measure(root)
        return _separate(loader.construct_document(root))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        raise ValueError(why) from error
    # PyYAML builds values without looking at them first: `!!bool perhaps` is a KeyError.
    except (LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"a value cannot be built ({type(error).__name__}: {error})") from error


def _measure(root: yaml.Node) -> None:
    """Refuses values that would be huge, endless or ambiguous, before they are built."""
    sizes: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()

    def measured(node: yaml.Node) -> tuple[int, int]:
        """Number of values in the node, and its depth."""
        if id(node) in open_nodes:
            raise ValueError(f"an alias repeats the value that it is a part of{_place(node)}")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts = [measured(part) for part in _parts(node)]
            open_nodes.remove(id(node))
            size = 1 + sum(part[0] for part in parts)
            depth = 1 + max((part[1] for part in parts), default=0)
            if size > _MAX_NODES:
                raise ValueError(f"aliases repeat it to more than {_MAX_NODES:,} values")
            if depth > _MAX_DEPTH:
                raise ValueError(f"it is nested more than {_MAX_DEPTH} deep{_place(node)}")
            sizes[id(node)] = size, depth
        return sizes[id(node)]

    measured(root)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise ValueError(f"the key {key.value!r:.100} occurs twice{_place(key)}")
            seen.add((key.tag, key.value))
    return [part for pair in node.value for part in pair]


def _place(node: yaml.Node) -> str:
    return f" in line {node.start_mark.line + 1}" if node.start_mark else ""


def _separate(value: Any) -> Any:
    """A copy in which no two places share a list or mapping, so that each can be changed alone."""
    if isinstance(value, dict):
        return {_plain(key): _separate(inner) for key, inner in value.items()}
    return [_separate(inner) for inner in value] if isinstance(value, list) else _plain(value)


def _plain(value: Any) -> Any:
    """The text, number, truth value or null; everything else is refused."""
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(
            f"expected texts and numbers, found a value of type {type(value).__name__}"
        )
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError("a number has more than 300 digits")
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise ValueError(f"the text {value!r:.100} has a character that no text may hold")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
