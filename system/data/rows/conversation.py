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
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from system.patterns import last_group

Turn = tuple[str, str]
"""Role and text."""

SPLITS: tuple[str, ...] = ("train", "estimate", "test")

_CONTROL_BYTES = bytes([*range(0x09), *range(0x0E, 0x20), 0x7F])
_ROLES = ("system", "user", "assistant", "tool")
_BEFORE_TEXT = {role: f"\x1e{role}\x1f".encode() for role in _ROLES}
"""Role -> what the hashed bytes hold before a turn's text."""
_PAIR = ["user", "assistant"]
"""The roles of most rows; their order needs no check."""
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

    digest: bytes
    """The id's 16 bytes."""
    prompt_digest: bytes
    """The first 8 bytes of the hash over the prompt side."""
    roles: list[str]
    texts: list[bytes]
    """UTF-8, one for each turn."""

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
    end = len(turns)
    while end and turns[end - 1][0] != "assistant":
        end -= 1
    if not end:
        raise RowRejected("no-assistant-turn", f"roles {[role for role, _ in turns]}")
    roles: list[str] = []
    texts: list[bytes] = []
    hashed: list[bytes] = []  # two for each turn: `_BEFORE_TEXT`, and the text
    num_chars = 0
    not_utf8 = ""
    for role, raw in turns[:end]:
        text = normalise_text(raw)
        if not text and role != "tool":
            if role == "system":
                continue
            raise RowRejected("empty-turn", f"turn {len(roles)} ({role}) is empty")
        num_chars += len(text)
        roles.append(role)
        try:
            encoded = text.encode()
            # The hash ignores white space on both sides; `normalise_text` left none at the end.
            hashed += (
                _BEFORE_TEXT.get(role, b""),
                text.lstrip().encode() if text[:1].isspace() else encoded,
            )
        except UnicodeEncodeError as error:
            not_utf8 = f"half of a surrogate pair in turn {len(texts)}, character {error.start}"
            encoded = b""
        texts.append(encoded)
    if roles != _PAIR:
        _check_order(roles)
    if num_chars > max_chars:
        raise RowRejected("too-long", f"{num_chars} characters, ingest.max_chars is {max_chars}")
    if not_utf8:
        raise RowRejected("bad-utf8", not_utf8)
    whole = b"".join(hashed)
    if len(whole) - len(whole.translate(None, _CONTROL_BYTES)) != 2 * len(texts):
        raise RowRejected("control-characters", _describe_control(texts))
    digest, prompt_digest = _digests(roles, hashed, whole)
    return Conversation(digest[:16], prompt_digest[:8], roles, texts)


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
            raise RowRejected(
                "wrong-role-order", f"turn {place} is {role!r} after {before!r}; roles {roles}"
            )
        before = role


def _describe_control(texts: Sequence[bytes]) -> str:
    codes = sorted({code for text in texts for code in text if code in _CONTROL_BYTES})
    return "control characters " + ", ".join(f"U+{code:04X}" for code in codes)


def split_of(prompt_hash: int, estimate_share: float, test_share: float) -> int:
    """Index into `SPLITS`: test rows first, then estimate rows, then train rows."""
    place = prompt_hash / 2.0**64
    if place < test_share:
        return 2
    return 1 if place < test_share + estimate_share else 0


def find_answer(pattern: str, text: str) -> str | None:
    """What the pattern's group holds at its last match in the text, stripped; None without one."""
    found = last_group(pattern, text)
    return None if found is None else found.strip()
