"""The tie-break's least squares: two methods, one answer; sets that are next to empty."""

import numpy as np
import pytest

from system.solve import leastsquares
from system.solve.leastsquares import least_squares_point


def question(seed: int, room: float) -> dict[str, np.ndarray]:
    """Random rows that a random point satisfies, most of them by `room`, one an equality."""
    rng = np.random.default_rng(seed)
    count, num_rows = int(rng.integers(2, 12)), int(rng.integers(1, 9))
    known = rng.uniform(0.0, 2.0, count) * rng.integers(0, 2, count)
    known[0] = 1.0
    rows = rng.normal(size=(num_rows, count)) * (rng.random((num_rows, count)) < 0.7)
    at = rows @ known
    lower, upper = at - room * rng.random(num_rows), np.full(num_rows, np.inf)
    two_sided = rng.random(num_rows) < 0.3
    upper[two_sided] = at[two_sided] + room
    lower[0] = upper[0] = at[0]
    return {
        "weight_C": rng.uniform(0.5, 2.0, count),
        "rows_RC": rows,
        "row_lower_R": lower,
        "row_upper_R": upper,
        "lower_C": np.zeros(count),
        "upper_C": rng.uniform(2.0, 4.0, count),
        "known_C": known,
    }


def check(asked: dict[str, np.ndarray], found: np.ndarray, tolerance: float) -> None:
    value = asked["rows_RC"] @ found
    assert (value >= asked["row_lower_R"] - tolerance).all()
    assert (value <= asked["row_upper_R"] + tolerance).all()
    assert (found >= asked["lower_C"]).all() and (found <= asked["upper_C"]).all()
    length, known = (np.linalg.norm(asked["weight_C"] * x) for x in (found, asked["known_C"]))
    assert length <= known + tolerance


@pytest.mark.parametrize("seed", range(150))
def test_both_methods_find_the_one_shortest_point(seed, monkeypatch):
    asked = question(seed, room=1.0)
    by_dual = least_squares_point(**asked)
    # The dual is made to fail, so that the walk answers.
    monkeypatch.setattr(leastsquares, "_solve_dual", lambda dual, accepted: (None, np.inf))
    by_walk = least_squares_point(**asked)
    np.testing.assert_allclose(by_walk, by_dual, atol=1e-7)
    check(asked, by_walk, 1e-9)


@pytest.mark.parametrize("room", [0.0, 1e-12, 1e-9, 1e-6])
@pytest.mark.parametrize("seed", range(40))
def test_a_set_that_is_next_to_empty_has_its_shortest_point(seed, room):
    asked = question(seed, room)
    check(asked, least_squares_point(**asked), 1e-7)


def test_moves_far_smaller_than_their_box_are_told_apart():
    """Nine ten-millionths of a box, three rows that nearly meet: the exact answer by hand."""
    size = 9e-7
    found = least_squares_point(
        weight_C=np.ones(3),
        rows_RC=np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]),
        row_lower_R=np.array([3 * size, -1e-15, -1e-15]),
        row_upper_R=np.array([3 * size, np.inf, np.inf]),
        lower_C=np.zeros(3),
        upper_C=np.ones(3),
        known_C=np.array([0.0, 0.0, 3 * size]),
    )
    np.testing.assert_allclose(found, size, rtol=1e-6)
