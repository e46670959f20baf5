"""Lines of a file, however its bytes come and however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.data.read import blocks
from system.data.read.readers import decode_lines, decode_row


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    end_with_newline=st.booleans(),
    chunk=st.integers(1, 40),
    block=st.integers(1, 17),
)
def test_byte_ranges_share_out_every_line_exactly_once(lines, end_with_newline, chunk, block):
    data = b"\n".join(lines) + (b"\n" if end_with_newline else b"")
    found = []
    for start in range(0, len(data), chunk):
        begin = max(start - 1, 0)
        pieces = (data[k : k + block] for k in range(begin, len(data), block))
        found += blocks.split_lines(pieces, start, min(start + chunk, len(data)))
    expected = data.split(b"\n")
    assert found == (expected if expected[-1] else expected[:-1])


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.sampled_from([b"", b"ab", b"0123456789", b"x" * 40]), max_size=12),
    end_with_newline=st.booleans(),
    chunk=st.integers(1, 60),
    block=st.integers(1, 20),
)
def test_runs_of_lines_are_the_lines_and_long_ones_are_left_out(
    lines, end_with_newline, chunk, block
):
    data = b"\n".join(lines) + (b"\n" if end_with_newline else b"")
    expected = data.split(b"\n")
    expected = [
        None if len(line) > 20 else line for line in (expected if expected[-1] else expected[:-1])
    ]
    found: list[bytes | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MAX_ROW_BYTES", 20)
        for start in range(0, len(data), chunk):
            begin = max(start - 1, 0)
            pieces = (data[k : k + block] for k in range(begin, len(data), block))
            for run in blocks.split_runs(pieces, start, min(start + chunk, len(data))):
                found += [None] if run is None else run.split(b"\n")
    assert found == expected


LINES = st.sampled_from(
    [b"", b" \t", b'{"a": 1}', b'{"a": "\xff"}', b'{"a": NaN}', b"[1]", b"7", b"{", b'{"a":1} {}',
     b'{"a": "\\ud800"}', b'  {"b": [1, {"c": null}]}  ', b"\x0b", b"{}\r"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=8) | st.just([b'{"a":', b"1}", b"{} {}"]))
def test_lines_decoded_at_once_are_those_decoded_one_by_one(lines):
    expected = [None if not line.strip() else decode_row(line) for line in lines]
    assert repr(decode_lines(b"\n".join(lines))) == repr(expected)
