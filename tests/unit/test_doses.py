"""Several doses on one schedule: nested rows, counted runs, each dose as it would be alone."""

import json

import numpy as np
import pyarrow as pa
import pytest
from design_builders import SOURCES, active_ids, config, design_of, schedule, unit

from actors.pipeline import STAGES, stage_inputs
from system.config import InfluenceConfig, RunConfig
from system.config.load import parse_config
from system.errors import ConfigError
from system.influence.design.design import Design, InterventionRun
from system.influence.design.doses import at_level, distinct_doses
from system.influence.design.interventions import active_rows
from system.influence.estimate.dose_views import design_at, levels_table, losses_at, read_levels
from system.influence.estimate.matrix import EffectMatrix, estimate_effects
from system.influence.estimate.measurements import Losses, Measurements, paired_differences
from system.rundir import StageRecord

DOSES = (4, 8, 12)
BOTH = ("add", "remove")
FEW = {"alpha": 500, "beta": 500, "gamma": 27}
"""27 of 36 rows asked: base 18, a dose of 9."""


def several(index=0, **knobs):
    return schedule(index, dose_rows=DOSES, directions=BOTH, **knobs)


def several_design(made, **knobs):
    return design_of(made, dose_rows=DOSES, directions=BOTH, **knobs)


def moved(made, kind, source, dose):
    """Ids of the rows by which a run differs from the reference."""
    run = InterventionRun(replication=0, kind=kind, source=source, dose=dose)
    mask = active_rows(made.plan, run, several_design([made]))
    rows = made.plan.table.column("id").to_pylist()
    here = {name for name, is_on in zip(rows, mask, strict=True) if is_on}
    return here ^ active_ids(made, unit("reference"))


def test_a_list_of_one_dose_is_that_dose():
    knobs = {"directions": BOTH, "estimator": "branch", "warm_rows_per_category": 12}
    supply = {"alpha": 500, "beta": 34, "gamma": 500}
    one, listed = (
        [schedule(index, supply=supply, dose_rows=dose, **knobs) for index in range(2)]
        for dose in (12, [12])
    )
    assert [item.plan.sha256 for item in one] == [item.plan.sha256 for item in listed]
    assert [item.replication.plan_sha256 for item in one] == [item.plan.sha256 for item in one]
    written = design_of(one, dose_rows=12, **knobs).to_json()
    assert written == design_of(listed, dose_rows=[12], **knobs).to_json()
    assert "doses" not in written and "smaller_tokens" not in written["replications"][0]
    assert all("dose" not in name for name in written["units"])


@pytest.mark.parametrize("kind", BOTH)
def test_the_rows_of_a_smaller_dose_are_part_of_the_larger(kind):
    made = several()
    sets = [moved(made, kind, 1, dose) for dose in DOSES]
    assert [len(rows) for rows in sets] == list(DOSES)
    assert sets[0] < sets[1] < sets[2]
    assert all(name.startswith("beta-") for name in sets[2])


def test_the_largest_dose_is_that_of_a_design_with_it_alone():
    """Also in its name among shared runs: a run at the largest dose need not be made again."""
    made, alone = several(), schedule(dose_rows=12, directions=BOTH)
    assert made.plan.table.drop_columns("stage").equals(alone.plan.table.drop_columns("stage"))
    assert made.replication.plan_sha256 == alone.plan.sha256
    whole = design_of([alone], dose_rows=12, directions=BOTH)
    for kind in BOTH:
        one = active_rows(alone.plan, unit(kind, 2), whole)
        run = InterventionRun(replication=0, kind=kind, source=2, dose=12)
        np.testing.assert_array_equal(one, active_rows(made.plan, run, several_design([made])))


def test_a_removed_dose_is_that_of_a_design_with_it_alone():
    """Removing adds no row to the schedule, so each dose has the very run that it would have."""
    both = {"rows_per_category": 24, "directions": ("remove",)}
    made = schedule(dose_rows=DOSES, **both)
    for dose in DOSES:
        alone = schedule(dose_rows=dose, **both)
        assert made.plan.table["id"].equals(alone.plan.table["id"])
        run = InterventionRun(replication=0, kind="remove", source=0, dose=dose)
        np.testing.assert_array_equal(
            active_rows(made.plan, run, design_of([made], dose_rows=DOSES, **both)),
            active_rows(alone.plan, unit("remove", 0), design_of([alone], dose_rows=dose, **both)),
        )


def test_a_design_counts_the_runs_of_all_doses():
    made = several_design([several(index) for index in range(2)])
    names = [item.name for item in made.all_runs]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * 3 * 3)
    assert {"r00-reference", "r01-remove-002-dose4", "r00-add-000-dose12"} <= set(names)
    assert Design.from_json(json.loads(json.dumps(made.to_json())), "design.json") == made


