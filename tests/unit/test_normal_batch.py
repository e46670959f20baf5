"""The normal form of rows is that of a plain reference, written row by row from the definition."""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np
import pytest
from case_counts import CaseCount
from hypothesis import example, given, settings
from hypothesis import strategies as st

from system.data.read.readers import Defect
from system.data.rows.conversation import Marks, RowRejected, normalise_text, split_of
from system.data.rows.normal_batch import ROLES, normalise_batch, splits_of

PIECES = [
    "a", "word ", " ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x07", "\x1c", "\x7f", "\x85",
    "\xa0", "\u00e9", "e\u0301", "\u0301", "\u1100\u1161", "\uac00\u11a8", "\u2013", "\u2126",
    "\u4e2d\u6587" * 9, "\u3099", "\U0001f600", "\U0001d15e", "\u2028", "\u180e", "\ud800", "",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=20)
ROW_TURNS = st.lists(st.tuples(st.sampled_from(ROLES), TEXTS), max_size=5)
PAIRS = st.tuples(TEXTS, TEXTS).map(lambda pair: [("user", pair[0]), ("assistant", pair[1])])
VALUES = st.one_of(
    PAIRS.map(lambda turns: {"turns": turns}),
    PAIRS.map(lambda turns: {"turns": turns}),
    ROW_TURNS.map(lambda turns: {"turns": turns}),
    st.none(),
    st.just(Defect("bad-json", "broken")),
    st.just({}),
)
MAX_CHARS = 40


def turns_of(row: dict) -> list[tuple[str, str]]:
    if "turns" not in row:
        raise RowRejected("missing-field", "no turns")
    return row["turns"]


FOLLOWS = {
    None: {"system", "user"}, "system": {"user"}, "user": {"assistant"},
    "assistant": {"user", "tool"}, "tool": {"tool", "assistant"},
}  # fmt: skip


def plain_text(text: str) -> str:
    text = unicodedata.normalize("NFC", re.sub("\r\n|[\r\x0b\x0c]", "\n", text))
    return text.rstrip().lstrip("\n")


def reference(turns: list[tuple[str, str]]) -> tuple[str, list[str], list[str], int] | str:
    """Id, roles, texts and prompt hash of a row, or the reason why it is rejected."""
    while turns and turns[-1][0] != "assistant":
        turns = turns[:-1]
    if not turns:
        return "no-assistant-turn"
    clean = [(role, plain_text(text)) for role, text in turns]
    clean = [turn for turn in clean if turn != ("system", "")]
    if any(not text and role != "tool" for role, text in clean):
        return "empty-turn"
    clean = joined(clean)
    befores = [None, *(role for role, _ in clean)]
    for last, (role, _) in zip(befores, clean, strict=False):
        if role not in FOLLOWS[last]:
            is_first = role == "assistant" and last in (None, "system")
            return "starts-with-assistant" if is_first else "wrong-role-order"
    if sum(len(text) for _, text in clean) > MAX_CHARS:
        return "too-long"
    try:
        parts = [(role, f"{role}\x1f{text.strip()}".encode()) for role, text in clean]
    except UnicodeEncodeError:
        return "bad-utf8"
    if any(re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text.strip()) for _, text in clean):
        return "control-characters"
    whole = b"\x1e".join(part for _, part in parts)
    prompt = b"\x1e".join(part for role, part in parts if role != "assistant")
    return (
        hashlib.sha256(whole).hexdigest()[:32],
        [role for role, _ in clean],
        [text for _, text in clean],
        int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big"),
    )


def joined(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """System turns in a row, and assistant turns in a row, become one."""
    done: list[tuple[str, list[str]]] = []
    for role, text in turns:
        if not done or done[-1][0] != role or role not in ("system", "assistant"):
            done.append((role, [text]))
        elif role == "assistant" or text.strip() not in map(str.strip, done[-1][1]):
            done[-1][1].append(text)
    return [(role, "\n\n".join(texts)) for role, texts in done]


def one_by_one(values: list) -> tuple[list, dict]:
    kept, rejected = [], {}
    for place, value in enumerate(values):
        if isinstance(value, Defect):
            rejected[place] = value.reason
        elif value == {}:
            rejected[place] = "missing-field"
        elif value is not None:
            row = reference(value["turns"])
            if isinstance(row, str):
                rejected[place] = row
            else:
                kept.append((place, *row))
    return kept, rejected


def at_once(values: list) -> tuple[list, dict]:
    batch = normalise_batch(values, turns_of, MAX_CHARS)
    kept, turn = [], 0
    for row, place in enumerate(batch.places):
        end = turn + batch.num_turns[row]
        roles = [ROLES[code] for code in batch.roles[turn:end]]
        contents = [text.decode() for text in batch.texts[turn:end]]
        assert batch.turns_of(row) == batch.texts[turn:end]
        assert batch.responses()[row] == batch.texts[end - 1]
        prompt_hash = int.from_bytes(batch.prompts[row], "big")
        kept.append((place, batch.ids[row].hex(), roles, contents, prompt_hash))
        turn = end
    assert turn == len(batch.texts) == len(batch.roles)
    assert len(batch.rejected) == len(dict(batch.rejected))
    return kept, {place: why.reason for place, why in batch.rejected}


def test_rows_in_a_batch_have_the_normal_form_of_the_reference():
    kept = CaseCount()

    @settings(max_examples=400, deadline=None)
    @given(st.lists(VALUES, max_size=12))
    @example([])
    @example([{"turns": [("user", "\x1cq"), ("assistant", "a")]}])
    @example([{"turns": [("user", "q\r\n\r"), ("assistant", "\n\ra")]}] * 3)
    @example([{"turns": [("user", "q" * 39 + "\r\n"), ("assistant", "a")]}])
    @example([{"turns": [("user", "e"), ("assistant", "\u0301")]}])
    def compare(values):
        expected = one_by_one(values)
        assert at_once(values) == expected
        kept.add(bool(expected[0]))

    compare()
    kept.require(0.0, at_least=60)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=8), st.data())
