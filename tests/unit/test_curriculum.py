"""Curriculum: exact totals and sizes, floors, presets, refusals."""

import doctest
import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import system.curriculum.plan
from system.curriculum import Curriculum, plan_curriculum
from system.curriculum.flow import StageTable, nearest_table
from system.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
PRESETS = ("tilted", "sequential", "natural", "reversed")


@st.composite
def mixes(draw, max_categories=8, max_count=60):
    num = draw(st.integers(1, max_categories))
    counts = draw(st.lists(st.integers(0, max_count), min_size=num, max_size=num))
    if sum(counts) == 0:
        counts[0] = draw(st.integers(1, max_count))
    levels = draw(st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=num, max_size=num))
    return counts, levels


@settings(max_examples=200, deadline=None)
@given(
    mix=mixes(),
    preset=st.sampled_from(PRESETS),
    num_stages=st.integers(1, 7),
    epochs=st.integers(1, 4),
    tilt=st.floats(0, 1),
    rehearsal=st.floats(0, 1),
    data=st.data(),
)
def test_totals_sizes_and_floors_are_exact(mix, preset, num_stages, epochs, tilt, rehearsal, data):
    counts, levels = mix
    total = sum(counts) * epochs
    num_stages = min(num_stages, total)
    sizes = None
    if data.draw(st.booleans()):
        cuts = sorted(
            data.draw(
                st.lists(
                    st.integers(1, total - 1),
                    min_size=num_stages - 1,
                    max_size=num_stages - 1,
                    unique=True,
                )
            )
            if num_stages > 1
            else []
        )
        sizes = [b - a for a, b in itertools.pairwise([0, *cuts, total])]
    plan = plan_curriculum(
        counts,
        levels,
        preset=preset,
        num_stages=num_stages,
        epochs=epochs,
        tilt=tilt,
        rehearsal=rehearsal,
        stage_sizes=sizes,
    )
    table = plan.counts_TS
    assert table.sum(axis=0).tolist() == [n * epochs for n in counts]
    assert [s.size for s in plan.stages] == table.sum(axis=1).tolist()
    if sizes is not None:
        assert table.sum(axis=1).tolist() == sizes
    elif preset != "sequential":
        assert np.ptp(table.sum(axis=1)) <= 1
    for t, s in itertools.product(range(num_stages), range(len(counts))):
        natural = counts[s] * epochs * int(table[t].sum()) / total
        assert table[t, s] >= math.floor(rehearsal * natural - 1e-6)
    lacking = {
        (plan.stages[t].name, str(s))
        for t, s in np.argwhere(table == 0)
        if rehearsal > 0 and counts[s] * epochs >= num_stages
    }
    assert lacking == set(plan.missed)


def tables(sizes, totals, floors):
    """Every integer table with the given sums and floors."""
    if len(sizes) == 1:
        if all(n >= f for n, f in zip(totals, floors[0], strict=True)):
            yield [tuple(totals)]
        return
    options = (range(f, n + 1) for f, n in zip(floors[0], totals, strict=True))
    for row in itertools.product(*options):
        if sum(row) == sizes[0]:
            left = [n - x for n, x in zip(totals, row, strict=True)]
            for rest in tables(sizes[1:], left, floors[1:]):
                yield [row, *rest]


