r"""Compiles the regular expressions of a configuration, with an engine that takes linear time.

Python's own engine tries alternatives one after the other, so one row can keep it busy for ever.
RE2 cannot; in return it has no backreferences and no look-around, and such patterns are refused.

`^` and `$` match at every line.  As in Python, `\w`, `\d` and `\s` know all scripts; `\b` and
`\W`, `\D`, `\S` inside brackets know ASCII only.
"""

from __future__ import annotations

import functools
import re
from typing import Any

_MAX_PATTERN = 10_000
"""Largest number of characters of a pattern."""
_MAX_MATCHES = 10_000
_CLASSES = {
    "w": r"\p{L}\p{N}_", "d": r"\p{Nd}", "s": r"\t-\r\x1c-\x20\x85\p{Z}",
}  # fmt: skip
"""What Python means by a class, for the inside of brackets."""
_PIECE = re.compile(r"\\(.)|\[\^?\]?|\]|[^\\\[\]]+|\\$", re.DOTALL)


@functools.lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> Any:
    """Compiles a regular expression.

    Returns:
        An object with the methods `search` and `finditer` of Python's compiled patterns, and their
        attributes `groups` and `groupindex`.

    Raises:
        ValueError: the text is no regular expression, or one that needs more than linear time.
    """
    import re2

    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"it has {len(pattern):,} characters, more than {_MAX_PATTERN:,}")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile("(?m)" + _with_all_scripts(pattern), options)
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0]
        raise ValueError(
            f"{why.decode(errors='replace') if isinstance(why, bytes) else error} (the syntax is "
            "that of RE2: without look-around and backreferences)"
        ) from error


def last_group(pattern: str, text: str) -> str | None:
    """What the first group holds at the last match in which it has a part; None without one.

    None, too, for a text with more than 10,000 matches: it holds no answer, and to search so often
    takes time with the square of its length.
    """
    found = None
    for number, match in enumerate(compile_pattern(pattern).finditer(encodable(text))):
        if number == _MAX_MATCHES:
            return None
        found = match.group(1) if match.group(1) is not None else found
    return found


def encodable(text: str) -> str:
    """The text, with `?` for half characters, such as those of file names that are no UTF-8."""
    return text.encode(errors="replace").decode()


def _with_all_scripts(pattern: str) -> str:
    """Replaces the classes of RE2, which know ASCII only, by those of Python."""
    pieces, is_in_brackets = [], False
    for match in _PIECE.finditer(pattern):
        piece, escaped = match[0], match[1]
        if escaped is None:
            if piece == "]":
                is_in_brackets = False
            elif piece[0] == "[":
                is_in_brackets = True
        elif escaped in _CLASSES:
            piece = _CLASSES[escaped] if is_in_brackets else f"[{_CLASSES[escaped]}]"
        elif escaped.lower() in _CLASSES and not is_in_brackets:
            piece = f"[^{_CLASSES[escaped.lower()]}]"
        elif escaped == "Z":
            piece = r"\z"
        pieces.append(piece)
    return "".join(pieces)
