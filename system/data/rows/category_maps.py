"""The `category_map` of a source, from the configuration or from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from system import storage
from system.config import SourceConfig
from system.config.data import name_of
from system.data.read.listing import locate
from system.data.read.readers import FileRange, read_rows
from system.errors import DataError

_KINDS = "expected CSV, TSV, JSON, JSONL, Parquet or YAML"


def with_category_map(source: SourceConfig, data_dir: str) -> SourceConfig:
    """The source with its map; a map in a file is read.

    Raises:
        DataError: the file is missing, or is no map.
    """
    if isinstance(source.category_map, dict):
        return source
    uri = locate(source.category_map, data_dir)
    return source.model_copy(update={"category_map": read_category_map(uri)})


def category_map_digests(sources: tuple[SourceConfig, ...], data_dir: str) -> dict[str, str]:
    """The content of every map that lies in a file, as a hash by address.

    Raises:
        DataError: a file is missing.
    """
    paths = [source.category_map for source in sources if isinstance(source.category_map, str)]
    uris = [locate(path, data_dir) for path in paths]
    return {f"category_map {uri}": hashlib.sha256(_content(uri)).hexdigest() for uri in uris}


def read_category_map(uri: str) -> dict[str, str]:
    """The category of each value: a mapping, or rows of `category` and one other column.

    Raises:
        DataError: the file is missing, or is no map.
    """
    categories: dict[str, str] = {}
    for number, (value, category) in enumerate(_pairs(uri)):
        if not all(
            isinstance(item, str | int | float) and not isinstance(item, bool)
            for item in (value, category)
        ):
            raise DataError(
                f"{uri}: expected a text for a text, found {value!r} -> {category!r} at {number}. "
                "Put names such as yes, no, on, off in quotes."
            )
        value, category = name_of(value), name_of(category)
        if categories.setdefault(value, category) != category:
            raise DataError(
                f"{uri}: expected one category for {value!r}, found {categories[value]!r} and "
                f"{category!r}"
            )
    if not categories:
        raise DataError(f"{uri}: expected the category of at least one value, found nothing")
    return categories


def _content(uri: str) -> bytes:
    if not storage.exists(uri):
        raise DataError(f"category_map: expected a file, found nothing at {uri}")
    return storage.read_bytes(uri)


def _pairs(uri: str) -> Iterator[tuple[Any, Any]]:
    name, data = uri.lower(), _content(uri)
    try:
        if name.endswith((".yaml", ".yml")):
            value = yaml.safe_load(data)
        elif name.endswith(".json"):
            value = json.loads(data)
        else:
            value = None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{uri}: {_KINDS}, found what cannot be read: {error}") from error
    if isinstance(value, Mapping):
        yield from value.items()
    elif name.endswith((".yaml", ".yml")):
        raise DataError(f"{uri}: expected `value: category` lines, found no mapping")
    else:
        for number, row in read_rows(FileRange(file=0, uri=uri, stamp="")):
            others = [key for key in row if key != "category"] if isinstance(row, dict) else []
            if not isinstance(row, dict) or "category" not in row or len(others) != 1:
                raise DataError(
                    f"{uri}: expected `category` and one other column, found {row!r:.200} in row "
                    f"{number}"
                )
            yield row[others[0]], row["category"]
