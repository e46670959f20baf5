"""Many rows in their normal form at once, column by column.

The result is that of `system.data.rows.conversation.normalise` for each row; most rows are one
question and one answer without a surprise in them, and those take a short way:

- the answer's hash goes on where the question's ended, for the question's bytes are the first of
  the conversation's
- control characters are looked for in all texts of the batch together; a row with one is then
  looked at again by `normalise`, which knows what they mean (a line end, or a reason to reject)
"""

from __future__ import annotations

import bisect
import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.data.read.raw_rows import RawRow
from system.data.rows.conversation import RowRejected, Turn, normalise

ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")
"""What the codes in `NormalBatch.roles` mean."""

_CODES = {role: code for code, role in enumerate(ROLES)}
_PAIR = bytes([_CODES["user"], _CODES["assistant"]])
_BEFORE_QUESTION = hashlib.sha256(b"user\x1f")
_BEFORE_ANSWER = b"\x1eassistant\x1f"
_DENSE = 8
"""With more than one other character in so many bytes, Python's own check is the cheaper one."""
INERT: tuple[tuple[int, int], ...] = (
    (0x0000, 0x0300),  # Latin
    (0x0388, 0x0483),  # Greek, Cyrillic
    (0x048A, 0x0530),
    (0x2002, 0x20D0),  # punctuation, currencies
    (0x2100, 0x2126),  # signs
    (0x212C, 0x2329),  # numbers, arrows, mathematics
    (0x232B, 0x2ADC),
    (0x3000, 0x302A),  # Chinese, Japanese
    (0x3030, 0x3099),
    (0x309B, 0x3100),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),  # Korean
    (0xFF00, 0xFFF0),  # full width
    (0x1F300, 0x1FB00),  # pictures
)
"""Ranges of characters that no normalisation to NFC touches, whatever stands around them."""
_INERT = np.array([bound for bounds in INERT for bound in bounds])