def test_kept_rows_are_those_asked_for(values, data):
    batch = normalise_batch(values, turns_of, MAX_CHARS)
    whole = list(range(len(batch.places)))
    rows = data.draw(st.lists(st.sampled_from(whole), unique=True)) if whole else []
    some = batch.keep(rows)
    assert some.ids == [batch.ids[row] for row in rows]
    assert [some.turns_of(k) for k in range(len(rows))] == [batch.turns_of(row) for row in rows]
    assert len(some.roles) == len(some.texts) == sum(some.num_turns)


def marked_row(number: int) -> dict:
    """Two answers; the first has no loss, the second has reasoning."""
    said = [("user", f"q{number}"), ("assistant", "a", Marks(loss=False))]
    thought = Marks(reasoning=f"r{number}é", call_ids=("c",))
    return {"turns": [*said, ("user", "q"), ("assistant", "b", thought)]}


def test_marks_follow_their_turns_when_rows_are_kept():
    plain = {"turns": [("user", "q"), ("assistant", "a")]}
    batch = normalise_batch([plain, marked_row(1), plain, marked_row(3)], turns_of, MAX_CHARS)
    muted = Marks(loss=False)
    assert batch.marks == {
        3: muted, 5: Marks(reasoning="r1é", call_ids=("c",)),
        9: muted, 11: Marks(reasoning="r3é", call_ids=("c",)),
    }  # fmt: skip
    some = batch.keep([3, 0])
    assert some.marks == {1: muted, 3: Marks(reasoning="r3é", call_ids=("c",))}
    assert some.texts_of([1, 0]) == [["q", "a"], ["q3", "a", "q", "b", "r3é"]]
    assert some.num_bytes == sum(map(len, some.texts)) + len("r3é".encode()) + 1


def test_ids_cover_loss_and_reasoning_in_the_documented_bytes():
    (found,) = normalise_batch([marked_row(1)], turns_of, MAX_CHARS).ids
    parts = ["user\x1fq1", "assistant\x1fa\x1fno-loss", "user\x1fq"]
    parts.append("assistant\x1fb\x1freasoning\x1fr1é")
    assert found == hashlib.sha256("\x1e".join(parts).encode()).digest()[:16]


def test_dropped_reasoning_leaves_the_id_of_a_row_that_never_had_any():
    rows = [marked_row(1), {"turns": [("user", "q"), ("assistant", "a")]}]
    batch = normalise_batch(rows, turns_of, MAX_CHARS, keep_reasoning=False)
    assert batch.num_without_reasoning == 1
    assert [mark.reasoning for mark in batch.marks.values()] == [None, None]
    never = marked_row(1)
    never["turns"][-1] = ("assistant", "b")
    assert batch.ids[0] == normalise_batch([never], turns_of, MAX_CHARS).ids[0]


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_line_ends_become_line_feeds_from_left_to_right(text):
    assert normalise_text(text) == plain_text(text)


SHARES = st.floats(0, 0.45)


@given(st.lists(st.integers(0, 2**64 - 1)), SHARES, SHARES)
@example([0, 2**64 - 1, 2**63, 2**63 - 1, 2**53 + 1], 0.25, 0.5)
def test_splits_of_many_are_those_of_each(hashes, estimate_share, test_share):
    found = splits_of([value.to_bytes(8, "big") for value in hashes], estimate_share, test_share)
    assert found.dtype == np.int8
    wanted = [split_of(value, estimate_share, test_share) for value in hashes]
    assert found.tolist() == wanted


@pytest.mark.parametrize("texts", [("q", "a"), ("caf\u00e9 \u2013 \u4e2d", "line\n\tline")])
def test_ids_are_the_documented_hash(texts):
    batch = normalise_batch(
        [{"turns": [("user", texts[0]), ("assistant", texts[1])]}], turns_of, MAX_CHARS
    )
    whole = f"user\x1f{texts[0]}\x1eassistant\x1f{texts[1]}".encode()
    assert batch.ids == [hashlib.sha256(whole).digest()[:16]]
