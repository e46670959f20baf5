"""Checks generated answers: normalised exact match; numbers are compared as numbers."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation

from system.patterns import last_group

_NUMBER = re.compile(r"[-+]?(\d+(,\d{3})*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_CURRENCY = "$€£¥"
_WRAPPERS = "\"'`*_“”‘’"


def extract_answer(text: str, pattern: str | None) -> str | None:
    """Extracts the final answer from a response.

    Args:
        text: the response.
        pattern: regular expression with one group; the last match counts, because a model may
            state intermediate results first.  None: the whole response is the answer.

    Returns:
        The answer without surrounding white space, or None if the pattern does not match.
    """
    if pattern is None:
        return text.strip()
    answer = last_group(pattern, text)
    return None if answer is None else answer.strip()


def normalise_answer(answer: str) -> str:
    """The answer in lower case, without extra blanks, quotes, emphasis or final full stop."""
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    while text and (text[0] in _WRAPPERS or text[-1] in _WRAPPERS or text[-1] == "."):
        shorter = text.strip(_WRAPPERS).removesuffix(".").strip()
        if shorter == text:
            break
        text = shorter
    return text


def read_number(answer: str) -> Decimal | None:
    """The answer as a number, without separators and currency sign; None if it is none."""
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

    If the expected answer is itself a whole response (it matches the pattern), its final answer is
    extracted first.
    """
    answer = extract_answer(output, pattern)
    if answer is None:
        return False
    reference = extract_answer(expected, pattern) if pattern is not None else expected
    reference = expected if reference is None else reference
    left, right = read_number(answer), read_number(reference)
    if left is not None and right is not None:
        return left == right
    return normalise_answer(answer) == normalise_answer(reference)
