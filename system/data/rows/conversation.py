"""What a conversation is: its roles in order, its normalised text, its id and its split.

**Normalisation, version 1.**  Line ends become LF (form feeds and vertical tabs too), text becomes
Unicode NFC, white space at the end and blank lines at the start of a turn are dropped (indentation
of the first line stays: it may be code).  Empty system turns and whatever follows the last
assistant turn are dropped; nothing of them would be learned.  System turns at the start become one
(an equal text counts once), and so do assistant turns in a row, with a blank line between them.

**Content id**: the first 32 hex digits of SHA-256 over `role US text` of all turns, joined by RS,
each text stripped on both sides.  A turn without a loss adds `US no-loss`, one with reasoning adds
`US reasoning US text`.  US and RS are control characters, which no text may hold, so two different
conversations never have the same bytes.  The id depends on nothing else: not on the machine, the
file, the order of rows, the category, the ids of tool calls or the version of this package.

**Split**: from SHA-256 over the same bytes of the turns that are not the assistant's.  The same
question with another answer lands in the same split, and adding data moves no row.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from system.patterns import last_group


class Marks(NamedTuple):
    """What a turn brings besides role and text; most turns bring nothing."""

    loss: bool | None = None
    """False: an assistant turn that is read but not learned.  None: it is learned."""
    reasoning: str | None = None
    """What the assistant thought before it answered."""
    call_ids: tuple[str, ...] | None = None
    """Of an assistant turn, the ids of its tool calls, in their order; of a tool turn, the id of
    the call that it answers."""

    @property
    def texts(self) -> list[str]:
        """Reasoning and ids of calls."""
        return [*([self.reasoning] if self.reasoning else []), *(self.call_ids or ())]


Turn = tuple[str, str] | tuple[str, str, Marks]
"""Role and text, and marks if the turn has any."""

SPLITS: tuple[str, ...] = ("train", "estimate", "test")

_CONTROL_BYTES = bytes([*range(0x09), *range(0x0E, 0x20), 0x7F])
_ROLES = ("system", "user", "assistant", "tool")
_BEFORE_TEXT = {role: f"\x1e{role}\x1f".encode() for role in _ROLES}
"""Role -> what the hashed bytes hold before a turn's text."""
_PAIR = ["user", "assistant"]
"""The roles of most rows; their order needs no check."""
_LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c")  # the first one before the second
_MAX_COMPOSED = 4
"""Most characters that NFC makes one of.  Source: UAX #15, the largest growth of NFD."""
_MAX_TURNS = 1000
"""Most turns: a chat template is rendered once for each assistant turn, with all turns before."""
_MAX_COMBINING = 128
"""Most combining marks in a row: NFC takes time with the square of their number.  Written language
has below ten; the stream-safe text of UAX #15 has at most 30."""
_BLOCK = _MAX_COMBINING // 2
_NO_LOSS = b"\x1fno-loss"
_REASONING = b"\x1freasoning\x1f"
_UNMARKED: Mapping[int, Marks] = {}
_FOLLOWS = {
    "start": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}


class RowRejected(Exception):  # noqa: N818 - a decision about a row, not an error of the program
    """A row cannot enter the corpus; `args` are the reason's name and the detail for people."""

    @property
    def reason(self) -> str:
        """One of the reasons in `docs/data.md`, such as `empty-turn`."""
        return self.args[0]

    @property
    def detail(self) -> str:
        """What was found, for people."""
        return self.args[1]


class Conversation(NamedTuple):
    """A conversation that may enter the corpus."""

    digest: bytes
    """The id's 16 bytes."""
    prompt_digest: bytes
    """The first 8 bytes of the hash over the prompt side."""
    roles: list[str]
    texts: list[bytes]
    """UTF-8, one for each turn."""
    marks: Mapping[int, Marks] = _UNMARKED
    """Number of a turn -> its marks; other turns have none."""

    @property
    def id(self) -> str:
        """The content id, as people and files write it."""
        return self.digest.hex()

    @property
    def prompt_hash(self) -> int:
        """What decides the split: see `split_of`."""
        return int.from_bytes(self.prompt_digest, "big")

    @property
    def contents(self) -> list[str]:
        """The texts, one for each turn."""
        return [text.decode() for text in self.texts]


def normalise_text(text: str) -> str:
    """The text with LF line ends, in NFC, without surrounding blank lines and trailing space.

    Raises:
        RowRejected: combining-marks.
    """
    text = _trimmed(text)
    return text if text.isascii() else _composed(text)


def _trimmed(text: str) -> str:
    if "\r" in text or "\x0c" in text or "\x0b" in text:
        for line_end in _LINE_ENDS:
            text = text.replace(line_end, "\n")
    return text.rstrip().lstrip("\n")


