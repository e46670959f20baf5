"""What the page of estimator benchmarks says of its own reference."""

import numpy as np
import pytest
from influence_report import _ceiling, reliability  # pyright: ignore[reportMissingImports]


def test_the_ceiling_is_what_the_truth_reaches_against_the_reference():
    """Simulated: truth 1, noise 1 a replication, four replications, two against two."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200_000)
    runs = truth + rng.normal(size=(4, truth.size))
    halves = np.corrcoef(runs[:2].mean(axis=0), runs[2:].mean(axis=0))[0, 1]
    reached = np.corrcoef(truth, runs.mean(axis=0))[0, 1]
    assert np.sqrt(reliability(halves, 2, 4)) == pytest.approx(reached, abs=0.01)
    assert reached > halves + 0.2


def test_the_bar_is_called_too_high_only_where_the_truth_itself_would_miss_it():
    found = {"reference_replications": 4, "ceiling": {"2": [0.74, 0.67, 0.87]}}
    assert "about 0.92." in _ceiling(found) and "than the truth is known" not in _ceiling(found)
    found["ceiling"] = {"2": [0.32, -0.02, 0.63]}
    assert "than the truth is known" in _ceiling(found)
    found["ceiling"] = {"2": [-0.1, -0.3, 0.1]}
    assert "not known well enough" in _ceiling(found)
