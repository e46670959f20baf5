"""The normal form of many rows, as columns: what a chunk keeps of a batch of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.data.read.raw_rows import Defect, RawRow
from system.data.rows.conversation import Marks, RowRejected, Turn, normalise, without_reasoning

ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")
"""What the codes in `NormalBatch.roles` mean."""

_CODES = {role: code for code, role in enumerate(ROLES)}


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
    marks: dict[int, Marks] = field(default_factory=dict)
    """Number of a turn -> its marks; most turns have none."""
    rejected: list[tuple[int, RowRejected]] = field(default_factory=list)
    """Place in the batch and why, in the batch's order."""
    num_without_reasoning: int = 0
    """Rows whose reasoning was dropped."""

    @property
    def num_bytes(self) -> int:
        """Size of all texts, those of marks included."""
        marks = (text for mark in self.marks.values() for text in mark.texts)
        return sum(map(len, self.texts)) + sum(len(text.encode()) for text in marks)

    def responses(self) -> list[bytes]:
        """The last turn of each row."""
        return [self.texts[end - 1] for end in np.cumsum(self.num_turns).tolist()]

    def turns_of(self, row: int) -> list[bytes]:
        """The texts of the row with this number."""
        start = sum(self.num_turns[:row])
        return self.texts[start : start + self.num_turns[row]]

    def texts_of(self, rows: Sequence[int]) -> list[list[str]]:
        """The texts of these rows, reasoning included."""
        ends = np.cumsum(self.num_turns, dtype=np.int64).tolist()
        spans = [range(ends[row] - self.num_turns[row], ends[row]) for row in rows]
        found = [[self.texts[turn].decode() for turn in span] for span in spans]
        if self.marks:
            for span, texts in zip(spans, found, strict=True):
                marks = (self.marks[turn] for turn in span if turn in self.marks)
                texts += [mark.reasoning for mark in marks if mark.reasoning]
        return found

    def keep(self, rows: Sequence[int]) -> NormalBatch:
        """The rows with these numbers, in that order; `rejected` stays."""
        ends = np.cumsum(self.num_turns, dtype=np.int64).tolist()
        spans = [(ends[row] - self.num_turns[row], ends[row]) for row in rows]
        turns = (turn for start, end in spans for turn in range(start, end)) if self.marks else ()
        return NormalBatch(
            places=[self.places[row] for row in rows],
            ids=[self.ids[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            num_turns=[self.num_turns[row] for row in rows],
            roles=bytearray(b"".join(self.roles[start:end] for start, end in spans)),
            texts=[text for start, end in spans for text in self.texts[start:end]],
            marks={new: self.marks[turn] for new, turn in enumerate(turns) if turn in self.marks},
            rejected=self.rejected,
            num_without_reasoning=self.num_without_reasoning,
        )


def normalise_batch(
    values: Sequence[RawRow],
    turns_of: Callable[[dict[str, Any]], list[Turn]],
    max_chars: int,
    *,
    keep_reasoning: bool = True,
) -> NormalBatch:
    """The rows in their normal form.

    Args:
        values: rows as a reader gives them; None is no row.
        turns_of: the shape of the rows.
        max_chars: longer conversations are rejected.
        keep_reasoning: whether turns keep their reasoning.
    """
    batch = NormalBatch()
    for place, value in enumerate(values):
        if value is None:
            continue
        try:
            if isinstance(value, Defect):
                raise RowRejected(value.reason, value.detail)
            turns = turns_of(value)
            has_dropped = not keep_reasoning and any(
                len(turn) > 2 and turn[2].reasoning for turn in turns
            )
            conversation = normalise(without_reasoning(turns) if has_dropped else turns, max_chars)
        except RowRejected as why:
            batch.rejected.append((place, why))
            continue
        batch.places.append(place)
        batch.ids.append(conversation.digest)
        batch.prompts.append(conversation.prompt_digest)
        batch.num_turns.append(len(conversation.roles))
        batch.roles.extend(map(_CODES.__getitem__, conversation.roles))
        if conversation.marks:
            first = len(batch.texts)
            batch.marks |= {first + turn: mark for turn, mark in conversation.marks.items()}
        batch.texts += conversation.texts
        batch.num_without_reasoning += has_dropped
    return batch


def splits_of(prompts: Sequence[bytes], estimate_share: float, test_share: float) -> np.ndarray:
    """[len(prompts)] int8: `system.data.rows.conversation.split_of` for each hash."""
    place = np.frombuffer(b"".join(prompts), ">u8").astype(np.float64) / 2.0**64
    return np.where(place < test_share, 2, place < test_share + estimate_share).astype(np.int8)
