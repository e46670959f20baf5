from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from system.config import SourceConfig
from system.data.rows.conversation import (
    Marks,
    RowRejected,
    find_answer,
    normalise,
    normalise_text,
    split_of,
)
from system.data.rows.formats import FORMATS, choose_format, columns_format
from system.errors import DataError


def turns(row: dict, name: Any = "auto") -> list[tuple[str, str]]:
    return choose_format(SourceConfig(path="x", format=name), [row], "x").turns(row)


PAIR = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"instruction": "Q", "output": "A"}, "alpaca", PAIR),
        (
            {"instruction": "Q", "input": "X", "output": "A", "response": "A", "more": 1},
            "alpaca",
            [("user", "Q\n\nX"), ("assistant", "A")],
        ),
        ({"instruction": "Q", "input": "  ", "response": "A"}, "alpaca", PAIR),
        (
            {"instruction": "Q", "output": "A", "history": [["q", "a"]], "system": "S"},
            "alpaca",
            [("system", "S"), ("user", "q"), ("assistant", "a"), *PAIR],
        ),
        (
            {"instruction": "Q", "context": "C", "response": "A"},
            "alpaca",
            [("user", "Q\n\nC"), ("assistant", "A")],
        ),
        ({"prompt": "Q", "completion": "A", "task": "t"}, "prompt-completion", PAIR),
        (
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "A"}],
            },
            "prompt-completion",
            PAIR,
        ),
        ({"question": "Q", "answer": "A"}, "question-answer", PAIR),
        (
            {"system_prompt": "S", "question": "Q", "response": "A"},
            "question-answer",
            [("system", "S"), *PAIR],
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "sharegpt",
            PAIR,
        ),
        (
            {
                "conversation": [
                    {"role": "User", "content": "Q"},
                    {"role": "Assistant", "content": "A"},
                ],
                "system": "S",
            },
            "sharegpt",
            [("system", "S"), *PAIR],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "messages",
            PAIR,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "messages",
            PAIR,
        ),
        ({"id": "1", "data": ["Q", "A", "Q", "A"]}, "threads", PAIR * 2),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", PAIR),
        (
            {
                "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
                "rejected": [],
            },
            "preference",
            PAIR,
        ),
        (
            {"prompt": "Q", "chosen": [{"role": "assistant", "content": "A"}], "rejected": []},
            "preference",
            PAIR,
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
            "preference",
            PAIR,
        ),
    ],
)  # fmt: skip
def test_each_shape_is_detected_and_becomes_the_same_turns(row, name, expected):
    assert choose_format(SourceConfig(path="x"), [row], "x").name == name
    assert turns(row) == expected


def test_best_ranked_path_of_a_thread_is_taken():
    row = {
        "message_tree_id": "t",
        "prompt": {
            "role": "prompter",
            "text": "Q",
            "replies": [
                {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
                {
                    "role": "assistant",
                    "text": "best",
                    "rank": 0,
                    "replies": [{"role": "prompter", "text": "more?", "replies": []}],
                },
                {"role": "assistant", "text": "gone", "rank": -1, "deleted": True},
            ],
        },
    }
    assert turns(row) == [("user", "Q"), ("assistant", "best"), ("user", "more?")]


@pytest.mark.parametrize(
    "answer", ["[1, 2]", '{"a": 1}', "[]", '[{"a": 1}]', "7", '{"role": "x"}', "[" * 2000, "[oops"]
)
def test_a_chosen_answer_that_is_json_text_stays_as_it_is(answer):
    row = {"prompt": "Q", "chosen": answer, "rejected": "B"}
    assert turns(row) == [("user", "Q"), ("assistant", answer)]


def test_chosen_turns_written_as_json_text_are_turns():
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert turns({"chosen": json.dumps(said), "rejected": "[]"}) == PAIR
    assert turns({"prompt": "Q", "chosen": json.dumps(said[1:]), "rejected": "[]"}) == PAIR


@pytest.mark.parametrize("chosen", ["A", [{"role": "assistant", "content": "A"}]])
def test_system_text_beside_a_preference_pair_is_kept(chosen):
    row = {"system": "S", "prompt": "Q", "chosen": chosen, "rejected": "B"}
    assert turns(row) == [("system", "S"), *PAIR]


def test_tool_calls_and_tool_definitions_are_kept_as_json():
    row = {
        "tools": [{"name": "weather"}],
        "messages": [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}, "id": "1"}
                ],
            },
            {"role": "tool", "content": "sun", "tool_call_id": "1"},
            {"role": "assistant", "content": "No."},
        ],
    }
    found = turns(row)
    roles = [turn[0] for turn in found]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert json.loads(found[0][1]) == {"tools": [{"name": "weather"}]}
    assert json.loads(found[2][1]) == {
        "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]
    }
    assert normalise(found, 1000).roles == roles