@settings(max_examples=120, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_stages=st.integers(1, 3),
    rehearsal=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    data=st.data(),
)
def test_the_table_is_the_brute_force_optimum_for_any_wanted_table(
    counts, num_stages, rehearsal, data
):
    total = sum(counts)
    num_stages = min(num_stages, total)
    sizes = np.array([total // num_stages] * num_stages)
    sizes[0] += total - sizes.sum()
    problem = StageTable(
        totals_S=np.array(counts),
        sizes_T=sizes,
        level_S=np.zeros(len(counts)),
        rehearsal=rehearsal,
    )
    cells = st.floats(0, 6, allow_subnormal=False)
    wanted = np.array([[data.draw(cells) for _ in counts] for _ in range(num_stages)], dtype=float)
    table, deviation = nearest_table(problem, wanted, problem.floor_TS)

    def score(candidate):
        array = np.array(candidate)
        return len(problem.missed(array)), np.abs(array - wanted).sum()

    best = min(score(t) for t in tables(sizes.tolist(), counts, problem.floor_TS.tolist()))
    missed, distance = score(table)
    assert missed == best[0]
    assert distance == pytest.approx(best[1], abs=1e-6)
    assert deviation == pytest.approx(distance, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), num_stages=st.integers(1, 5), epochs=st.integers(1, 3))
def test_natural_stages_are_the_mix_in_small_to_within_one_example(mix, num_stages, epochs):
    counts, levels = mix
    total = sum(counts) * epochs
    plan = plan_curriculum(
        counts, levels, preset="natural", num_stages=min(num_stages, total), epochs=epochs
    )
    table = plan.counts_TS
    natural = np.outer(table.sum(axis=1), np.array(counts) * epochs) / total
    if not plan.missed and (natural >= 1).all():
        assert (np.abs(table - natural) < 1).all()
    assert plan.note == "" or plan.missed


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), num_stages=st.integers(1, 5), tilt=st.floats(0, 1), rehearsal=st.floats(0, 1))
def test_reversed_is_the_mirror_image_of_tilted(mix, num_stages, tilt, rehearsal):
    counts, levels = mix
    options = {
        "num_stages": min(num_stages, sum(counts)),
        "tilt": tilt,
        "rehearsal": rehearsal,
    }
    forward = plan_curriculum(counts, levels, preset="tilted", **options)
    backward = plan_curriculum(counts, levels, preset="reversed", **options)
    assert (backward.counts_TS == forward.counts_TS[::-1]).all()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(50, 500), min_size=2, max_size=8),
    num_stages=st.integers(2, 6),
    tilt=st.floats(0, 1),
    data=st.data(),
)
def test_tilt_bounds_how_far_any_cell_moves_and_follows_the_levels(counts, num_stages, tilt, data):
    levels = data.draw(st.permutations(range(len(counts))))
    plan = plan_curriculum(counts, levels, num_stages=num_stages, tilt=tilt, rehearsal=1 - tilt)
    table = plan.counts_TS
    natural = np.outer(table.sum(axis=1), counts) / sum(counts)
    assert (np.abs(table - natural) <= tilt * natural + 1).all()
    lowest, highest = levels.index(0), levels.index(len(counts) - 1)
    assert (np.diff(table[:, lowest]) <= 2).all()
    assert (np.diff(table[:, highest]) >= -2).all()


def test_full_tilt_brings_the_extreme_level_from_its_floor_to_the_double():
    plan = plan_curriculum([500, 500], [0, 1], num_stages=3, tilt=1.0, rehearsal=0.0)
    table = plan.counts_TS
    assert table[0].tolist() == [334, 0]
    assert table[2].tolist() == [0, 333]
    kept = plan_curriculum([500, 500], [0, 1], num_stages=3, tilt=1.0, rehearsal=0.2).counts_TS
    assert kept[0, 1] == math.floor(0.2 * 500 * 334 / 1000)


def test_examples_pushed_out_by_floors_are_taken_from_all_categories_alike():
    # Two equal base categories must make room in the first stage for the rehearsed one.
    plan = plan_curriculum(
        [300, 300, 300], [0, 0, 1], preset="sequential", stage_sizes=[600, 300],
        num_stages=2, rehearsal=0.3,
    )  # fmt: skip
    assert plan.counts_TS.tolist() == [[270, 270, 60], [30, 30, 240]]


def test_sequential_makes_one_stage_a_level_when_there_are_as_many():
    plan = plan_curriculum(
        {"a": 30, "b": 50, "c": 7, "d": 13},
        {"a": 0, "b": 1, "c": 0, "d": 4},
        preset="sequential",
        num_stages=3,
        rehearsal=0.0,
    )
    assert plan.counts_TS.tolist() == [[30, 0, 7, 0], [0, 50, 0, 0], [0, 0, 0, 13]]


def test_sequential_with_other_stage_counts_cuts_equal_stages_through_the_levels():
    plan = plan_curriculum(
        [40, 40, 20], [0, 1, 2], preset="sequential", num_stages=2, rehearsal=0.0
    )
    assert plan.counts_TS.tolist() == [[40, 10, 0], [0, 30, 20]]


def test_a_category_without_a_level_keeps_its_share_in_every_stage():
    for preset in ("tilted", "reversed", "sequential"):
        plan = plan_curriculum(
            [300, 300, 300], [0, 1, None], preset=preset, num_stages=3, rehearsal=0.0
        )
        sizes = plan.counts_TS.sum(axis=1)
        assert (np.abs(plan.counts_TS[:, 2] - sizes / 3) < 1).all()