def test_doses_that_come_to_the_same_rows_are_measured_once():
    made = several(supply=FEW)
    rows = made.replication.rows["gamma"]
    assert (rows.dose, rows.extra) == (9, 9)
    design = several_design([made])
    of_gamma = [item.dose for item in design.all_runs if item.kind == "add" and item.source == 2]
    assert of_gamma == [4, 8, 12]
    assert len(moved(made, "add", 2, 12)) == 9
    smaller = schedule(dose_rows=(4, 9, 12), directions=BOTH, supply=FEW)
    design = design_of([smaller], dose_rows=(4, 9, 12), directions=BOTH)
    assert [u.dose for u in design.all_runs if u.kind == "remove" and u.source == 2] == [4, 9]
    assert [u.dose for u in design.all_runs if u.kind == "remove" and u.source == 1] == [4, 9, 12]


@pytest.mark.parametrize(
    ("most", "distinct"), [(64, [16, 32, 64]), (33, [16, 32, 64]), (32, [16, 32]), (5, [16])]
)
def test_the_first_dose_that_takes_all_rows_is_the_last(most, distinct):
    assert distinct_doses((16, 32, 64), most) == distinct


def random_losses(design, seed=0):
    """Losses of all runs; those of a dose that is capped are its only run's."""
    rng = np.random.default_rng(seed)
    return Losses(
        examples=tuple(np.arange(9) + 9 * row for row in range(len(design.targets))),
        num_tokens_N=np.full(9 * len(design.targets), 3),
        loss={run.name: rng.normal(size=9 * len(design.targets)) for run in design.runs},
        num_incomplete=0,
    )


@pytest.mark.parametrize("dose", [4, 9, 12])
def test_each_dose_is_analysed_as_if_it_were_alone(dose):
    doses = (4, 9, 12)
    knobs = {"directions": BOTH, "supply": FEW}
    made = [schedule(index, dose_rows=doses, **knobs) for index in range(2)]
    design = design_of(made, dose_rows=doses, directions=BOTH)
    losses = random_losses(design)
    view = design_at(design, dose)
    found = paired_differences(view, losses_at(design, losses, dose), "remove")
    held = np.minimum([12, 12, 9], dose)
    np.testing.assert_array_equal(found.dose_S, held)
    np.testing.assert_array_equal(found.dose_tokens_S, 2 * held)
    for source, rows in enumerate(held):
        asked = min(item for item in doses if item >= rows)
        run = losses.loss[f"r01-remove-{source:03d}-dose{asked}"]
        expected = run - losses.loss["r01-reference"]
        np.testing.assert_array_equal(found.differences[0][1, source], expected[:9])


def matrices(doses=(4.0, 8.0, 12.0), capped=None):
    """The same three categories at every dose; `capped`: most rows of the last."""
    found = []
    for place, dose in enumerate(doses):
        rng = np.random.default_rng(place)
        dose_S = np.array([dose, dose, dose if capped is None else min(dose, capped)])
        measured = Measurements(
            targets=SOURCES, sources=SOURCES, direction="add", estimator="retrain",
            dose_S=dose_S, dose_tokens_S=3 * dose_S,
            differences=tuple(rng.normal(size=(2, 3, 9)) for _ in SOURCES),
        )  # fmt: skip
        found.append(estimate_effects(measured).matrix)
    return found


def test_the_matrix_of_every_dose_survives_the_table():
    levels = matrices()
    table = levels_table(levels)
    rows = table.select(["target", "source", "direction", "dose", "unit"]).to_pylist()
    assert len(rows) == 3 * 9 == len({tuple(row.values()) for row in rows})
    back = read_levels(table, direction="add")
    assert len(back) == 3
    for one, other in zip(back, levels, strict=True):
        np.testing.assert_array_equal(one.dose_S, other.dose_S)
        np.testing.assert_array_equal(one.effect_TS, other.effect_TS)
        np.testing.assert_array_equal(one.gamma_TS, other.gamma_TS)
    largest = EffectMatrix.from_table(table, direction="add")
    np.testing.assert_array_equal(largest.effect_TS, levels[-1].effect_TS)


def test_a_capped_source_has_one_set_of_rows_for_equal_doses():
    levels = matrices(capped=8.0)
    table = levels_table(levels)
    assert table.num_rows == 2 * 9 + 3 * 2
    back = read_levels(table, direction="add")
    np.testing.assert_array_equal(back[2].dose_S, [12.0, 12.0, 8.0])
    np.testing.assert_array_equal(back[2].effect_TS[:, 2], levels[1].effect_TS[:, 2])
    np.testing.assert_array_equal(back[2].effect_TS[:, :2], levels[2].effect_TS[:, :2])