def test_columns_name_prompt_response_and_system():
    shape = columns_format({"prompt": "p", "response": "r", "system": "s"})
    assert shape.turns({"p": "Q", "r": "A", "s": "S"}) == [("system", "S"), *PAIR]


def test_unknown_format_shows_the_keys_found_and_the_known_formats():
    with pytest.raises(DataError) as error:
        choose_format(SourceConfig(path="x"), [{"text": "a", "meta": 1}], "data.jsonl")
    message = str(error.value)
    assert "['meta', 'text']" in message
    assert "data.jsonl" in message
    assert all(known.name in message for known in FORMATS)


FLAT = [
    {"message_id": "m1", "parent_id": None, "text": "Q", "role": "prompter", "rank": None},
    {"message_id": "m2", "parent_id": "m1", "text": "B", "role": "assistant", "rank": 1},
    {"message_id": "m3", "parent_id": "m1", "text": "A", "role": "assistant", "rank": 0},
]


def test_messages_of_a_tree_in_rows_of_their_own_are_named_with_the_way_out():
    with pytest.raises(DataError, match=r"(?s)x: .*one message of a tree a row.*docs/data\.md"):
        choose_format(SourceConfig(path="x"), FLAT, "x")
    with pytest.raises(RowRejected, match="one message of a tree"):
        turns(FLAT[1], "threads")


def test_the_documented_lines_join_messages_into_trees(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    guide = Path(__file__).parents[2] / "docs" / "data.md"
    (lines,) = re.findall(r"```python\n(import json\n.*?)```", guide.read_text(), re.DOTALL)
    rows = [{**row, "deleted": False} for row in FLAT]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    (line,) = (tmp_path / "data" / "oasst2.jsonl").read_text().splitlines()
    assert turns(json.loads(line)) == PAIR


def test_format_is_the_majoritys_where_first_rows_differ():
    rows = [{"text": "header"}, {"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}]
    assert choose_format(SourceConfig(path="x"), rows, "x").name == "question-answer"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": None}, "missing-field"),
        ({"prompt": {"a": 1}, "completion": "A"}, "missing-field"),
        ({"messages": None}, "missing-field"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "wrong-role-order"),
        ({"messages": [{"role": "user", "content": [{"type": "table"}]}]}, "missing-field"),
    ],
)
def test_a_row_that_lacks_its_shape_is_rejected_with_the_reason(row, reason):
    name = "prompt-completion" if "prompt" in row else "messages"
    with pytest.raises(RowRejected) as rejected:
        turns(row, name)
    assert rejected.value.reason == reason


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([("user", "Q")], "no-assistant-turn"),
        ([("user", " \n"), ("assistant", "A")], "empty-turn"),
        ([("user", "Q"), ("assistant", "")], "empty-turn"),
        ([("assistant", "A")], "starts-with-assistant"),
        ([("system", "S"), ("assistant", "A"), *PAIR], "starts-with-assistant"),
        ([("tool", "T"), ("assistant", "A")], "wrong-role-order"),
        ([("user", "Q"), ("user", "Q"), ("assistant", "A")], "wrong-role-order"),
        ([("user", "Q"), ("system", "S"), ("assistant", "A")], "wrong-role-order"),
        ([("user", "Q"), ("assistant", "A"), ("assistant", "")], "empty-turn"),
        ([("user", "Q"), ("assistant", "A", Marks(loss=False))], "no-loss"),
        ([("user", "Q"), ("assistant", "A", Marks(loss=False)), *PAIR[1:]], "wrong-role-order"),
        ([("user", "Q"), ("assistant", "A", Marks(reasoning="r\x07"))], "control-characters"),
        ([("user", "Q"), ("assistant", "A", Marks(reasoning="\ud800"))], "bad-utf8"),
        ([("user", "Q"), ("assistant", "A", Marks(reasoning="r" * 100))], "too-long"),
        ([("user", "Q"), ("assistant", "a" + "\u0301\u0323" * 65)], "combining-marks"),
        ([("user", "Q" * 50), ("assistant", "A" * 51)], "too-long"),
        ([("user", "Q\x00"), ("assistant", "A")], "control-characters"),
        ([("user", "a\x1eb"), ("assistant", "A")], "control-characters"),
        ([("user", "Q\ud800"), ("assistant", "A")], "bad-utf8"),
    ],
)  # fmt: skip
def test_every_reason_of_a_conversation_is_found(given, reason):
    with pytest.raises(RowRejected) as rejected:
        normalise(given, 100)
    assert rejected.value.reason == reason


