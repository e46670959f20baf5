"""Reads Hugging Face `datasets`: ids of the hub, and directories written by `save_to_disk`."""

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
from system.foreign_tables import checked_table


@functools.cache
def hub_builder(uri: str) -> Any:
    """The builder of a hub data set: what `datasets` knows before the data is downloaded.

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
    """The parts of the address of a hub data set."""

    path: str
    revision: str | None
    config: str | None
    split: str


def parse_hub(uri: str) -> HubSource:
    """`hf://owner/name@revision?config=c&split=s`; the default split is `train`."""
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
    """Size and stamp of a hub data set.  The builder's directory ends in a hash of its files."""
    builder = hub_builder(uri)
    size = getattr(builder.info, "dataset_size", None) or 0
    return int(size), "/".join(PurePosixPath(builder.cache_dir).parts[-3:])


def dataset_batches(
    uri: str, is_hub: bool, start: int = 0, end: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows from `start` up to `end` (excluded) of a data set as Arrow batches, in order.

    Raises:
        DataError: it cannot be loaded, or has no split of that name.
    """
    dataset = _load_hub(uri) if is_hub else _load_directory(uri)
    arrow = dataset.with_format("arrow")
    last = len(dataset) if end is None else end
    try:
        if dataset._indices is not None:
            # Rows in another order are copied, which reads what nobody has checked yet.
            checked_table(dataset.data.table)
        for first in range(start, last, BATCH_ROWS):
            yield from arrow[first : min(first + BATCH_ROWS, last)].to_batches()
    except (IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{uri}: expected a whole data set, found one that is damaged: {error!r}. Download or "
            "write it again."
        ) from error


def count_rows(uri: str, is_hub: bool) -> int | None:
    """Number of rows of a data set, or None where it is unknown before the download.

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
        if storage.exists(storage.join(uri, "dataset_dict.json")):
            # Only the split that is used: the library cannot load a directory with an empty one.
            splits = storage.read_json(storage.join(uri, "dataset_dict.json"))["splits"]
            if "train" not in splits:
                raise DataError(
                    f"{uri}: expected a split named 'train', found {sorted(splits)}. Name the "
                    "directory of the split you mean."
                )
            uri = storage.join(uri, "train")
        files = storage.read_json(storage.join(uri, "state.json"))["_data_files"]
        if not files:
            return datasets.Dataset.from_dict({})
        if any("/" in file["filename"] for file in files):
            raise DataError(f"{uri}: expected files of its own, found {files} in state.json")
        return datasets.load_from_disk(uri)
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{uri}: expected a saved data set; it cannot be loaded: {error!r}. Write it again "
            "with `save_to_disk`."
        ) from error
