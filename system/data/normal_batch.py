"""Many rows in their normal form at once, column by column.

The result is that of `system.data.conversation.normalise` for each row; most rows are one question
and one answer without a surprise in them, and those take a short way:

- the answer's hash goes on where the question's ended, for the question's bytes are the first of
  the conversation's
- control characters are looked for in all texts of the batch together; a row with one is then
  looked at again by `normalise`, which knows what they mean (a line end, or a reason to reject)
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.data.conversation import Conversation, RowRejected, Turn, normalise
from system.data.readers import RawRow

ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")
"""What the codes in `NormalBatch.roles` mean."""

_CODES = {role: code for code, role in enumerate(ROLES)}
_PAIR = bytes([_CODES["user"], _CODES["assistant"]])
_BEFORE_QUESTION = hashlib.sha256(b"user\x1f")
_BEFORE_ANSWER = b"\x1eassistant\x1f"


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
    is_normal, start = unicodedata.is_normalized, _BEFORE_QUESTION.copy
    left: list[tuple[int, list[Turn]]] = []
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
                    and (asked.isascii() or is_normal("NFC", asked))
                    and (said.isascii() or is_normal("NFC", said))
                ):
                    pair = (asked.encode(), said.encode())
                    digest = start()
                    digest.update(pair[0])
                    prompts.append(digest.digest()[:8])
                    digest.update(_BEFORE_ANSWER + pair[1])
                    ids.append(digest.digest()[:16])
                    texts += pair
                    places.append(place)
                    continue
        except RowRejected as why:
            batch.rejected.append((place, why))
            continue
        except UnicodeEncodeError:
            pass
        left.append((place, turns))
    batch.num_turns = [2] * len(places)
    batch.roles = bytearray(_PAIR * len(places))
    doubtful = rows_with_control(texts)
    if doubtful:
        left += [(places[row], turns_of(values[places[row]])) for row in doubtful]  # type: ignore[arg-type]
        batch = batch.keep(sorted(set(range(len(places))) - set(doubtful)))
    return _with_others(batch, left, max_chars) if left else batch


def rows_with_control(texts: Sequence[bytes]) -> list[int]:
    """Rows of two texts each in which one holds a control character besides tab and line feed."""
    data = np.frombuffer(b"".join(texts), np.uint8)
    num_low = np.count_nonzero(data < 0x20)
    num_known = np.count_nonzero(data == 0x0A) + np.count_nonzero(data == 0x09)
    if num_low == num_known and not np.count_nonzero(data == 0x7F):
        return []
    found = np.flatnonzero((data < 0x20) & (data != 0x0A) & (data != 0x09) | (data == 0x7F))
    ends = np.cumsum([len(text) for text in texts])
    return np.unique(np.searchsorted(ends, found, side="right") // 2).tolist()


def _with_others(
    batch: NormalBatch, left: Sequence[tuple[int, list[Turn]]], max_chars: int
) -> NormalBatch:
    """The batch with the rows that need a closer look, all in order."""
    for place, turns in left:
        try:
            _add(batch, place, normalise(turns, max_chars))
        except RowRejected as why:
            batch.rejected.append((place, why))
    order = sorted(range(len(batch.places)), key=batch.places.__getitem__)
    return batch.keep(order)


def _add(batch: NormalBatch, place: int, row: Conversation) -> None:
    batch.places.append(place)
    batch.ids.append(bytes.fromhex(row.id))
    batch.prompts.append(row.prompt_hash.to_bytes(8, "big"))
    batch.num_turns.append(len(row.roles))
    batch.roles += bytes([_CODES[role] for role in row.roles])
    batch.texts += [text.encode() for text in row.contents]


def splits_of(prompts: Sequence[bytes], estimate_share: float, test_share: float) -> np.ndarray:
    """[len(prompts)] int8: `system.data.conversation.split_of` for each hash."""
    place = np.frombuffer(b"".join(prompts), ">u8").astype(np.float64) / 2.0**64
    return np.where(place < test_share, 2, place < test_share + estimate_share).astype(np.int8)