def test_what_follows_the_last_answer_and_empty_system_turns_are_dropped():
    given = [("system", ""), *PAIR, ("user", "and then?")]
    assert normalise(given, 100).roles == ["user", "assistant"]


def test_id_ignores_line_ends_unicode_form_and_surrounding_space():
    one = normalise([("user", "caf\u00e9\r\nx  "), ("assistant", "\nA")], 100)
    two = normalise([("user", "cafe\u0301\nx"), ("assistant", "A\n")], 100)
    assert one.id == two.id
    assert one.contents == ["caf\u00e9\nx", "A"]


def test_indentation_of_the_first_line_stays_in_the_text_but_not_in_the_id():
    one = normalise([("user", "Q"), ("assistant", "\n    return x")], 100)
    assert one.contents[1] == "    return x"
    assert one.id == normalise([("user", "Q"), ("assistant", "return x")], 100).id


def test_ids_and_splits_never_change():
    known = normalise([("user", "What is 2 plus 2?"), ("assistant", "4")], 100)
    assert known.id == "275167cceca1044a361f80e7308f22f2"
    assert known.prompt_hash == 8951225997346819132


def test_control_characters_beside_any_other_text_are_named():
    with pytest.raises(RowRejected) as rejected:
        normalise([("user", "日本\x00é\x7f"), ("assistant", "A")], 100)
    assert rejected.value.detail == "control characters U+0000, U+007F"


def test_moving_text_between_turns_changes_the_id():
    ids = {
        normalise(given, 100).id
        for given in (
            [("user", "ab"), ("assistant", "c")],
            [("user", "a"), ("assistant", "bc")],
            [("system", "ab"), ("user", "x"), ("assistant", "c")],
        )
    }
    assert len(ids) == 3


def test_same_question_with_another_answer_has_the_same_split():
    one = normalise([("user", "Q"), ("assistant", "A")], 100)
    two = normalise([("user", "Q"), ("assistant", "B")], 100)
    assert one.id != two.id
    assert one.prompt_hash == two.prompt_hash


def test_split_shares_are_met_and_a_larger_share_only_adds():
    hashes = [
        normalise([("user", str(k)), ("assistant", "A")], 99).prompt_hash for k in range(4000)
    ]
    small = [split_of(value, 0.1, 0.1) for value in hashes]
    large = [split_of(value, 0.2, 0.2) for value in hashes]
    assert abs(small.count(2) / 4000 - 0.1) < 0.02
    assert abs(small.count(1) / 4000 - 0.1) < 0.02
    assert all(after == 2 for before, after in zip(small, large, strict=True) if before == 2)


def test_text_is_normalised_without_touching_its_inside():
    assert normalise_text("\n\n  a\tb\x0c c \r\r") == "  a\tb\n c"


def test_answer_is_the_last_match():
    assert find_answer(r"#### (\S+)", "x #### 3\n#### 42 ") == "42"
    assert find_answer(r"#### (\S+)", "none") is None
    assert find_answer(r"####(.*)", "#### ") is None
    assert find_answer(r"= (\d+)|(?:so)", "= 4, so") == "4"


def test_answer_pattern_matches_at_lines():
    assert find_answer(r"^Answer: (.*)$", "Thus\nAnswer: 4\nDone.") == "4"
