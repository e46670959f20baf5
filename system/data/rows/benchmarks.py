"""Decontamination: train rows must not hold a long run of words of a benchmark.

Every text in a benchmark file counts, whatever the file's shape (rows of any kind, or plain text);
texts of fewer words than the run are not looked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from system.data.duplicates.shingles import find_words, ngrams
from system.data.read.blocks import read_blocks, split_lines
from system.data.read.readers import FileRange, read_rows
from system.data.rows.bodies import cut_by_bytes

_BATCH_TEXTS = 1024
_EXCERPT_CHARS = 200
_SEARCHED_CHARS = 2**20


class BenchmarkIndex:
    """All runs of `size` words in some files."""

    def __init__(self, uris: tuple[str, ...], size: int) -> None:
        self._size = size
        self._uris = uris
        found = [self._grams_of(uri) for uri in uris]
        hashes = np.concatenate(found) if found else np.zeros(0, np.uint64)
        files = np.concatenate([np.full(len(g), k, np.int32) for k, g in enumerate(found)])
        self._hashes, first = np.unique(hashes, return_index=True)
        self._files = files[first]

    def _grams_of(self, uri: str) -> np.ndarray:
        found = [np.zeros(0, np.uint64)]
        batch: list[str] = []
        for text in _texts(uri):
            batch.append(text)
            if len(batch) == _BATCH_TEXTS:
                found.append(ngrams(find_words(batch), self._size, keep_short=False)[0])
                batch = []
        if batch:
            found.append(ngrams(find_words(batch), self._size, keep_short=False)[0])
        return np.unique(np.concatenate(found))

    def find(self, rows: Sequence[Sequence[str]]) -> dict[int, str]:
        """Number of a row, given as its turns -> the file that shares a run of words with it.

        Rows are looked at many at once; what is found in one does not depend on the others.
        """
        found: dict[int, str] = {}
        if len(self._hashes):
            sizes = np.array([sum(map(len, turns)) for turns in rows], np.int64)
            for run in cut_by_bytes(sizes, _SEARCHED_CHARS):
                some = self._find_some(rows[run])
                found |= {run.start + row: overlap for row, overlap in some.items()}
        return found

    def _find_some(self, rows: Sequence[Sequence[str]]) -> dict[int, str]:
        contents = [text for turns in rows for text in turns]
        row_of = np.repeat(np.arange(len(rows)), [len(turns) for turns in rows])
        grams, texts = ngrams(find_words(contents), self._size, keep_short=False)
        places = np.searchsorted(self._hashes, grams).clip(max=len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[places] == grams)
        present, first, counts = np.unique(
            row_of[texts[hits]], return_index=True, return_counts=True
        )
        found: dict[int, str] = {}
        for row, hit, count in zip(present.tolist(), hits[first].tolist(), counts, strict=True):
            uri = self._uris[self._files[places[hit]]]
            excerpt = contents[texts[hit]][:_EXCERPT_CHARS]
            found[row] = f"{count} runs of {self._size} words are in {uri}, in: {excerpt}"
        return found


@functools.lru_cache(maxsize=1)
def benchmark_index(uris: tuple[str, ...], size: int) -> BenchmarkIndex:
    """The index of these files, made once in a process."""
    return BenchmarkIndex(uris, size)


def _texts(uri: str) -> Iterator[str]:
    if uri.lower().endswith((".txt", ".md")):
        for line in split_lines(read_blocks(uri, None), 0, None):
            if line is not None:
                yield line.decode("utf-8", "replace")
        return
    for _, row in read_rows(FileRange(file=0, uri=uri, stamp="")):
        yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
