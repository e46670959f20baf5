from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from training_builders import build_small_plan, build_tokens

from system import storage
from system.errors import DataError
from system.training.plan import build_plan, plan_from_table, read_plan, write_plan


def test_steps_take_rows_in_training_order():
    tokens = build_tokens(40)
    plan = build_small_plan(tokens, batch_size=16)
    assert plan.num_steps == 3
    for step in range(3):
        expected = tokens.column("id").to_pylist()[16 * step : 16 * step + 16]
        assert sorted(plan.ids(plan.rows(step))) == sorted(expected)
    assert [plan.stage(step) for step in range(3)] == ["first", "second", "second"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_every_step_without_overlap(world_size, packing):
    plan = build_small_plan(packing=packing)
    for step in range(plan.num_steps):
        shares = [plan.rows(step, rank, world_size) for rank in range(world_size)]
        together = np.sort(np.concatenate(shares))
        assert together.tolist() == plan.rows(step).tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_rank_has_much_more_than_its_share(world_size):
    plan = build_small_plan(build_tokens(256), batch_size=64, packing=True)
    for step in range(plan.num_steps):
        shares = [plan.rows(step, rank, world_size) for rank in range(world_size)]
        loads = [int(plan.lengths(rows).sum()) for rows in shares]
        longest = int(plan.lengths(plan.rows(step)).max())
        assert max(loads) - min(loads) <= longest
        assert max(loads) <= 1.05 * sum(loads) / world_size


def test_denominators_count_response_tokens_that_something_comes_before():
    tokens = pa.table(
        {
            "id": ["a", "b"],
            "category": ["c", "c"],
            "input_ids": [[1, 2, 3], [4, 5, 6, 7]],
            "response_mask": [[True, True, True], [False, False, True, True]],
        }
    )
    plan = build_plan(tokens, ["s", "s"], batch_size=2, max_length=8, packing=True)
    assert plan.denominators.tolist() == [2 + 2]


def test_packing_changes_neither_steps_nor_denominators():
    packed, loose = build_small_plan(packing=True), build_small_plan(packing=False)
    assert packed.denominators.tolist() == loose.denominators.tolist()
    assert packed.sequences.max() < loose.sequences.max()


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_a_written_plan_reads_back_with_its_hash(tmp_path, ending):
    plan = build_small_plan()
    uri = str(tmp_path / f"plan.{ending}")
    write_plan(uri, plan)
    again = read_plan(uri)
    assert again.sha256 == plan.sha256
    assert again.input_ids.tolist() == plan.input_ids.tolist()
    assert again.table.equals(plan.table)


def test_hash_sees_every_column_and_not_the_chunking():
    tokens = build_tokens(20)
    plan = build_small_plan(tokens)
    chunked = pa.concat_tables([tokens.slice(0, 7), tokens.slice(7)])
    assert build_small_plan(chunked).sha256 == plan.sha256
    for name in ("id", "category", "stage"):
        column = pa.array(["other", *plan.table.column(name).to_pylist()[1:]])
        index = plan.table.schema.get_field_index(name)
        changed = plan.table.set_column(index, plan.table.schema.field(name), column)
        assert plan_from_table(changed).sha256 != plan.sha256
    assert build_small_plan(tokens.slice(0, 19)).sha256 != plan.sha256


def test_a_changed_file_is_refused(tmp_path):
    plan = build_small_plan()
    uri = str(tmp_path / "plan.parquet")
    other = build_small_plan(build_tokens(seed=1))
    metadata = {"instructmix.plan": "1", "instructmix.sha256": plan.sha256}
    storage.write_table(uri, other.table.replace_schema_metadata(metadata))
    with pytest.raises(DataError, match="was changed"):
        read_plan(uri)


def test_rows_without_anything_to_learn_are_refused_by_name():
    tokens = pa.table(
        {
            "id": ["good", "bad"],
            "category": ["c", "c"],
            "input_ids": [[1, 2], [3, 4]],
            "response_mask": [[False, True], [True, False]],
        }
    )
    with pytest.raises(DataError, match="bad"):
        build_plan(tokens, ["s", "s"], batch_size=2, max_length=8, packing=False)


def test_empty_selection_is_refused():
    with pytest.raises(DataError, match="no rows to train on"):
        build_plan(build_tokens(0), [], batch_size=2, max_length=8, packing=False)
