"""Hugging Face `datasets`: hub ids, and directories written by `save_to_disk`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

import pyarrow as pa

from system import storage
from system.data.read.tables import BATCH_ROWS
from system.errors import DataError


@functools.cache
def hub_builder(uri: str) -> Any:
    """What `datasets` knows of a hub data set before it is fetched.

    Raises:
        DataError: there is no such data set, or the hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    hub = parse_hub(uri)
    try:
        return datasets.load_dataset_builder(hub.path, hub.config, revision=hub.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{uri}: expected a data set of the Hugging Face hub, `hf://owner/name[@revision]"
            f"[?config=...&split=...]`; it cannot be opened: {error}"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A hub data set's address."""

    path: str
    revision: str | None
    config: str | None
    split: str


def parse_hub(uri: str) -> HubSource:
    """`hf://owner/name@revision?config=c&split=s`; the split is `train` where none is given."""
    address, _, query = uri.removeprefix("hf://").partition("?")
    options = {name: values[-1] for name, values in parse_qs(query).items()}
    unknown = sorted(set(options) - {"config", "split"})
    if unknown or not address:
        raise DataError(
            f"{uri!r}: expected hf://owner/name[@revision][?config=...&split=...], found "
            f"{unknown or 'no name'}"
        )
    path, _, revision = address.partition("@")
    return HubSource(
        path=path,
        revision=revision or None,
        config=options.get("config"),
        split=options.get("split", "train"),
    )


@functools.cache
def stat_hub(uri: str) -> tuple[int, str]:
    """The version of a hub data set: its builder's directory ends in the hash of its files."""
    builder = hub_builder(uri)
    size = getattr(builder.info, "dataset_size", None) or 0
    return int(size), "/".join(PurePosixPath(builder.cache_dir).parts[-3:])


def dataset_batches(
    uri: str, is_hub: bool, start: int = 0, end: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows `start` to before `end` of a data set as Arrow batches, in its order.

    Raises:
        DataError: it cannot be loaded, or has no split of that name.
    """
    dataset = _load_hub(uri) if is_hub else _load_directory(uri)
    arrow = dataset.with_format("arrow")
    last = len(dataset) if end is None else end
    for first in range(start, last, BATCH_ROWS):
        yield from arrow[first : min(first + BATCH_ROWS, last)].to_batches()


def count_rows(uri: str, is_hub: bool) -> int | None:
    """Rows of a data set, where they are known without fetching it.

    Raises:
        DataError: it cannot be loaded, or has no split of that name.
    """
    if not is_hub:
        return len(_load_directory(uri)) if storage.local_path(uri) is not None else None
    hub = parse_hub(uri)
    splits = hub_builder(uri).info.splits or {}
    return splits[hub.split].num_examples if hub.split in splits else None


def _load_hub(uri: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    hub = parse_hub(uri)
    try:
        return datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{uri}: the data set cannot be loaded: {error.__cause__ or error}"
        ) from error


def _load_directory(uri: str) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(uri)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{uri}: expected a saved data set; it cannot be loaded: {error}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if "train" not in found:
        raise DataError(
            f"{uri}: expected a split named 'train', found {sorted(found)}. Name the directory of "
            "the split you mean."
        )
    return found["train"]
