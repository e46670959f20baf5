"""Words, word n-grams and MinHash signatures of many texts at once, in numpy.

A word is a run of ASCII letters and digits or of non-ASCII characters, in lower case.  In scripts
without spaces between words (CJK, Hangul, and all characters beyond the basic plane) each character
is a word.  The hash of a word is a polynomial over its UTF-8 bytes modulo 2^64, then mixed; it is
the same on every machine.  Used by `near` and by the filter against benchmarks.

Shapes: R rows, W words, G n-grams, K = 128 bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_BINS = 128
"""Bins of a signature: the standard error of a similarity of 0.8 is 0.035."""

_BIN_BITS = 7
_PRIME = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_PRIME, -1, 2**64)
_EMPTY = np.uint64(2**64 - 1)
_MASK = 2**64 - 1


class Words(NamedTuple):
    """The words of several texts, one after the other."""

    hashes: np.ndarray
    """[W] uint64."""
    rows: np.ndarray
    """[W] int64: index of the text that each word belongs to, ascending."""
    num_rows: int


def _word_bytes() -> np.ndarray:
    table = np.zeros(256, bool)
    table[list(b"0123456789abcdefghijklmnopqrstuvwxyz")] = True
    table[128:] = True
    return table


def _lone_leads() -> np.ndarray:
    """First bytes of characters that are words of their own: from U+3000, not U+EE00-U+FFFF."""
    table = np.zeros(256, bool)
    table[0xE3:0xEE] = True
    table[0xF0:0xF8] = True
    return table


_IS_WORD = _word_bytes()
_IS_LONE = _lone_leads()


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(base: int, count: int) -> np.ndarray:
    """[count] uint64: base^0, base^1, ... modulo 2^64."""
    powers = np.ones(count, np.uint64)
    filled, step = 1, base & _MASK
    while filled < count:
        width = min(filled, count - filled)
        powers[filled : filled + width] = powers[:width] * np.uint64(step)
        filled += width
        step = (step * step) & _MASK
    return powers


def find_words(texts: Sequence[str]) -> Words:
    """The words of every text."""
    # All texts become one byte array, separated by blanks, so that numpy handles them together.
    encoded = [text.lower().encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    data = np.frombuffer(b" ".join(encoded) + b" ", np.uint8)
    row_ends = np.cumsum(lengths + 1)
    inside = _IS_WORD[data]
    is_lone = _IS_LONE[data]
    before = np.concatenate([[False], inside[:-1]])
    after_lone = _after_lone_character(is_lone, data)
    starts = np.flatnonzero(inside & (~before | is_lone | after_lone))
    is_end = np.zeros(len(data), bool)
    is_end[starts[1:]] = True
    stops = np.flatnonzero(before & (~inside | is_end))
    # A word's polynomial is the difference of two prefix sums, divided by the power at its start
    # (the prime is odd, so it has an inverse modulo 2^64).
    powers = _powers(_PRIME, len(data))
    sums = np.concatenate([[np.uint64(0)], np.cumsum((data.astype(np.uint64) + 1) * powers)])
    inverse = _powers(_INVERSE, len(data))
    hashes = mix((sums[stops] - sums[starts]) * inverse[starts])
    return Words(hashes, np.searchsorted(row_ends, starts, side="right"), len(texts))


def _after_lone_character(is_lone: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Marks each byte that directly follows a character that is a word of its own."""
    is_after = np.zeros(len(data), bool)
    for width, leads in ((3, is_lone & (data < 0xF0)), (4, is_lone & (data >= 0xF0))):
        places = np.flatnonzero(leads) + width
        is_after[places[places < len(data)]] = True
    return is_after


def ngrams(words: Words, size: int, keep_short: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and rows of all n-grams of `size` words, each within one text.

    With `keep_short` a text with fewer words (but at least one) gives one n-gram of all its words.

    Returns:
        [G] uint64 hashes, [G] int64 rows, ascending.
    """
    counts = np.bincount(words.rows, minlength=words.num_rows)
    hashes = _runs(words.hashes, size)
    # A run whose first and last word belong to different texts crosses a border: left out.
    first = np.arange(len(words.hashes) - size + 1)
    whole = words.rows[first] == words.rows[first + size - 1] if len(first) else first.astype(bool)
    grams, rows = hashes[whole], words.rows[: len(whole)][whole]
    if not keep_short:
        return grams, rows
    short = np.flatnonzero((counts > 0) & (counts < size))
    if not len(short):
        return grams, rows
    ends = np.cumsum(counts)
    extra = np.array(
        [
            _runs(words.hashes[end - count : end], count)[0]
            for end, count in zip(ends[short].tolist(), counts[short].tolist(), strict=True)
        ],
        np.uint64,
    )
    grams, rows = np.concatenate([grams, extra]), np.concatenate([rows, short])
    order = np.argsort(rows, kind="stable")
    return grams[order], rows[order]


def _runs(hashes: np.ndarray, size: int) -> np.ndarray:
    """[W - size + 1] uint64: a hash of each run of `size` words."""
    count = max(len(hashes) - size + 1, 0)
    total = np.zeros(count, np.uint64)
    for place, power in enumerate(_powers(_PRIME, size)):
        total += hashes[place : place + count] * power
    return mix(total)


def minhash(grams: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """[R, K] uint64: one-permutation MinHash signatures; rows without an n-gram are all ones.

    Each n-gram falls into one bin, and the bin keeps the smallest hash.  An empty bin borrows from
    the bins that a fixed pseudo-random sequence names (optimal densification).  The share of bins
    in which two signatures agree has the Jaccard similarity of the two sets of n-grams as its
    expectation.
    Source: Li, Owen & Zhang 2012; Shrivastava 2017 (arXiv 1703.04664).
    """
    bins = (grams >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
    values = mix(grams)
    signature = np.full(num_rows * NUM_BINS, _EMPTY)
    np.minimum.at(signature, rows * NUM_BINS + bins, values)
    signature = signature.reshape(num_rows, NUM_BINS)
    empty = signature == _EMPTY
    # Bins borrow from the signature as it was before any borrowing, so order does not matter.
    source = signature.copy()
    open_rows = np.flatnonzero(empty.any(axis=1) & ~empty.all(axis=1))
    attempt = 0
    while len(open_rows):
        attempt += 1
        lender = _lenders(attempt)
        borrowed = source[open_rows][:, lender]
        can = empty[open_rows] & (borrowed != _EMPTY)
        part = signature[open_rows]
        part[can] = mix(borrowed + np.uint64(1))[can]
        signature[open_rows] = part
        empty[open_rows] &= ~can
        open_rows = open_rows[empty[open_rows].any(axis=1)]
    return signature


def _lenders(attempt: int) -> np.ndarray:
    """[K] int64: the bin that each bin borrows from in this attempt."""
    counter = np.arange(NUM_BINS, dtype=np.uint64) + np.uint64(attempt * NUM_BINS)
    return (mix(counter * np.uint64(_PRIME)) >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
