"""Checks generated answers: normalised exact match; numbers are compared as numbers."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation

from system.data.rows.conversation import find_answer

_NUMBER = re.compile(r"[-+]?(\d+(,\d{3})*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_CURRENCY = "$€£¥"
_WRAPPERS = "\"'`*_“”‘’"


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

    Args:
        output: the response.
        expected: the answer, or a whole response that holds it.
        pattern: finds the answer inside a response, see `find_answer`; None: all of it is the
            answer.
    """
    answer, reference = output.strip(), expected
    if pattern is not None:
        answer = find_answer(pattern, output)
        found = find_answer(pattern, expected)
        reference = expected if found is None else found
    if answer is None:
        return False
    left, right = read_number(answer), read_number(reference)
    if left is not None and right is not None:
        return left == right
    return normalise_answer(answer) == normalise_answer(reference)
