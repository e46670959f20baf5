"""Finished runs are found by what decided them, and by nothing else."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
from measured_design import design, scores

from system.influence.design.design import InterventionRun
from system.influence.measure.reuse import SharedRuns, heldout_digest, run_key
from system.training.settings import TrainSettings

RUN = InterventionRun(replication=0, kind="remove", source=1)
ACTIVE = np.array([True, True, False, True])
SETTINGS = TrainSettings(learning_rate=1e-3, lr_schedule="linear", warmup_share=0.0)
HELDOUT = pa.table({"id": ["a", "b"], "input_ids": [[1, 2], [3]]})


def key(
    made=None, run=RUN, active=ACTIVE, settings=SETTINGS, model="m", heldout=HELDOUT, how="loss"
):
    return run_key(
        design() if made is None else made, run, active, settings,
        how={"metric": how}, model={"path": model}, heldout=heldout_digest(heldout),
    )  # fmt: skip


def changed_plan(**changes):
    made = design()
    first = replace(made.replications[0], **changes)
    return replace(made, replications=(first, *made.replications[1:]))


def test_everything_that_decides_a_score_is_in_its_key():
    keys = [
        key(),
        key(changed_plan(plan_sha256="other")),
        key(changed_plan(warm_sha256="warm")),
        key(run=replace(RUN, kind="add")),
        key(active=~ACTIVE),
        key(settings=replace(SETTINGS, learning_rate=2e-3)),
        key(settings=replace(SETTINGS, seed=1)),
        key(model="n"),
        key(how="accuracy"),
        key(heldout=pa.table({"id": ["a", "b"], "input_ids": [[1, 2], [4]]})),
        key(heldout=pa.table({"id": ["a", "c"], "input_ids": [[1, 2], [3]]})),
    ]
    assert len(set(keys)) == len(keys)


def test_what_decides_no_score_is_not():
    assert key(design(replications=2)) == key(replace(design(), seed=9, dropped={"x": 1}))
    chunked = pa.concat_tables([HELDOUT.slice(0, 1), HELDOUT.slice(1)])
    assert key() == key(heldout=chunked)


def test_a_run_is_found_again_with_its_scores_and_costs(tmp_path):
    uri = f"{tmp_path}/shared"
    kept = scores().replace_schema_metadata({"instructmix.seconds": "1.5"})
    SharedRuns(uri).keep("k", kept, {"trained_tokens": 7})
    SharedRuns(uri).keep("warm", None, {"trained_tokens": 3})
    found = SharedRuns(uri).find("k")
    assert found is not None and found[0] is not None
    assert found[0].equals(kept, check_metadata=True)
    assert found[1] == {"trained_tokens": 7}
    assert SharedRuns(uri).find("warm") == (None, {"trained_tokens": 3})
    assert SharedRuns(uri).find("other") is None


def test_scores_without_their_commit_are_not_found(tmp_path):
    uri = f"{tmp_path}/shared"
    SharedRuns(uri).keep("k", scores(), {})
    (tmp_path / "shared" / "k.json").unlink()
    assert SharedRuns(uri).find("k") is None
