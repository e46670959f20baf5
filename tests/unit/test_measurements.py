from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from measured_design import design, scores

from system.errors import DataError
from system.influence.design.random_design import dose_patterns
from system.influence.estimate.measurements import collect_losses, paired_differences


def all_scores(made, **special):
    return {run.name: special.get(run.name, scores()) for run in made.all_runs}


def test_differences_are_positive_when_data_helps_in_both_directions():
    made = design()
    found = all_scores(
        made,
        **{
            "r00-remove-000": scores(shift=0.5),
            "r01-remove-000": scores(shift=0.5),
            "r00-add-001": scores(shift=-0.25),
            "r01-add-001": scores(shift=-0.25),
        },
    )
    losses = collect_losses(made, found)
    removed = paired_differences(made, losses, "remove")
    added = paired_differences(made, losses, "add")
    np.testing.assert_allclose(removed.differences[0][0, 0], [0.5, 1.0, 1.5])
    np.testing.assert_allclose(removed.mean_RTS[:, 1, 0], 1.0)
    np.testing.assert_allclose(removed.mean_RTS[:, :, 1], 0.0)
    np.testing.assert_allclose(added.mean_RTS[:, 2, 1], 0.5)
    assert removed.dose_S.tolist() == [8, 8] and added.dose_S.tolist() == [4, 4]
    assert added.dose_tokens_S.tolist() == [40, 80]
    assert removed.own_T.tolist() == [0, 1, -1]


def test_doses_that_differ_between_replications_are_put_on_one_scale():
    made = design(doses=(8, 4))
    found = all_scores(
        made, **{"r00-remove-000": scores(shift=0.8), "r01-remove-000": scores(shift=0.4)}
    )
    measured = paired_differences(made, collect_losses(made, found), "remove")
    assert measured.dose_S[0] == 6
    per_row = measured.mean_RTS[:, 0, 0] / measured.dose_S[0]
    np.testing.assert_allclose(per_row, 0.2)


def test_a_random_design_measures_what_one_at_a_time_runs_measure():
    """Additive effects of 0.5 and -0.25 nats, seen only in mixes of both."""
    one = design()
    patterns = dose_patterns(0, 4, 2).tolist()
    made = replace(
        one,
        estimator="random-design",
        directions=("remove",),
        replications=tuple(
            replace(replication, patterns={"remove": patterns}) for replication in one.replications
        ),
    )
    found = {
        run.name: scores(shift=-0.5 * patterns[run.source][0] + 0.25 * patterns[run.source][1])
        for run in made.all_runs
    }
    measured = paired_differences(made, collect_losses(made, found), "remove")
    np.testing.assert_allclose(measured.differences[0][0, 0], [0.5, 1.0, 1.5])
    np.testing.assert_allclose(measured.differences[2][1, 1], [-0.25, -0.5, -0.75])


def test_an_example_that_one_run_lacks_is_left_out_of_all():
    made = design()
    losses = collect_losses(made, all_scores(made, **{"r01-add-001": scores(skip=("b1",))}))
    assert losses.num_incomplete == 1
    assert [columns.size for columns in losses.examples] == [3, 2, 3]


def test_the_order_of_rows_in_a_file_does_not_matter():
    made = design()
    table = scores(shift=0.3)
    turned = table.take(pa.array(range(table.num_rows - 1, -1, -1)))
    first = collect_losses(made, all_scores(made, **{"r00-add-000": table}))
    second = collect_losses(made, all_scores(made, **{"r00-add-000": turned}))
    np.testing.assert_array_equal(first.loss["r00-add-000"], second.loss["r00-add-000"])


def test_a_missing_run_is_named():
    made = design()
    found = all_scores(made)
    del found["r01-remove-001"]
    with pytest.raises(DataError, match="1 are missing, first r01-remove-001"):
        collect_losses(made, found)


def test_other_tokens_in_one_run_are_refused():
    made = design()
    with pytest.raises(DataError, match="r01-add-000 was scored on others"):
        collect_losses(made, all_scores(made, **{"r01-add-000": scores(tokens=3)}))


def test_a_target_without_common_examples_is_named():
    made = design()
    skipped = scores(skip=("x0", "x1"))
    with pytest.raises(DataError, match="target 'x' has 1 held-out examples"):
        collect_losses(made, all_scores(made, **{"r00-reference": skipped}))
