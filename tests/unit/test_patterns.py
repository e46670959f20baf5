"""Patterns mean what they mean in Python, and take linear time."""

import re
import time

import pytest

from system.config import SourceConfig
from system.data.rows.conversation import find_answer
from system.patterns import compile_pattern, encodable, last_group

TEXTS = (
    "héllo wörld_9 ٣3 x", "a.b-c/类别/д", "#### 42\nx #### 7 ", "\t\x85\u2003x y", "[a]b\\w]",
    "été 3.14e5\n\n$5", "by/数学/1.jsonl", "x\ny\n", "",
)  # fmt: skip
PATTERNS = (
    r"(\w+)", r"(\W+)", r"(\d+)", r"(\D+)", r"(\s+)", r"(\S+)", r"([\w.-]+)", r"([^\w]+)",
    r"([^\s\]]+)", r"([]\w]+)", r"(\\w)", r"^(.+)$", r"(x|y)\Z", r"(?i)(É)", r"(\[\w\])",
    r"by/(?P<category>\w+)/", r"((?:\d+[.,]?)+)", r"####\s*(\S+)", r"(?s)(.+)", r"(a*)",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_as_in_python(pattern: str) -> None:
    for text in TEXTS:
        ours = [(m.span(), m.group(1)) for m in compile_pattern(pattern).finditer(text)]
        theirs = re.compile(pattern, re.MULTILINE).finditer(text)
        assert ours == [(m.span(), m.group(1)) for m in theirs]


REFUSED = (
    "(", "[a", "(a)\\", r"(a)\1", "(?=a)(b)", "(?<!a)(b)", "(?x) (a)", r"(\p{None})", "(a{1001})",
    "((((a{100}){100}){100}))", "(" + "a" * 10_000 + ")", "(\ud800)", "(a)(b)", "a",
    "(?P<n>a)(?P=n)",    "(a++)", "(?>a)(b)", "(?(1)a|b)(c)",
)  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_the_engine_cannot_take_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(ValueError, match="answer_pattern") as caught:
        SourceConfig(path="x", answer_pattern=pattern)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ValueError, match="category_pattern"):
        SourceConfig(path="x", category_pattern=pattern)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a+)+$", "a" * 100_000 + "b"),
        (r"(a|aa)+$", "a" * 100_000 + "b"),
        (r"(.*a){20}c", "a" * 20_000),
        (r"#### (?:.*,)*(\d+)$", "#### " + "1," * 50_000 + "x"),
        (r"(a[^b]*b|a)", "a" * 100_000),
        (r"(a)", "a" * 200_000),
    ],
)
def test_no_text_keeps_a_pattern_busy(pattern: str, text: str) -> None:
    started = time.process_time()
    last_group(pattern, text)
    # Python's engine needs longer than the age of the universe for the first three.
    assert time.process_time() - started < 30


def test_the_last_match_of_a_line_counts_everywhere() -> None:
    text = "#### 1\nthen\n#### 2\nend"
    assert find_answer("^#### (.+)$", text) == "2"


def test_half_characters_match_nothing_and_break_nothing() -> None:
    assert last_group("(.)", "a\ud800") == "?"
    assert encodable("né\udcff") == "né?"


def test_a_text_full_of_matches_holds_no_answer() -> None:
    """The 10,000th match is not the last one, so it must not pass for it."""
    assert last_group(r"(\d)", "1" * 9_999 + "2") == "2"
    assert last_group(r"(\d)", "1" * 10_000 + "2") is None