def test_paper_moves_a_tenth_to_the_base_and_mirrors_it():
    counts = {"math": 250, "code": 150, "facts": 300, "chat": 200, "style": 100}
    levels = {"math": 0, "code": 0, "facts": 1, "chat": 2, "style": 2}
    plan = plan_curriculum(counts, levels, preset="paper", num_stages=7, epochs=5)
    first, second, third = plan.counts_TS
    mix = np.array(list(counts.values()))
    assert [stage.size for stage in plan.stages] == [1000] * 3
    assert first[:2].sum() == 400 + 100
    assert first[3:].sum() == 300 - 100
    assert first[2] == 300
    assert second.tolist() == mix.tolist()
    assert (first + third == 2 * mix).all()
    assert np.abs(first - mix * np.array([5 / 4, 5 / 4, 1, 2 / 3, 2 / 3])).max() < 1
    assert plan.epochs == 3


@pytest.mark.parametrize(("size", "moved"), [(49_999, 4_999), (50_000, 2_500)])
def test_paper_moves_a_twentieth_from_fifty_thousand_up(size, moved):
    plan = plan_curriculum([size // 2, size - size // 2], [0, 1], preset="paper")
    assert plan.counts_TS[0, 0] - size // 2 == moved
    assert plan.counts_TS[2, 0] - size // 2 == -moved


def test_paper_says_by_how_much_it_cannot_be_done():
    with pytest.raises(ConfigError, match=r"moves 100 of 1000 .* dependent categories hold 60"):
        plan_curriculum([940, 60], [0, 1], preset="paper", rehearsal=0.0)
    with pytest.raises(ConfigError, match=r"leaves them 16.7% .* asks for 20.0%.*at most 96"):
        plan_curriculum([880, 120], [0, 1], preset="paper", rehearsal=0.2)
    plan = plan_curriculum([880, 120], [0, 1], preset="paper", rehearsal=0.2, paper_shift=96)
    assert plan.counts_TS[0].tolist() == [976, 24]


@pytest.mark.parametrize("shift", [0.1, 96.0, True])
def test_paper_shift_is_a_number_of_examples_not_a_share(shift):
    with pytest.raises(ConfigError, match="paper_shift is a number of examples"):
        plan_curriculum([880, 120], [0, 1], preset="paper", paper_shift=shift)


_ELSEWHERE = """
import highspy
import numpy as np
used = highspy.Highs()
used.setOptionValue("output_flag", False)
used.setOptionValue("threads", 2)
used.run()
from system.curriculum import plan_curriculum
print(plan_curriculum({"math": 6, "essay": 6}, {"math": 0, "essay": 1}, num_stages=2).counts_TS)
from system.taxonomy.linear_ordering import solve_milp
gain = np.array([[0.0, 3.0, 0.0], [1.0, 0.0, 1.0], [2.5, 0.0, 0.0]])
print(solve_milp(gain, np.arange(3), 100))
"""


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_plans_and_orders_come_out_where_others_used_more_threads_and_without_asserts(flags):
    done = subprocess.run(
        [sys.executable, *flags, "-c", _ELSEWHERE], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[5 1]\n [1 5]]\n(array([2, 0, 1]), 5.5)\n"


@pytest.mark.parametrize("preset", ["tilted", "sequential", "reversed", "paper"])
def test_equal_levels_give_natural_stages_and_say_so(preset):
    plan = plan_curriculum([60, 30], [0, 0], preset=preset, num_stages=3)
    natural = plan_curriculum([60, 30], [0, 0], preset="natural", num_stages=3, epochs=plan.epochs)
    assert (plan.counts_TS == natural.counts_TS).all()
    assert "no order to follow" in plan.note
    assert natural.note == ""


def test_one_stage_is_the_whole_mix_and_one_category_fills_every_stage():
    for preset in PRESETS:
        assert plan_curriculum([3, 0, 9], [0, 1, 2], preset=preset, num_stages=1, epochs=2).counts_TS.tolist() == [[6, 0, 18]]  # fmt: skip  # noqa: E501
        assert plan_curriculum([7], [0], preset=preset, num_stages=3).counts_TS.ravel().sum() == 7


def test_a_category_too_small_for_every_stage_is_not_missed_but_a_larger_one_is():
    plan = plan_curriculum([1, 3, 996], [0, 1, 2], num_stages=3, tilt=1.0, rehearsal=0.5)
    assert plan.counts_TS[:, 0].tolist().count(0) == 2
    assert plan.counts_TS[:, 1].tolist() == [1, 1, 1]
    assert plan.missed == ()
    tight = plan_curriculum(
        [40, 40, 40], [0, 1, 2], num_stages=3, stage_sizes=[2, 59, 59], rehearsal=0.1
    )
    assert len(tight.missed) == 1
    assert tight.missed[0][0] == "stage-1"
    assert "1 pairs of stage and category" in tight.note


def test_counts_of_billions_stay_exact():
    counts = [2_000_000_011, 999_999_937, 7, 123_456_789_012]
    plan = plan_curriculum(counts, [0, 1, 2, 3], num_stages=7, epochs=3, tilt=0.9)
    assert plan.counts_TS.sum(axis=0).tolist() == [3 * n for n in counts]
    assert np.ptp(plan.counts_TS.sum(axis=1)) <= 1


@settings(max_examples=40, deadline=None)
@given(mix=mixes(), preset=st.sampled_from(PRESETS))
def test_scaling_the_mix_scales_the_stages(mix, preset):
    counts, levels = mix
    plan = plan_curriculum(counts, levels, preset=preset, num_stages=1, rehearsal=0.0)
    large = plan_curriculum(
        [1000 * n for n in counts], levels, preset=preset, num_stages=4, rehearsal=0.0
    )
    larger = plan_curriculum(
        [8000 * n for n in counts], levels, preset=preset, num_stages=4, rehearsal=0.0
    )
    assert (np.abs(8 * large.counts_TS - larger.counts_TS) <= 16).all()
    assert plan.counts_TS.tolist() == [counts]


def test_the_same_question_has_the_same_answer_in_any_order_of_naming():
    counts = {"a": 331, "b": 172, "c": 419, "d": 78}
    levels = {"d": 2, "c": 1, "b": 0, "a": 0}
    plan = plan_curriculum(counts, levels)
    again = plan_curriculum(dict(reversed(counts.items())), levels)
    assert [s.counts for s in plan.stages] == [s.counts for s in again.stages]


def test_curriculum_json_has_the_promised_keys_and_comes_back():
    plan = plan_curriculum({"a": 10, "b": 5}, {"a": 0, "b": None}, num_stages=2)
    content = json.loads(json.dumps(plan.to_json()))
    assert content["levels"] == {"a": 0, "b": None}
    assert [set(stage) for stage in content["stages"]] == [{"name", "size", "counts"}] * 2
    assert sum(stage["counts"]["a"] for stage in content["stages"]) == 10
    assert Curriculum.from_json(content) == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [0, 0]}, "all 2 categories have the count 0"),
        ({"counts": [1.5, 2]}, "category '0' has 1.5"),
        ({"counts": [-1, 2]}, "category '0' has -1"),
        ({"counts": {"a": 1, "b": 2}, "levels": {"a": 0}}, r"without a level: \['b'\]"),
        ({"levels": [0]}, "got 1 levels for 2"),
        ({"levels": [0, -1]}, "category '1' has -1"),
        ({"num_stages": 0}, "num_stages must be a whole number from 1 up; got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number from 1 up; got 1.5"),
        ({"num_stages": 16}, "16 stages need at least 16 examples.* has 15"),
        ({"stage_sizes": [7, 7]}, "3 numbers .* sum 15 .* got 2 numbers with the sum 14"),
        ({"stage_sizes": [15, 0, 0]}, r"whole numbers from 1 up; got \[15, 0, 0\]"),
        ({"tilt": 1.2}, "tilt must be between 0 and 1; got 1.2"),
        ({"rehearsal": float("nan")}, "rehearsal must be between 0 and 1; got nan"),
        ({"preset": "random"}, "one of tilted, paper, .* got 'random'"),
        ({"preset": "paper", "stage_sizes": [15, 15, 15]}, r"three passes .*\(15 examples\)"),
    ],
)
def test_impossible_settings_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan_curriculum(**{"counts": [10, 5], "levels": [0, 1]} | arguments)


def test_the_docstring_example_is_true():
    assert doctest.testmod(system.curriculum.plan).failed == 0


def test_every_example_in_the_docs_is_true():
    page = pathlib.Path(__file__).parents[2] / "docs" / "curriculum.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0
    assert result.attempted >= 10
