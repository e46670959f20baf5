from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from system.errors import ConfigError
from system.tagging.choose import (
    TAGS,
    instruction_of,
    measure_accuracy,
    normal_form,
    pick,
    rename_categories,
    stratified_sizes,
)

NAMES = ("code", "creative writing", "math")


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Math", "math"), (" MATH ", "math"), ("MATH!", None),
        ("creative_writing", "creative writing"),
        ("Creative-Writing", "creative writing"), ("ｃｏｄｅ", "code"), ("maths", "math"),
        ("Story-Telling", "creative writing"), ("Story/Telling", None),
        ("story\u2010telling", "creative writing"), ("coding", None), ("", None),
    ],
)  # fmt: skip
def test_free_tags_find_their_name_or_none(tag: str, name: str | None):
    aliases = {"Maths": "math", "story telling": "creative writing"}
    assert rename_categories({tag: 1}, NAMES, aliases) == {tag: name}


def test_normal_form_is_idempotent():
    for tag in ("A_b-C", "Émile  (x)", "Straße", "ﬁ"):
        assert normal_form(normal_form(tag)) == normal_form(tag)


@pytest.mark.parametrize(
    "names",
    [
        ("C", "C++", "C#", "c*", "C.", "(C)"), ("Q&A", "Q A", "Q/A"), ("R", "R?"), ("10²", "102"),
        (".NET", "net"), ("数学", "数学!"), ("①", "1"), ("naïve", "naive"),
    ],
)  # fmt: skip
def test_names_that_differ_in_other_characters_are_different(names):
    assert rename_categories(dict.fromkeys(names, 5), (), {}) == {name: name for name in names}
    assert len({normal_form(name) for name in names}) == len(names)
    listed = tuple(names)
    assert rename_categories({}, listed, {}) == {}


@pytest.mark.parametrize("spelling", ["c++ code", "C++_Code", " C++-code ", "Ｃ＋＋ code"])
def test_names_with_punctuation_are_found_in_other_spellings(spelling):
    assert rename_categories({spelling: 1}, ("C++ code", "C code"), {}) == {spelling: "C++ code"}


def test_an_alias_for_something_unknown_is_an_error():
    with pytest.raises(ConfigError, match="'science'"):
        rename_categories({}, NAMES, {"physics": "science"})


def test_two_spellings_of_one_name_are_an_error():
    with pytest.raises(ConfigError, match="two spellings"):
        rename_categories({}, ("Math", "math"), {})


def test_without_names_spellings_merge_into_the_most_frequent():
    found = {"Math": 5, "math": 90, "MATH": 5, "code": 3}
    assert rename_categories(found, (), {}) == {
        "Math": "math", "math": "math", "MATH": "math", "code": "code",
    }  # fmt: skip


def test_without_names_an_alias_merges_two_categories():
    found = {"maths": 900, "math": 10, "code": 3}
    renamed = rename_categories(found, (), {"maths": "math"})
    assert renamed == {"maths": "math", "math": "math", "code": "code"}


def test_categories_that_are_no_named_one_need_a_choice():
    found = {"Math": 10, "weather": 4}
    assert rename_categories(found, NAMES, {}) == {"Math": "math", "weather": None}


def test_nothing_to_choose_among_is_an_error():
    with pytest.raises(ConfigError, match=r"tag\.categories"):
        rename_categories({}, (), {})


def test_the_instruction_is_the_first_user_turn():
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add 2 and 3."},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 4?"},
    ]
    assert instruction_of(turns) == "Add 2 and 3."
    assert instruction_of(turns[:1] + turns[2:3]) == "Be kind."


def choose(log_likelihood, prior=None):
    scores = np.array(log_likelihood, dtype=float)
    ids = [str(n) for n in range(len(scores))]
    return pick(ids, [None] * len(ids), scores, NAMES, None if prior is None else np.array(prior))


def test_the_name_with_the_highest_score_is_chosen_with_its_margin():
    tags = choose([[-3.0, -1.0, -2.5], [-1.0, -9.0, -9.0]])
    assert tags.schema == TAGS
    assert tags["category"].to_pylist() == ["creative writing", "code"]
    assert tags["margin"].to_pylist() == [1.5, 8.0]


def test_the_prior_of_a_name_is_taken_out():
    tags = choose([[-1.0, -8.0, -5.0]], prior=[-1.0, -10.0, -6.0])
    assert tags["category"].to_pylist() == ["creative writing"]
    assert tags["score"].to_pylist() == [2.0]


def test_ties_go_to_the_first_name_whatever_the_last_digits():
    for noise in (-1e-6, 0.0, 1e-6):
        assert choose([[-5.0, -2.0 + noise, -2.0]])["category"].to_pylist() == ["creative writing"]


def test_a_row_on_which_the_engine_failed_gets_no_category():
    tags = choose([[np.nan] * 3, [-1.0, -2.0, -3.0]])
    assert tags["category"].to_pylist() == [None, "code"]
    assert tags["score"].to_pylist() == [None, -1.0]


def test_samples_are_as_equal_as_supply_allows():
    assert stratified_sizes({"a": 100, "b": 100, "c": 100}, 90) == {"a": 30, "b": 30, "c": 30}
    assert stratified_sizes({"a": 5, "b": 100, "c": 100}, 91) == {"a": 5, "b": 43, "c": 43}
    assert stratified_sizes({"a": 5, "b": 2}, 100) == {"a": 5, "b": 2}
    assert stratified_sizes({"a": 5, "b": 5}, 3) == {"a": 1, "b": 2}
    assert stratified_sizes({}, 10) == {}


def test_no_category_of_a_sample_is_short_while_another_has_more():
    rng = np.random.default_rng(0)
    for _ in range(500):
        rows = {f"c{n}": int(rng.integers(0, 10)) for n in range(rng.integers(1, 7))}
        total = int(rng.integers(0, 40))
        sizes = stratified_sizes(rows, total)
        assert sum(sizes.values()) == min(total, sum(rows.values()))
        for name, size in sizes.items():
            assert size == rows[name] or max(sizes.values()) - 1 <= size <= rows[name]


def test_accuracy_recall_and_confusion_by_hand():
    known = ["a"] * 4 + ["b"] * 4
    chosen = ["a", "a", "a", "b", "b", "a", None, "b"]
    tags = pa.table(
        {"id": list("12345678"), "known": known, "category": chosen, "score": [0.0] * 8,
         "margin": [0.0] * 8},
        schema=TAGS,
    )  # fmt: skip
    found = measure_accuracy(tags, {"a": 90, "b": 10})
    assert (found.rows, found.correct, found.failed) == (8, 5, 1)
    assert found.interval.value == 5 / 8
    assert found.chance == 0.5
    assert found.recall["a"].value == 3 / 4
    assert found.recall["b"].value == 2 / 4
    assert found.corpus_share == pytest.approx(0.9 * 0.75 + 0.1 * 0.5)
    assert found.confusion == {"a": {"a": 3, "b": 1}, "b": {"a": 1, "b": 2}}
    assert found.to_json()["accuracy"]["low"] < 5 / 8 < found.to_json()["accuracy"]["high"]