def _composed(text: str) -> str:
    check_combining(text)
    is_composed = unicodedata.is_normalized("NFC", text)
    return text if is_composed else unicodedata.normalize("NFC", text)


def check_combining(text: str) -> None:
    """Refuses a text whose Unicode normal form would take long.

    Raises:
        RowRejected: combining-marks.
    """
    # A run above the limit covers at least one block that begins at a sampled character.
    if not any(map(unicodedata.combining, text[::_BLOCK])):
        return
    blocks = (text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK))
    if any(all(map(unicodedata.combining, block)) for block in blocks):
        is_mark = map(bool, map(unicodedata.combining, text))
        longest = max(sum(run) for _, run in itertools.groupby(is_mark))
        if longest > _MAX_COMBINING:
            raise RowRejected(
                "combining-marks",
                f"{longest:,} combining marks in a row, at most {_MAX_COMBINING} are taken",
            )


def normalise(turns: Sequence[Turn], max_chars: int) -> Conversation:
    """The conversation in its normal form.

    Args:
        turns: as a function of `system.data.rows.shapes` gives them.
        max_chars: most characters of all turns, reasoning included.

    Raises:
        RowRejected: no-assistant-turn, empty-turn, wrong-role-order, starts-with-assistant,
            no-loss, too-long, combining-marks, control-characters or bad-utf8.
    """
    turns = _learned(turns)
    roles: list[str] = []
    texts: list[bytes] = []
    hashed: list[bytes] = []  # two for each turn: `_BEFORE_TEXT`, and the text
    marks: dict[int, Marks] = {}
    num_chars = num_given = 0
    not_utf8 = ""
    for turn in turns:
        role, text = turn[0], _trimmed(turn[1])
        if not text and role != "tool":
            if role == "system":
                continue
            raise RowRejected("empty-turn", f"turn {len(roles)} ({role}) is empty")
        # Before NFC, which may take long; it makes no text so much shorter.
        num_given += len(text)
        if num_given > _MAX_COMPOSED * max_chars:
            raise _too_long(num_given // _MAX_COMPOSED, max_chars)
        if not text.isascii():
            text = _composed(text)
        num_chars += len(text)
        roles.append(role)
        try:
            encoded = text.encode()
            # The hash ignores white space on both sides; `_trimmed` left none at the end.
            hashed += (
                _BEFORE_TEXT.get(role, b""),
                text.lstrip().encode() if text[:1].isspace() else encoded,
            )
            if len(turn) > 2:
                mark, added = _normal_marks(turn[2], max_chars)
                hashed[-1] += added
                num_chars += sum(map(len, mark.texts))
                if mark != Marks():
                    marks[len(texts)] = mark
        except UnicodeEncodeError as error:
            not_utf8 = f"half of a surrogate pair in turn {len(texts)}, character {error.start}"
            encoded = b""
        texts.append(encoded)
    if roles != _PAIR:
        _check_order(roles)
    if num_chars > max_chars:
        raise _too_long(num_chars, max_chars)
    if not_utf8:
        raise RowRejected("bad-utf8", not_utf8)
    whole = b"".join(hashed)
    separators = 2 * len(texts)
    if marks:
        _check_loss(roles, marks)
        separators += sum(
            (mark.loss is False) + 2 * bool(mark.reasoning) for mark in marks.values()
        )
    if len(whole) - len(whole.translate(None, _CONTROL_BYTES)) != separators:
        raise RowRejected("control-characters", _describe_control(texts, marks))
    digest, prompt_digest = _digests(roles, hashed, whole)
    return Conversation(digest[:16], prompt_digest[:8], roles, texts, marks)


def _learned(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns up to the last answer, joined where several of a role follow each other."""
    end = len(turns)
    while end and turns[end - 1][0] != "assistant":
        end -= 1
    if not end:
        raise RowRejected("no-assistant-turn", f"roles {[turn[0] for turn in turns]}")
    turns = turns[:end]
    if end > 2:
        names = [turn[0] for turn in turns]
        if any(map(operator.eq, names, names[1:])) or "system" in names[1:]:
            turns = _joined(turns)
        if len(turns) > _MAX_TURNS:
            raise RowRejected("too-long", f"{len(turns):,} turns, at most {_MAX_TURNS:,} are taken")
    return turns


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with one system turn, and one assistant turn where several follow each other."""
    joined: list[Turn] = []
    kept = (turn for turn in turns if turn[0] != "system" or turn[1].strip())
    for role, group in itertools.groupby(kept, operator.itemgetter(0)):
        run = list(group)
        if len(run) > 1 and role == "system":
            distinct: dict[str, str] = {}
            for text in (_trimmed(turn[1]) for turn in run):
                distinct.setdefault(text.strip(), text)
            run = [("system", "\n\n".join(distinct.values()))]
        # An empty turn stays alone, so that it is found.
        if len(run) > 1 and role == "assistant" and all(turn[1].strip() for turn in run):
            run = [_one_answer(run)]
        joined += run
    return joined


def _one_answer(run: Sequence[Turn]) -> Turn:
    text = "\n\n".join(_trimmed(turn[1]) for turn in run)
    marks = [turn[2] if len(turn) > 2 else Marks() for turn in run]
    if len({mark.loss for mark in marks}) > 1 or any(mark.reasoning for mark in marks[1:]):
        raise RowRejected(
            "wrong-role-order",
            "assistant turns in a row that cannot become one: they differ in their loss, or a "
            "later one has reasoning of its own",
        )
    call_ids = tuple(name for mark in marks for name in mark.call_ids or ())
    whole = Marks(marks[0].loss, marks[0].reasoning, call_ids or None)
    return ("assistant", text) if whole == Marks() else ("assistant", text, whole)


def _normal_marks(marks: Marks, max_chars: int) -> tuple[Marks, bytes]:
    """The marks in normal form, and what they add to the hashed bytes.

    Raises:
        RowRejected: too-long or combining-marks.
        UnicodeEncodeError: half of a surrogate pair.
    """
    given = marks.reasoning or ""
    if len(given) > _MAX_COMPOSED * max_chars:
        raise _too_long(len(given) // _MAX_COMPOSED, max_chars)
    reasoning = normalise_text(given)
    "".join(marks.call_ids or ()).encode()  # the ids are stored, too
    added = _NO_LOSS if marks.loss is False else b""
    if reasoning:
        added += _REASONING + reasoning.strip().encode()
    return marks._replace(reasoning=reasoning or None), added


def _too_long(num_chars: int, max_chars: int) -> RowRejected:
    return RowRejected(
        "too-long", f"{num_chars:,} characters or more, ingest.max_chars is {max_chars:,}"
    )


def _check_loss(roles: Sequence[str], marks: Mapping[int, Marks]) -> None:
    if all(
        role != "assistant" or marks.get(turn, Marks()).loss is False
        for turn, role in enumerate(roles)
    ):
        raise RowRejected("no-loss", "every assistant turn is marked as one without a loss")


def without_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without their reasoning."""
    return [
        (turn[0], turn[1], turn[2]._replace(reasoning=None)) if len(turn) > 2 else turn
        for turn in turns
    ]


def _digests(roles: list[str], hashed: list[bytes], whole: bytes) -> tuple[bytes, bytes]:
    """SHA-256 of all turns and of the prompt side, without the separator before the first turn."""
    if roles.count("assistant") == 1:
        # The prompt side is all that stands before the answer, so its bytes are hashed once.
        answer = len(hashed[-2]) + len(hashed[-1])
        state = hashlib.sha256(whole[1:-answer])
        prompt_digest = state.digest()
        state.update(whole[-answer:])
        return state.digest(), prompt_digest
    turns = zip(roles, hashed[::2], hashed[1::2], strict=True)
    prompt = b"".join(start + text for role, start, text in turns if role != "assistant")
    return hashlib.sha256(whole[1:]).digest(), hashlib.sha256(prompt[1:]).digest()


def _check_order(roles: list[str]) -> None:
    before = "start"
    for place, role in enumerate(roles):
        if role not in _FOLLOWS[before]:
            if role == "assistant" and before in ("start", "system"):
                raise RowRejected("starts-with-assistant", f"no question before it; roles {roles}")
            raise RowRejected(
                "wrong-role-order", f"turn {place} is {role!r} after {before!r}; roles {roles}"
            )
        before = role


def _describe_control(texts: Sequence[bytes], marks: Mapping[int, Marks]) -> str:
    thoughts = [(mark.reasoning or "").encode() for mark in marks.values()]
    found = {code for text in (*texts, *thoughts) for code in text if code in _CONTROL_BYTES}
    return "control characters " + ", ".join(f"U+{code:04X}" for code in sorted(found))


def split_of(prompt_hash: int, estimate_share: float, test_share: float) -> int:
    """Index into `SPLITS`: test rows first, then estimate rows, then train rows."""
    place = prompt_hash / 2.0**64
    if place < test_share:
        return 2
    return 1 if place < test_share + estimate_share else 0


def find_answer(pattern: str, text: str) -> str | None:
    """The final answer in a response.

    Args:
        pattern: regular expression with one group, which holds the answer (`system/patterns.py`).
        text: the response.

    Returns:
        The group of the last match that has one, stripped, because a model may state intermediate
        results first.  None: there is none, or it is empty.
    """
    found = last_group(pattern, text)
    return found.strip() or None if found is not None else None
