"""Two influence stages beside each other, matched by name."""

from dataclasses import replace

import numpy as np
import pytest
from influence_world import World

from system import storage
from system.cli import main
from system.errors import DataError
from system.influence.estimate.comparison import describe_comparison, shared_part
from system.influence.estimate.matrix import EffectMatrix, estimate_effects
from system.rundir import RunDir, StageRecord


def leave(root, name, matrix: EffectMatrix, tokens=1e6):
    """A run directory with nothing but an influence stage."""
    run_dir = RunDir(str(root / name))
    attempt = run_dir.attempt_uri("influence", "f")
    storage.write_table(f"{attempt}/matrix.parquet", matrix.to_table())
    cost = {"runs": 9, "token_equivalents": tokens}
    summary = {"estimator": "retrain", "replications": 2, "directions": {matrix.direction: {}}}
    storage.write_json(f"{attempt}/summary.json", summary | {"cost": cost})
    outputs = {kind: f"influence/f/{kind}" for kind in ("matrix.parquet", "summary.json")}
    record = StageRecord(
        stage="influence", fingerprint="f", inputs={}, counts={}, lines=(), seconds=0.0,
        finished="", versions={},
        outputs={"matrix": outputs["matrix.parquet"], "summary": outputs["summary.json"]},
    )  # fmt: skip
    run_dir.commit("influence", record)
    return str(root / name)


def matrix(world: World | None = None, draw: int = 0) -> EffectMatrix:
    return estimate_effects((world or World()).measure(2, draw=draw)).matrix


def test_a_run_agrees_with_itself_at_equal_cost(tmp_path, capsys):
    one = leave(tmp_path, "one", matrix())
    assert main(["compare", one, one]) == 0
    shown = capsys.readouterr().out
    assert "rank correlation over all pairs: +1.00" in shown
    assert "same sign: 100% of pairs" in shown
    assert "effects, second per first: 1.00" in shown and "cost, second per first: 1.000" in shown


def test_a_quiet_second_draw_agrees_and_another_world_does_not(tmp_path):
    quiet = World(shared_noise=0.001, run_noise=0.001, example_effect=0.01)
    one = leave(tmp_path, "one", matrix(quiet))
    again = leave(tmp_path, "again", matrix(quiet, draw=1), tokens=1e5)
    other = leave(tmp_path, "other", matrix(replace(quiet, seed=5)))

    def rank(second):
        line = next(line for line in describe_comparison(one, second).split("\n") if "all" in line)
        return float(line.split(":")[1].split("[")[0])

    assert rank(again) > 0.95 > 0.6 > abs(rank(other))
    assert "cost, second per first: 0.100" in describe_comparison(one, again)


def test_entries_are_matched_by_name_not_by_place():
    made = matrix()
    turned = made.part(made.targets[::-1], made.sources[::-1])
    one, other = shared_part(made, turned)
    np.testing.assert_array_equal(one.effect_TS, other.effect_TS)
    np.testing.assert_array_equal(one.dose_S, other.dose_S)
    fewer = made.part(made.targets[2:6], made.sources[1:5])
    one, other = shared_part(made, fewer)
    assert one.targets == fewer.targets and one.effect_TS.shape == (4, 4)
    np.testing.assert_array_equal(one.gamma_TS, other.gamma_TS)


def test_too_little_in_common_is_an_error(tmp_path, capsys):
    made = matrix()
    with pytest.raises(DataError, match="renamed"):
        shared_part(made, made.part(made.targets[:2], made.sources[:2]))
    one = leave(tmp_path, "one", made)
    added = leave(tmp_path, "added", estimate_effects(World().measure(2, direction="add")).matrix)
    assert main(["compare", one, added]) == 2
    assert "influence.directions" in capsys.readouterr().err
    assert main(["compare", one, str(tmp_path / "none")]) == 2
    assert "--until influence" in capsys.readouterr().err
