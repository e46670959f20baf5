"""What a conversation is: its roles in order, its normalised text, its id and its split.

**Normalisation, version 1.**  Line ends become LF (form feeds and vertical tabs too), text becomes
Unicode NFC, white space at the end and blank lines at the start of a turn are dropped (indentation
of the first line stays: it may be code).  Empty system turns and whatever follows the last
assistant turn are dropped; nothing of them would be learned.

**Content id**: the first 32 hex digits of SHA-256 over `role US text` of all turns, joined by RS,
each text stripped on both sides.  US and RS are control characters, which no text may hold, so two
different conversations never have the same bytes.  The id depends on nothing else: not on the
machine, the file, the order of rows, the category or the version of this package.

**Split**: from SHA-256 over the same bytes of the turns that are not the assistant's.  The same
question with another answer lands in the same split, and adding data moves no row.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

Turn = tuple[str, str]
"""Role and text."""

SPLITS: tuple[str, ...] = ("train", "estimate", "test")

_CONTROL_BYTES = bytes([*range(0x09), *range(0x0E, 0x20), 0x7F])
_CONTROL_CHARS = _CONTROL_BYTES.decode("latin-1")
_LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c")  # the first one before the second
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

    id: str
    roles: list[str]
    contents: list[str]
    prompt_hash: int
    """First 64 bits of the hash over the prompt side."""
    num_chars: int


def normalise_text(text: str) -> str:
    """The text with LF line ends, in NFC, without surrounding blank lines and trailing space."""
    if "\r" in text or "\x0c" in text or "\x0b" in text:
        for line_end in _LINE_ENDS:
            text = text.replace(line_end, "\n")
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text.rstrip().lstrip("\n")


def normalise(turns: Sequence[Turn], max_chars: int) -> Conversation:
    """The conversation in its normal form.

    Raises:
        RowRejected: no-assistant-turn, empty-turn, wrong-role-order, too-long, control-characters
            or bad-utf8.
    """
    if len(turns) == 2 and turns[0][0] == "user" and turns[1][0] == "assistant":
        found = _plain_pair(turns[0][1], turns[1][1], max_chars)
        if found is not None:
            return found
    end = len(turns)
    while end and turns[end - 1][0] != "assistant":
        end -= 1
    if not end:
        raise RowRejected("no-assistant-turn", f"roles {[role for role, _ in turns]}")
    roles: list[str] = []
    contents: list[str] = []
    num_chars = 0
    for role, raw in turns[:end]:
        text = normalise_text(raw)
        if not text and role != "tool":
            if role == "system":
                continue
            raise RowRejected("empty-turn", f"turn {len(roles)} ({role}) is empty")
        num_chars += len(text)
        roles.append(role)
        contents.append(text)
    _check_order(roles)
    if num_chars > max_chars:
        raise RowRejected("too-long", f"{num_chars} characters, ingest.max_chars is {max_chars}")
    return _identify(roles, contents, num_chars)


def _plain_pair(question: str, answer: str, max_chars: int) -> Conversation | None:
    """What `_identify` gives for one question and answer, at half the cost; None: look closer."""
    asked, said = normalise_text(question), normalise_text(answer)
    num_chars = len(asked) + len(said)
    if not asked or not said or num_chars > max_chars:
        return None
    try:
        prompt = ("user\x1f" + asked.strip()).encode()
        whole = prompt + ("\x1eassistant\x1f" + said.strip()).encode()
    except UnicodeEncodeError:
        return None
    if len(whole) - len(whole.translate(None, _CONTROL_BYTES)) != 3:
        return None
    return Conversation(
        hashlib.sha256(whole).hexdigest()[:32],
        ["user", "assistant"],
        [asked, said],
        int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big"),
        num_chars,
    )


def _check_order(roles: list[str]) -> None:
    if roles == ["user", "assistant"]:
        return
    before = "start"
    for place, role in enumerate(roles):
        if role not in _FOLLOWS[before]:
            raise RowRejected(
                "wrong-role-order", f"turn {place} is {role!r} after {before!r}; roles {roles}"
            )
        before = role


def _identify(roles: list[str], contents: list[str], num_chars: int) -> Conversation:
    parts = [f"{role}\x1f{text.strip()}" for role, text in zip(roles, contents, strict=True)]
    asked = [part for part, role in zip(parts, roles, strict=True) if role != "assistant"]
    try:
        prompt, whole = "\x1e".join(asked).encode(), "\x1e".join(parts).encode()
    except UnicodeEncodeError as error:
        raise RowRejected("bad-utf8", f"half of a surrogate pair at {error.start}") from None
    if len(whole) - len(whole.translate(None, _CONTROL_BYTES)) != 2 * len(parts) - 1:
        raise RowRejected("control-characters", _describe_control(contents))
    return Conversation(
        hashlib.sha256(whole).hexdigest()[:32],
        roles,
        contents,
        int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big"),
        num_chars,
    )


def _describe_control(contents: Sequence[str]) -> str:
    found = sorted({char for text in contents for char in text if char in _CONTROL_CHARS})
    return "control characters " + ", ".join(f"U+{ord(char):04X}" for char in found)


def split_of(prompt_hash: int, estimate_share: float, test_share: float) -> int:
    """Index into `SPLITS`: test rows first, then estimate rows, then train rows."""
    place = prompt_hash / 2.0**64
    if place < test_share:
        return 2
    return 1 if place < test_share + estimate_share else 0


def find_answer(pattern: str, text: str) -> str | None:
    """What the pattern's group holds at its last match in the text, stripped; None without one."""
    found = None
    for match in re.finditer(pattern, text):
        found = match.group(1)
    return None if found is None else found.strip()