def test_one_dose_is_the_table_that_it_always_was():
    (matrix,) = matrices(doses=(8.0,))
    assert levels_table([matrix]).equals(matrix.to_table())
    assert len(read_levels(matrix.to_table(), direction="add")) == 1


def test_a_level_that_was_not_measured_is_refused():
    rows = [{"source": "a", "dose": 4.0}, {"source": "a", "dose": 8.0}]
    assert at_level(rows, 1) == rows[1:] == at_level(rows, -1)
    for level in (2, -3):
        with pytest.raises(ValueError, match=f"expected a dose level from -2 to 1, found {level}"):
            at_level(rows, level)


def test_a_row_that_is_twice_there_is_still_an_error():
    table = levels_table(matrices())
    with pytest.raises(ValueError, match="expected one row for each"):
        EffectMatrix.from_table(pa.concat_tables([table, table.slice(20, 1)]), direction="add")


def run_config(**influence):
    value = {
        "run_dir": "r", "sources": [{"path": "a"}], "model": {"path": "builtin:tiny"},
        "solve": {"budget": 10}, "influence": influence,
    }  # fmt: skip
    return parse_config(value, "run.yaml")


def inputs(config: RunConfig, name: str):
    stage = next(stage for stage in STAGES if stage.name == name)
    record = StageRecord(
        stage="s", fingerprint="f", inputs={}, outputs={}, counts={}, lines=(), seconds=0.0,
        finished="", versions={},
    )  # fmt: skip
    return stage_inputs(stage, config, dict.fromkeys(stage.after, record))


def test_doses_in_any_order_are_one_configuration_and_one_of_them_is_a_number():
    assert InfluenceConfig(dose_rows=(64, 16, 32)).doses == (16, 32, 64)
    assert InfluenceConfig.model_validate({"dose_rows": [64]}).dose_rows == 64
    assert inputs(run_config(dose_rows=[64]), "influence")["influence.dose_rows"] == 64
    one, other = (run_config(dose_rows=list(d)) for d in ((16, 64), (64, 16)))
    assert inputs(one, "influence") == inputs(other, "influence")


def test_which_dose_decides_is_read_only_where_there_are_several():
    assert "solve.dose" not in inputs(run_config(), "solve")
    assert inputs(run_config(dose_rows=[16, 64]), "solve")["solve.dose"] == "nearest"


def test_a_limit_of_the_search_is_an_input_of_the_solver():
    plain = run_config()
    limited = plain.model_copy(
        update={"solve": plain.solve.model_copy(update={"mip_max_nodes": 9})}
    )
    assert inputs(limited, "solve") == inputs(plain, "solve") | {"solve.mip_max_nodes": 9}


def test_the_settings_of_auto_are_read_by_estimator_auto_alone():
    def with_regret(regret: float, **settings: object) -> dict[str, object]:
        return inputs(run_config(auto={"regret": regret}, **settings), "influence")

    assert with_regret(0.1) == with_regret(0.2)
    assert with_regret(0.1, estimator="auto") != with_regret(0.2, estimator="auto")


@pytest.mark.parametrize(
    ("influence", "words"),
    [
        ({"dose_rows": [16, 16]}, "each once, found [16, 16]"),
        ({"dose_rows": []}, "each once, found []"),
        ({"dose_rows": [16, 300]}, "dose_rows 300 is more than rows_per_category 192"),
        ({"dose_rows": 0}, "influence.dose_rows: expected a whole number of rows above 0"),
        ({"dose_rows": ["many"]}, "influence.dose_rows: expected a whole number of rows above 0"),
        ({"dose_rows": [8, 16], "estimator": "gradient"}, "estimator retrain or branch"),
        ({"dose_rows": [8, 16], "estimator": "random-design"}, "estimator retrain or branch"),
        ({"dose_rows": [8, 16], "estimator": "auto"}, "estimator retrain or branch"),
    ],
)
def test_doses_that_cannot_be_measured_are_refused_in_one_sentence(influence, words):
    with pytest.raises(ConfigError) as caught:
        run_config(**influence)
    assert words in str(caught.value)
    assert str(caught.value).count("influence") <= 2


def test_asked_rows_are_those_of_the_largest_dose():
    assert config(dose_rows=DOSES).largest_dose == 12
    made = several(supply=FEW)
    assert made.replication.smaller_tokens["add"]["gamma"] == [8, 16]
    assert made.replication.dose_tokens["add"]["gamma"] == 18
