"""CSV whose quotes do not close, and lines that are longer than a row may be."""

from __future__ import annotations

import csv
import io
import tracemalloc
from pathlib import Path

import pytest
from case_counts import CaseCount
from hypothesis import given, settings
from hypothesis import strategies as st

from system.data.read import blocks
from system.data.read.raw_rows import Defect, bad_utf8
from system.data.read.readers import FileRange, read_batches, read_rows
from system.errors import DataError


def rows_of(path: Path) -> list:
    return [row for _, row in read_rows(FileRange(file=0, uri=str(path), stamp=""))]


def write(tmp_path: Path, data: bytes | str) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_rows_with_too_many_fields_are_defects(tmp_path):
    found = rows_of(write(tmp_path, b'a,b\n1,2\n1,2,3\n\n"x\ny",4\n1\nq\xff,5\n"x\ny"\n'))
    kinds = [row.detail if isinstance(row, Defect) else "row" for row in found]
    assert kinds == [
        "row",
        "line 3: 3 fields, the header has 2",
        "row",
        "line 7: 1 fields, the header has 2",
        bad_utf8(0xFF).detail,
        "lines 9-10: 1 fields, the header has 2",
    ]
    assert found[2] == {"a": "x\ny", "b": "4"}


def test_a_quote_that_the_end_of_the_file_leaves_open_is_an_error_with_its_line(tmp_path):
    path = write(tmp_path, 'a,b\n1,2\n3,"open\n' + "4,5\n" * 1000)
    with pytest.raises(DataError, match=r"rows\.csv.*line 3 is not closed by the end of the file"):
        rows_of(path)
    before = []
    with pytest.raises(DataError):
        for batch in read_batches(FileRange(file=0, uri=str(path), stamp="")):
            before += batch
    assert before == [{"a": "1", "b": "2"}]


def test_every_line_that_an_open_quote_takes_is_a_row_of_its_own(tmp_path):
    found = rows_of(write(tmp_path, 'a,b\n1,"open\n3,4\n5,6\n7,"closed"\n8,9\n'))
    assert [row.reason for row in found[:4]] == ["bad-csv"] * 4
    assert "line 3" in found[1].detail and "begins on line 2" in found[1].detail
    assert found[4:] == [{"a": "8", "b": "9"}]


def test_an_open_quote_is_not_followed_further_than_a_row_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 10_000)
    path = write(tmp_path, 'a,b\n1,2\n3,"open\n' + "4,5\n" * 1_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 3 is not closed within 100,000 bytes"):
        rows_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_line_longer_than_a_row_may_be_is_a_rejected_row(tmp_path, monkeypatch, name):
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 100)
    path = tmp_path / name
    path.write_text("a\n1\n" + "x" * 1001 + "\n" + "y" * 1000 + "\n\n2\n")
    first, long, longest, last = rows_of(path)
    assert (first, longest, last) == ({"a": "1"}, {"a": "y" * 1000}, {"a": "2"})
    assert long.reason == "too-long"
    path.write_text("x" * 1001 + "\na\n")
    with pytest.raises(DataError, match="header"):
        rows_of(path)
    path.write_text('a\n"open\n' + "x" * 1001 + "\n")
    with pytest.raises(DataError, match="line 2 is not closed"):
        rows_of(path)


def test_a_byte_order_mark_before_a_quoted_header_is_no_part_of_it(tmp_path):
    assert rows_of(write(tmp_path, '\n\ufeff"a",b\n1,2\n'.lstrip("\n"))) == [{"a": "1", "b": "2"}]


FIELDS = st.text(st.sampled_from('ab,"\n\r \u00e9'), max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=8))
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, rows):
    sink = io.StringIO(newline="")
    csv.writer(sink, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    path = write(tmp_path_factory.getbasetemp(), sink.getvalue())
    assert [tuple(row.values()) for row in rows_of(path)] == rows


def test_lines_are_read_or_counted_whatever_quote_is_too_many(tmp_path_factory):
    closed = CaseCount()
    lines_and_place = st.lists(
        st.sampled_from(["1,2", '3,"x"', '"4","5"', "6", '7,8"9']), max_size=8
    ).flatmap(lambda lines: st.tuples(st.just(lines), st.integers(0, len(lines))))

    @settings(max_examples=150, deadline=None)
    @given(lines_and_place)
    def check(drawn):
        lines, place = drawn
        text = "\n".join(["a,b", *lines[:place], '0,"open', *lines[place:]])
        path = write(tmp_path_factory.getbasetemp(), text)
        try:
            rows = rows_of(path)
        except DataError as error:
            assert f"line {place + 2} is not closed" in str(error)
            closed.add(False)
        else:
            assert len(rows) == len(lines) + 1
            closed.add(True)

    check()
    closed.require(0.4)
