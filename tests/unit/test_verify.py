from __future__ import annotations

from decimal import Decimal

import pytest

from system.scoring.verify import is_correct, normalise_answer, read_number

GSM8K = r"####\s*(.+)$"


def test_the_last_match_of_the_pattern_is_compared():
    text = "First #### 3\nthen again\n#### 1,234 \nthanks"
    assert is_correct(text, "1234", GSM8K)
    assert not is_correct(text, "3", GSM8K)
    assert is_correct("#### 1,234", text, GSM8K)


def test_without_a_match_there_is_no_answer():
    assert not is_correct("I think 4", "4", GSM8K)
    assert not is_correct("#### ", "", GSM8K)


def test_without_a_pattern_the_whole_response_is_the_answer():
    assert is_correct(" Yes.\n", "yes", None)
    assert not is_correct("Yes, I think so", "yes", None)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1,234", "1234"), ("-3.50", "-3.5"), ("$5", "5"), ("-$5.00", "-5"), ("+7.", "7"),
        ("1e3", "1000"), (".5", "0.5"), ("12,345,678.9", "12345678.9"), ("１２", "12"),
        ("**42**", "42"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_numbers(written: str, number: str):
    assert read_number(written) == Decimal(number)


@pytest.mark.parametrize("text", ["twelve", "1,2", "3 4", "1/2", "50%", "v1.2.3", "", "nan", "inf"])
def test_what_is_no_plain_number_is_compared_as_text(text: str):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("1,000", "1000", True), ("1000.0", "1000", True), ("1000.1", "1000", False),
        ("0.1", "0.10000000000000001", False), ("Paris", " paris. ", True), ("'a  b'", "a b", True),
        ("Paris", "Pari", False), ("5", "five", False), ("", "", True), ("", "0", False),
        ("A.", "a", True), ("3.", "3", True),
    ],
)  # fmt: skip
def test_answers_match_up_to_writing_and_no_further(output: str, expected: str, right: bool):
    assert is_correct(output, expected, None) is right


def test_an_expected_answer_written_as_a_response_is_reduced_to_its_answer():
    assert is_correct("so it is\n#### 72", "48 + 24 = 72\n#### 72", GSM8K)
    assert is_correct("so it is\n#### 72", "72", GSM8K)
    assert not is_correct("so it is\n#### 71", "48 + 24 = 72\n#### 72", GSM8K)


def test_normal_form_is_idempotent():
    for text in ('"Hello."', "  *x*. ", "``a`` b.", "...", "'"):
        once = normalise_answer(text)
        assert normalise_answer(once) == once
