"""What stands beside and inside conversations: tools, system texts, choices, marks, media."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from ingest_builders import ingest, numbered, write_lines

from system.config import SourceConfig
from system.data.rows.conversation import Conversation, Marks, RowRejected, normalise
from system.data.rows.formats import choose_format

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "S"}
DEVELOPER = {"role": "developer", "content": "D"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
LISTED = '{"tools": [{"function": {"name": "f"}, "type": "function"}]}'
PAIR = [("user", "q"), ("assistant", "a")]


def read(row: dict, name: Any = "auto", max_chars: int = 10_000, **source: Any) -> Conversation:
    shape = choose_format(SourceConfig(path="x", format=name, **source), [row], "x")
    return normalise(shape.turns(row), max_chars)


def said(row: dict, name: Any = "auto", **source: Any) -> list[tuple[str, str]]:
    found = read(row, name, **source)
    return list(zip(found.roles, found.contents, strict=True))


def reason(row: dict, name: Any = "auto", **source: Any) -> str:
    with pytest.raises(RowRejected) as rejected:
        read(row, name, **source)
    assert rejected.value.detail
    return rejected.value.reason


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"messages": [SYSTEM, USER, ANSWER], "tools": TOOLS}, f"S\n\n{LISTED}"),
        ({"messages": [DEVELOPER, USER, ANSWER], "tools": TOOLS}, f"D\n\n{LISTED}"),
        ({"messages": [SYSTEM, DEVELOPER, USER, ANSWER]}, "S\n\nD"),
        ({"messages": [SYSTEM, {**SYSTEM, "content": " S\n"}, USER, ANSWER]}, "S"),
        ({"system": "S", "messages": [SYSTEM, USER, ANSWER], "tools": TOOLS}, f"S\n\n{LISTED}"),
        ({"system": "T", "messages": [SYSTEM, USER, ANSWER]}, "T\n\nS"),
        (
            {"conversations": [HUMAN, GPT], "system": "S", "tools": json.dumps(TOOLS)},
            f"S\n\n{LISTED}",
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, HUMAN, GPT], "tools": TOOLS},
            f"S\n\n{LISTED}",
        ),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER], "tools": TOOLS}, f"S\n\n{LISTED}"),
        (
            {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [], "tools": TOOLS},
            f"S\n\n{LISTED}",
        ),
        ({"data": ["q", "a"], "system": "S", "tools": TOOLS}, f"S\n\n{LISTED}"),
        ({"messages": [{**SYSTEM, "tools": TOOLS}, USER, ANSWER]}, f"S\n\n{LISTED}"),
        ({"messages": [{"role": "system", "tools": TOOLS}, USER, ANSWER]}, LISTED),
        ({"messages": [USER, ANSWER], "functions": json.dumps(TOOLS)}, LISTED),
        ({"messages": [USER, ANSWER], "tools": "[]", "functions": TOOLS}, LISTED),
        ({"messages": [USER, ANSWER], "tools": [json.dumps(TOOLS[0])]}, LISTED),
        ({"messages": [USER, ANSWER], "tools": json.dumps(json.dumps(TOOLS))}, LISTED),
    ],
)
def test_system_texts_and_tools_become_one_system_turn(row, system):
    assert said(row) == [("system", system), *PAIR]


def test_white_space_before_tools_stays_as_known_ids_have_it():
    row = {"conversations": [HUMAN, GPT], "system": "S \n", "tools": TOOLS}
    assert said(row)[0] == ("system", f"S \n\n\n{LISTED}")


@pytest.mark.parametrize(
    "empty",
    [None, "", " ", "[]", "null", "None", "{}", "[null]", [], {}, [None], [{}], float("nan")],
)
def test_empty_tools_and_calls_are_none(empty):
    answer = {**ANSWER, "tool_calls": empty, "function_call": empty}
    assert said({"messages": [USER, answer], "tools": empty, "functions": empty}) == PAIR
    silent = {**answer, "content": None}
    assert reason({"messages": [USER, silent]}) == "missing-field"


def test_a_function_may_have_the_name_null():
    answer = {"role": "assistant", "content": "", "tool_calls": [{"name": "null"}]}
    assert '"name": "null"' in said({"messages": [USER, answer]})[1][1]


BEFORE = [HUMAN, GPT, {"from": "human", "value": "Add 1"}]
SPOKEN = [*PAIR, ("user", "Add 1"), ("assistant", "2")]
CHOSEN, WORSE = {"from": "gpt", "value": "2"}, {"from": "gpt", "value": "?"}


@pytest.mark.parametrize("name", ["auto", "preference", "sharegpt"])
@pytest.mark.parametrize("chosen", [CHOSEN, [CHOSEN], json.dumps([CHOSEN]), "2"])
def test_a_conversation_ends_with_the_chosen_answer(name, chosen):
    assert said({"conversations": BEFORE, "chosen": chosen, "rejected": WORSE}, name) == SPOKEN


def test_earlier_turns_are_taken_before_a_prompt_that_repeats_the_last():
    row = {"conversations": BEFORE, "prompt": "Add 1", "chosen": "2", "rejected": "?"}
    assert said(row) == SPOKEN


def test_a_chosen_answer_follows_messages_too():
    row = {"messages": [USER], "chosen": ANSWER, "rejected": USER}
    assert said(row) == said(row, "messages") == PAIR


@pytest.mark.parametrize("answer", ["c", {"role": "assistant", "content": "c"}])
def test_input_and_history_of_alpaca_pairs_are_kept(answer):
    row = {"instruction": "I", "input": "X", "chosen": answer, "rejected": "r"}
    row |= {"history": [["q", "a"]], "system": "S"}
    expected = [("system", "S"), *PAIR, ("user", "I\n\nX"), ("assistant", "c")]
    assert said(row) == expected
    assert said({**row, "history": json.dumps(row["history"])}) == expected


def test_context_of_a_chosen_answer_is_kept():
    row = {"question": "q", "context": "C", "chosen": "a", "rejected": "b"}
    assert said(row) == [("user", "C\n\nq"), ("assistant", "a")]


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "q"},
        {"prompt": [SYSTEM, USER]},
        {"messages": [SYSTEM, USER, ANSWER]},
        {"prompt": "another text"},
        {"system": "S"},
    ],
)
def test_a_whole_chosen_conversation_is_not_said_twice(asked):
    row = {**asked, "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    assert [turn for turn in said(row) if turn[0] != "system"] == PAIR
    assert (said(row)[0] == ("system", "S")) == ("S" in json.dumps(asked))


def test_earlier_turns_stay_where_a_chosen_conversation_begins_with_the_last_question():
    chosen = [{"from": "human", "value": "Add 1"}, CHOSEN]
    assert said({"conversations": BEFORE, "chosen": chosen, "rejected": []}) == SPOKEN


def test_an_answer_that_is_already_there_is_not_said_twice():
    row = {"messages": [USER, ANSWER], "chosen": "a", "rejected": "b"}
    assert said(row) == PAIR
    assert reason({**row, "chosen": "c"}) == "wrong-role-order"


@pytest.mark.parametrize(
    "chosen", [None, "", [], {}, {"from": "gpt", "value": None}, [HUMAN], HUMAN, [[]], "[]"]
)
def test_without_a_chosen_answer_nothing_before_it_is_trained(chosen):
    row = {"conversations": BEFORE, "chosen": chosen, "rejected": WORSE}
    if chosen == "[]":
        assert said(row)[-1] == ("assistant", "[]")
    else:
        assert reason(row) in ("missing-field", "empty-turn")


@pytest.mark.parametrize("completion", [[], [USER], None, ""])
def test_without_a_completion_nothing_before_it_is_trained(completion):
    row = {"prompt": [USER, ANSWER, USER], "completion": completion}
    assert reason(row, "prompt-completion") in ("missing-field", "empty-turn")


@pytest.mark.parametrize("write", [json.dumps, lambda turns: "\n " + json.dumps(turns, indent=1)])
def test_json_text_of_turns_is_read_as_turns(write):
    assert said({"prompt": write([SYSTEM, USER]), "completion": write([ANSWER])}) == [
        ("system", "S"),
        *PAIR,
    ]
    assert said({"prompt": write(USER), "completion": write(ANSWER)}) == PAIR
    assert said({"messages": write([USER, ANSWER])}) == PAIR
    columns = {"prompt": "p", "response": "r"}
    assert said({"p": write([USER]), "r": write([ANSWER])}, "columns", columns=columns) == PAIR


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"a": 1}', '[{"a": 1}]', "[", '{"role": "x"}', "{}", '{"role": "user"}']
)
def test_any_other_json_text_stays_a_text(text):
    assert said({"prompt": text, "completion": text}) == [("user", text), ("assistant", text)]


@pytest.mark.parametrize("text", [str([USER]), '[{"role": "user", "content": "q'])
def test_turns_that_are_no_json_are_never_trained_as_text(text):
    assert reason({"prompt": text, "completion": "a"}) == "bad-json"
    assert reason({"prompt": "q", "chosen": text, "rejected": "b"}) == "bad-json"


def test_what_is_not_a_number_is_missing():
    nothing = float("nan")
    assert said({"instruction": "q", "input": nothing, "output": "a", "system": nothing}) == PAIR
    for row in (
        {"prompt": "q", "completion": nothing},
        {"messages": [USER, {"role": "assistant", "content": nothing}]},
        {"prompt": "q", "chosen": nothing, "rejected": "b"},
    ):
        assert reason(row) == "missing-field"


MUTED = Marks(loss=False)


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"training": "false"}],
)
def test_a_marked_turn_has_no_loss(mark):
    turns = [{**USER, **mark}, {**ANSWER, **mark}, USER, ANSWER]
    found = read({"messages": turns})
    assert (found.roles, found.marks) == (["user", "assistant"] * 2, {1: MUTED})
    shared = [{**HUMAN, **mark}, {**GPT, **mark}, HUMAN, GPT]
    assert read({"conversations": shared}).id == found.id
    assert found.id != read({"messages": [USER, ANSWER] * 2}).id
    assert found.prompt_hash == read({"messages": [USER, ANSWER] * 2}).prompt_hash
    assert reason({"messages": turns[:2]}) == "no-loss"


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"loss": None}, {"weight": " "}])
def test_a_mark_that_changes_nothing_changes_no_id(mark):
    found = read({"messages": [USER, {**ANSWER, **mark}]})
    assert (found.id, found.marks) == (read({"messages": [USER, ANSWER]}).id, {})


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0.5}, {"loss": "low"}, {"weight": 1, "train": False}, {"train_detail": [{"a": 1}]}],
)
def test_a_mark_that_cannot_be_obeyed_costs_its_row(mark):
    assert reason({"messages": [USER, {**ANSWER, **mark}]}) == "bad-mark"


THOUGHTS = [
    {"reasoning_content": "hm"},
    {"thinking": "hm\n"},
    {"reasoning": "hm", "reasoning_content": "hm"},
    {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]},
    {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": "a"},
        ]
    },
]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_reasoning_is_kept_beside_its_answer(thought):
    found = read({"messages": [USER, {**ANSWER, **thought}]})
    assert (found.contents, found.marks) == (["q", "a"], {1: Marks(reasoning="hm")})
    plain = read({"messages": [USER, ANSWER]})
    assert found.id != plain.id and found.prompt_hash == plain.prompt_hash
    for row in ({"prompt": "q", "completion": "a"}, {"messages": [USER, ANSWER]}):
        assert read({**row, "reasoning_content": "hm"}).id == found.id


@pytest.mark.parametrize("nothing", [None, "", "\n", True, []])
def test_no_reasoning_changes_no_id(nothing):
    found = read({"messages": [USER, {**ANSWER, "thinking": nothing}]})
    assert (found.id, found.marks) == (read({"messages": [USER, ANSWER]}).id, {})


@pytest.mark.parametrize(
    "row",
    [
        {"image": "x.png"}, {"images": ["x.png"]}, {"image": {"bytes": b"x", "path": None}},
        {"video": "v.mp4"}, {"videos": [["v"]]}, {"audio": {"array": [0.0]}}, {"image_1": "x"},
    ],
)  # fmt: skip
def test_rows_with_media_are_rejected_by_name(row):
    for text in (numbered(1)[0], {"messages": [USER, ANSWER]}, {"instruction": "q", "output": "a"}):
        assert reason({**text, **row}) == "media"


@pytest.mark.parametrize(
    "message",
    [
        {
            "content": [
                {"type": "text", "text": "q"},
                {"type": "image_url", "image_url": {"url": "u"}},
            ]
        },
        {"content": [{"type": "image", "text": "q"}]},
        {"content": [{"image": "x.png"}, {"text": "q"}]},
        {"content": [{"type": "input_audio", "input_audio": {}}]},
        {"content": {"type": "video", "video": "v"}},
        {"content": "q", "images": ["x"]},
    ],
)
def test_messages_with_media_are_rejected_by_name(message):
    assert reason({"messages": [{"role": "user", **message}, ANSWER]}) == "media"
    assert reason({"prompt": [{"role": "user", **message}], "completion": "a"}) == "media"


@pytest.mark.parametrize(
    "row",
    [
        {"images": [], "audio": None, "video": ""},
        {"image": {"bytes": None, "path": None}},
        {"image": False, "images": 0, "audio": float("nan")},
    ],
)
def test_empty_media_are_no_media(row):
    assert said({"prompt": "q", "completion": "a", **row}) == PAIR
    part = {"type": "text", "text": "q", "image": None}
    assert said({"messages": [{"role": "user", "content": [part]}, ANSWER]}) == PAIR


@pytest.mark.parametrize("row", [{"label": False}, {"label": "False"}, {"kto_tag": 0}])
def test_answers_that_are_marked_as_bad_are_rejected_by_name(row):
    for text in (numbered(1)[0], {"messages": [USER, ANSWER]}, {"instruction": "q", "output": "a"}):
        assert reason({**text, **row}) == "label-false"


@pytest.mark.parametrize("row", [{"label": True}, {"label": 0}, {"label": None}, {"label": "spam"}])
def test_other_labels_are_no_judgement(row):
    assert said({"prompt": "q", "completion": "a", **row}) == PAIR


def test_columns_that_the_source_names_are_neither_media_nor_judgements():
    row = {"prompt": "q", "completion": "a", "label": False, "image": "cat"}
    assert said(row, answer_column="label", category_column="image") == PAIR


def test_assistant_turns_in_a_row_are_joined_by_a_blank_line():
    assert said({"messages": [USER, ANSWER, {**ANSWER, "content": "\nb "}]}) == [
        ("user", "q"),
        ("assistant", "a\n\nb"),
    ]
    quiet = {**ANSWER, "weight": 0}
    assert read({"messages": [USER, quiet, quiet, USER, ANSWER]}).marks == {1: MUTED}
    assert reason({"messages": [USER, quiet, ANSWER]}) == "wrong-role-order"


def test_conversations_that_start_with_the_model_are_rejected_by_name():
    assert reason({"conversations": [GPT, HUMAN, GPT]}) == "starts-with-assistant"
    assert reason({"messages": [SYSTEM, ANSWER, USER, ANSWER]}) == "starts-with-assistant"


CALLS = [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}, {"id": "c2", "name": "g"}]
RESULTS = [
    {"role": "tool", "tool_call_id": "c2", "content": "2"},
    {"role": "tool", "tool_call_id": "c1", "content": "1"},
]


def test_several_tool_results_keep_their_order_and_the_ids_of_their_calls():
    calls = {"role": "assistant", "content": None, "tool_calls": CALLS}
    found = read({"messages": [USER, calls, *RESULTS, ANSWER]})
    assert found.roles == ["user", "assistant", "tool", "tool", "assistant"]
    assert found.contents[2:4] == ["2", "1"]
    ids = {turn: mark.call_ids for turn, mark in found.marks.items()}
    assert ids == {1: ("c1", "c2"), 2: ("c2",), 3: ("c1",)}
    bare = [{"role": "tool", "content": result["content"]} for result in RESULTS]
    calls = calls | {"tool_calls": [{"name": "f"}, {"name": "g"}]}
    assert read({"messages": [USER, calls, *bare, ANSWER]}).id == found.id


@pytest.mark.parametrize(
    "text",
    [
        "a" + "\u0301\u0323" * 100_000,
        "a" * 63 + "\u0301\u0323" * 65,
        ("a" + "\u0301" * 129) * 10,
    ],
)
def test_long_runs_of_combining_marks_cost_their_row_and_no_time(text):
    began = time.process_time()
    assert reason({"prompt": text, "completion": "a"}) in ("combining-marks", "too-long")
    assert time.process_time() - began < 5


def test_rows_that_would_take_long_cost_no_time():
    began = time.process_time()
    assert reason({"messages": [USER, ANSWER] * 4000}) == "too-long"
    assert said({"messages": [USER, *[ANSWER] * 4000]}, max_chars=10**5)[1][1].startswith("a\n\na")
    for text in (" " * 10**6 + "[", "[" + " " * 10**6, "{" * 10**6, "[{" * 10**5):
        assert said({"prompt": "q", "completion": text + "x"}, max_chars=10**7)[0] == ("user", "q")
    assert time.process_time() - began < 5


def test_runs_of_marks_that_languages_and_jokes_have_are_kept():
    text = ("a" + "\u0301\u0323" * 64 + "שָׁלוֹם क्षि") * 20
    assert said({"prompt": text, "completion": "a"})[1] == ("assistant", "a")


def test_marks_reach_the_corpus_and_dropped_reasoning_is_counted(tmp_path):
    calls = {"role": "assistant", "content": "", "tool_calls": CALLS}
    muted = [USER, {**ANSWER, "weight": 0}, {**USER, "content": "k"}, {**ANSWER, "thinking": "hm"}]
    rows = [*numbered(3), {"messages": muted}, {"messages": [USER, calls, *RESULTS, ANSWER]}]
    write_lines(tmp_path / "rows.jsonl", rows[3:])
    write_lines(tmp_path / "more.jsonl", rows[:3])
    sources = [SourceConfig(path=name) for name in ("rows.jsonl", "more.jsonl")]
    done = ingest(tmp_path, *sources)
    assert done.manifest.kept == 5 and done.manifest.details["without_reasoning"] == 0
    by_length = {len(row["messages"]): row["messages"] for row in done.rows()}
    assert [turn["loss"] for turn in by_length[4]] == [None, False, None, None]
    assert [turn["reasoning"] for turn in by_length[4]] == [None, None, None, "hm"]
    assert [turn["call_ids"] for turn in by_length[5]] == [None, ["c1", "c2"], ["c2"], ["c1"], None]
    assert {turn["loss"] for turn in by_length[2]} == {None}
    (tmp_path / "drop").mkdir()
    for name in ("rows.jsonl", "more.jsonl"):
        (tmp_path / "drop" / name).write_bytes((tmp_path / name).read_bytes())
    dropped = ingest(tmp_path / "drop", *sources, reasoning="drop")
    assert dropped.manifest.kept == 5 and dropped.manifest.details["without_reasoning"] == 1
    by_length = {len(row["messages"]): row["messages"] for row in dropped.rows()}
    assert {turn["reasoning"] for turn in by_length[4]} == {None}
    assert by_length[4][1]["loss"] is False
