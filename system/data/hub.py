"""Hugging Face `datasets`: hub ids, and directories written by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from system.data.sources import parse_hub
from system.data.tables import BATCH_ROWS
from system.errors import DataError


def dataset_batches(uri: str, is_hub: bool) -> Iterator[pa.RecordBatch]:
    """The rows of a data set as Arrow batches, in its order.

    Raises:
        DataError: it cannot be loaded, or has no split of that name.
    """
    dataset = _load_hub(uri) if is_hub else _load_directory(uri)
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), BATCH_ROWS):
        yield from arrow[start : start + BATCH_ROWS].to_batches()


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
