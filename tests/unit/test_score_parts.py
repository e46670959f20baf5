"""Held-out rows in parts: every row once, whole categories together, whoever scores them."""

import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system import schema
from system.influence.design.design import InterventionRun
from system.influence.measure.score_parts import PART_ROWS, join_parts, score_parts
from system.scoring.score import Scored

RUN = InterventionRun(replication=0, kind="reference", source=-1)


def spans(categories: list[str], most: int | None = None) -> list[tuple[int, int]]:
    return [(p.rows.start, p.rows.stop) for p in score_parts(RUN, categories, most)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"a": 3, "b": 3, "c": 4}, [(0, 10)]),
        ({"a": 6, "b": 4, "c": 1}, [(0, 10), (10, 11)]),
        ({"a": 6, "b": 5, "c": 5}, [(0, 6), (6, 16)]),
        ({"a": 4, "b": 23, "c": 5}, [(0, 4), (4, 14), (14, 24), (24, 32)]),
        ({}, [(0, 0)]),
    ],
    ids=["all fit", "two fit", "first alone", "one is cut", "no row"],
)
def test_categories_stay_together_while_they_fit(sizes, expected):
    rows = [name for name, size in sizes.items() for _ in range(size)]
    assert spans(rows, 10) == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 30))
def test_every_row_is_in_one_part_and_no_part_is_too_large(sizes, most):
    rows = [str(k) for k, size in enumerate(sizes) for _ in range(size)]
    found = spans(rows, most)
    assert found[0][0] == 0 and found[-1][1] == len(rows)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert all(0 < stop - start <= most for start, stop in found)


def test_a_usual_number_of_rows_is_one_part():
    assert spans(["a"] * PART_ROWS) == [(0, PART_ROWS)]
    assert len(spans(["a"] * (PART_ROWS + 1))) == 2


def test_names_sort_in_the_order_of_the_rows():
    names = [part.name for part in score_parts(RUN, ["a"] * 1500, 1)]
    assert names == sorted(names)


def test_parts_join_in_order_with_all_that_was_rejected():
    def part(name: str, **rejected: str) -> Scored:
        row = {"id": name, "category": "a", "nll": 1.0, "num_tokens": 2}
        return Scored(table=pa.Table.from_pylist([row], schema=schema.SCORES), rejected=rejected)

    found = join_parts([part("r0", r9="poison"), part("r1"), part("r2", r8="long")])
    assert found.table.column("id").to_pylist() == ["r0", "r1", "r2"]
    assert found.rejected == {"r9": "poison", "r8": "long"}