@dataclass(slots=True, kw_only=True)
class NormalBatch:
    """Rows that may enter the corpus, in the order of the batch, and those that may not."""

    places: list[int] = field(default_factory=list)
    """Place in the batch, a row each."""
    ids: list[bytes] = field(default_factory=list)
    """The id's 16 bytes, a row each."""
    prompts: list[bytes] = field(default_factory=list)
    """The first 8 bytes of the hash over the prompt side, a row each."""
    num_turns: list[int] = field(default_factory=list)
    roles: bytearray = field(default_factory=bytearray)
    """A code of ROLES for each turn."""
    texts: list[bytes] = field(default_factory=list)
    """UTF-8, a turn each."""
    rejected: list[tuple[int, RowRejected]] = field(default_factory=list)
    """Place in the batch and why, in no order."""

    @property
    def num_bytes(self) -> int:
        """Size of all texts."""
        return sum(map(len, self.texts))

    def responses(self) -> list[bytes]:
        """The last turn of each row."""
        return [self.texts[end - 1] for end in np.cumsum(self.num_turns).tolist()]

    def turns_of(self, row: int) -> list[bytes]:
        """The texts of the row with this number."""
        start = sum(self.num_turns[:row])
        return self.texts[start : start + self.num_turns[row]]

    def keep(self, rows: Sequence[int]) -> NormalBatch:
        """The rows with these numbers, in that order; `rejected` stays."""
        ends = np.cumsum(self.num_turns, dtype=np.int64).tolist()
        spans = [(ends[row] - self.num_turns[row], ends[row]) for row in rows]
        return NormalBatch(
            places=[self.places[row] for row in rows],
            ids=[self.ids[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            num_turns=[self.num_turns[row] for row in rows],
            roles=bytearray(b"".join(self.roles[start:end] for start, end in spans)),
            texts=[text for start, end in spans for text in self.texts[start:end]],
            rejected=self.rejected,
        )


def normalise_batch(
    values: Sequence[RawRow], turns_of: Callable[[dict[str, Any]], list[Turn]], max_chars: int
) -> NormalBatch:
    """The rows in their normal form.

    Args:
        values: rows as a reader gives them; None is no row.
        turns_of: the shape of the rows.
        max_chars: longer conversations are rejected.
    """
    batch = NormalBatch()
    places, ids, prompts, texts = batch.places, batch.ids, batch.prompts, batch.texts
    start = _BEFORE_QUESTION.copy
    left: list[tuple[int, list[Turn]]] = []
    mixed: list[int] = []
    for place, value in enumerate(values):
        if type(value) is not dict:
            if value is not None:
                batch.rejected.append((place, RowRejected(value.reason, value.detail)))  # type: ignore[union-attr]
            continue
        try:
            turns = turns_of(value)
            if len(turns) == 2:
                (first, asked), (second, said) = turns
                asked, said = asked.rstrip().lstrip("\n"), said.rstrip().lstrip("\n")
                # A text that begins with white space is not the text that is hashed.
                if (
                    first == "user"
                    and second == "assistant"
                    and asked
                    and said
                    and len(asked) + len(said) <= max_chars
                    and not asked[0].isspace()
                    and not said[0].isspace()
                    and "\r" not in asked
                    and "\r" not in said
                ):
                    pair = (asked.encode(), said.encode())
                    digest = start()
                    digest.update(pair[0])
                    prompts.append(digest.digest()[:8])
                    digest.update(_BEFORE_ANSWER + pair[1])
                    ids.append(digest.digest()[:16])
                    texts += pair
                    if not (asked.isascii() and said.isascii()):
                        mixed.append(len(places))
                    places.append(place)
                    continue
        except RowRejected as why:
            batch.rejected.append((place, why))
            continue
        except UnicodeEncodeError:
            pass
        left.append((place, turns))
    doubtful = sorted({*_with_control(texts), *_not_composed(texts, mixed)})
    left += [(places[row], turns_of(values[places[row]])) for row in doubtful]  # type: ignore[arg-type]
    for row in reversed(doubtful):
        del places[row], ids[row], prompts[row], texts[2 * row : 2 * row + 2]
    batch.num_turns = [2] * len(places)
    batch.roles = bytearray(_PAIR * len(places))
    _insert(batch, left, max_chars)
    return batch


def _with_control(texts: Sequence[bytes]) -> set[int]:
    """Rows of two texts each in which there is a control character besides tab and line feed."""
    joined = b"".join(texts)
    data = np.frombuffer(joined, np.uint8)
    num_low = np.count_nonzero(data < 0x20)
    num_known = np.count_nonzero(data == 0x0A) + joined.count(b"\t")
    if num_low == num_known and b"\x7f" not in joined:
        return set()
    control = (data < 0x20) & (data != 0x0A) & (data != 0x09) | (data == 0x7F)
    return _rows_at(np.flatnonzero(control), texts)


def _not_composed(texts: Sequence[bytes], mixed: Sequence[int]) -> set[int]:
    """Rows of two texts each that are not in NFC; `mixed` are those that are not plain ASCII."""
    own = [text for row in mixed for text in texts[2 * row : 2 * row + 2]]
    data = np.frombuffer(b"".join(own), np.uint8)
    rows = {mixed[row] for row in _rows_at(_composing_places(data), own)}
    is_normal = unicodedata.is_normalized
    return {
        row
        for row in rows
        if not all(is_normal("NFC", text.decode()) for text in texts[2 * row : 2 * row + 2])
    }


def _rows_at(places: np.ndarray, texts: Sequence[bytes]) -> set[int]:
    """Rows of two texts each that have these bytes, counted from the first text's beginning."""
    if not len(places):
        return set()
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    return set((np.searchsorted(ends, places, side="right") // 2).tolist())


def _composing_places(data: np.ndarray) -> np.ndarray:
    """Places of characters that may combine with others, so that a text might not be in NFC.

    Python's own check looks at every character of a text that is not plain ASCII; here only the
    rare ones are looked at.
    """
    places = np.flatnonzero(data >= 0xCC)  # first bytes of U+0300 and above
    if len(places) * _DENSE > len(data):
        return places
    first = data[places].astype(np.int32)
    last = len(data) - 1
    a, b, c = (data[np.minimum(places + k, last)].astype(np.int32) & 0x3F for k in (1, 2, 3))
    two = (first & 0x1F) << 6 | a
    three = (first & 0x0F) << 12 | a << 6 | b
    four = (first & 0x07) << 18 | a << 12 | b << 6 | c
    codes = np.where(first < 0xE0, two, np.where(first < 0xF0, three, four))
    return places[np.searchsorted(_INERT, codes, side="right") % 2 == 0]


def _insert(batch: NormalBatch, left: list[tuple[int, list[Turn]]], max_chars: int) -> None:
    """Puts the rows that need a closer look into a batch of pairs, each in its place."""
    num_more = 0
    for place, turns in sorted(left, key=lambda item: item[0]):
        try:
            found = normalise(turns, max_chars)
        except RowRejected as why:
            batch.rejected.append((place, why))
            continue
        row = bisect.bisect(batch.places, place)
        turn = 2 * row + num_more
        num_more += len(found.roles) - 2
        batch.places.insert(row, place)
        batch.ids.insert(row, bytes.fromhex(found.id))
        batch.prompts.insert(row, found.prompt_hash.to_bytes(8, "big"))
        batch.num_turns.insert(row, len(found.roles))
        batch.roles[turn:turn] = bytes([_CODES[role] for role in found.roles])
        batch.texts[turn:turn] = [text.encode() for text in found.contents]


def splits_of(prompts: Sequence[bytes], estimate_share: float, test_share: float) -> np.ndarray:
    """[len(prompts)] int8: `system.data.rows.conversation.split_of` for each hash."""
    place = np.frombuffer(b"".join(prompts), ">u8").astype(np.float64) / 2.0**64
    return np.where(place < test_share, 2, place < test_share + estimate_share).astype(np.int8)
