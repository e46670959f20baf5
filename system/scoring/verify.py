"""Is a generated answer the expected one?  Normalised exact match, numbers compared as numbers."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[-+]?(\d+(,\d{3})*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_CURRENCY = "$€£¥"
_WRAPPERS = "\"'`*_“”‘’"


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The final answer in a response.

    Args:
        text: the response.
        pattern: regular expression with one group; its last match counts, because models may
            restate earlier results on the way.  None: the whole response is the answer.

    Returns:
        The answer without surrounding white space, or None where the pattern does not match.
    """
    if pattern is None:
        return text.strip()
    found = None
    for match in re.finditer(pattern, text, flags=re.MULTILINE):
        found = match.group(1)
    return None if found is None else found.strip()


def normalise_answer(answer: str) -> str:
    """An answer in lower case, without extra blanks, quotes, emphasis or final full stop."""
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    while text and (text[0] in _WRAPPERS or text[-1] in _WRAPPERS or text[-1] == "."):
        shorter = text.strip(_WRAPPERS).removesuffix(".").strip()
        if shorter == text:
            break
        text = shorter
    return text


def read_number(answer: str) -> Decimal | None:
    """The number that the whole answer is, thousands separators and currency sign aside."""
    text = normalise_answer(answer)
    sign = text[:1] if text[:1] in ("-", "+") else ""
    text = sign + text[len(sign) :].strip(_CURRENCY + " ")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def is_correct(output: str, expected: str, pattern: str | None) -> bool:
    """Whether a response gives the expected answer.

    An expected answer that is itself written as a response (it matches the pattern) is reduced to
    its final answer first.
    """
    found = extract_answer(output, pattern)
    if found is None:
        return False
    wanted = extract_answer(expected, pattern) if pattern is not None else expected
    wanted = expected if wanted is None else wanted
    left, right = read_number(found), read_number(wanted)
    if left is not None and right is not None:
        return left == right
    return normalise_answer(found) == normalise_answer(wanted)
