"""What other trainers get: the fields that they document, in training order, and nothing lost."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_rows import (
    LOOKS_LIKE_CALLS,
    MARKED,
    PLAIN,
    ROWS,
    TIME,
    WEATHER,
    call,
    identity,
    write_run,
)

from system.errors import ConfigError
from system.selection.export import export_selection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def exported(run: Path, out: Path, trainer: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    done = export_selection(str(run), trainer, str(out))
    (lines,) = out.glob("*.jsonl")
    return [json.loads(line) for line in lines.read_text().splitlines()], done.remarks


def test_trl_and_axolotl_rows_are_the_same_examples_when_they_are_read_again(run, tmp_path):
    for trainer, without in (("trl", [MARKED]), ("axolotl", [])):
        rows, _ = exported(run, tmp_path / trainer, trainer)
        for row, source in zip(rows, ROWS, strict=True):
            if source not in without:
                assert identity(row) == identity(source) == row["id"], (trainer, source)


def test_tools_and_calls_have_fields_of_their_own(run, tmp_path):
    rows, remarks = exported(run, tmp_path / "x", "trl")
    parallel = rows[1]
    assert parallel["tools"] == [WEATHER, TIME]
    assert parallel["messages"][0] == {"role": "system", "content": "You have tools."}
    calls = parallel["messages"][2]
    assert calls["content"] == ""
    assert calls["tool_calls"] == [
        call("weather", "a1", city="Rome"),
        call("time", "b2", zone=[1, 2]),
    ]
    noon, sun = parallel["messages"][3:5]
    assert noon == {"role": "tool", "content": "noon", "tool_call_id": "b2", "name": "time"}
    assert sun == {"role": "tool", "content": "sun", "tool_call_id": "a1", "name": "weather"}
    nameless = rows[2]["messages"]
    assert [turn["role"] for turn in nameless] == ["user", "assistant", "tool", "assistant"]
    assert nameless[2] == {"role": "tool", "content": "sun", "name": "weather"}
    assert nameless[3]["reasoning_content"] == "It said sun."
    assert rows[3]["messages"][1]["content"] == "I look."
    assert rows[0]["tools"] is None
    assert rows[5]["messages"][-1]["content"] == LOOKS_LIKE_CALLS["messages"][-1]["content"]
    assert [remark.split()[0] for remark in remarks] == ["1"] and "no loss" in remarks[0]


def test_the_script_for_trl_reads_its_rows_and_keeps_order_and_loss(run, tmp_path):
    exported(run, tmp_path / "x", "trl")
    script = ast.parse((tmp_path / "x/train.py").read_text())
    before_training = [node for node in script.body if not _uses(node, {"trl", "SFTTrainer"})]
    calls = [node for node in ast.walk(script) if isinstance(node, ast.Call)]
    (settings,) = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "SFTConfig"]
    values = {k.arg: k.value.value for k in settings.keywords if isinstance(k.value, ast.Constant)}
    assert values["train_sampling_strategy"] == "sequential" and values["assistant_only_loss"]
    assert values["shuffle_dataset"] is values["packing"] is False
    names: dict[str, Any] = {"__file__": str(tmp_path / "x/train.py")}
    loads = [node for node in before_training if not _uses(node, {"SFTConfig", "settings"})]
    exec(compile(ast.Module(loads, []), "train.py", "exec"), names)
    rows = names["rows"]
    assert len(rows) == len(ROWS)
    assert rows[0]["messages"] == PLAIN["messages"] and rows[0]["tools"] is None
    assert rows[1]["tools"] == [WEATHER, TIME]
    assert "tool_calls" not in rows[1]["messages"][0], "a message has its own keys alone"
    assert rows[1]["messages"][2]["tool_calls"][1]["function"]["arguments"] == {"zone": [1, 2]}


def _uses(node: ast.AST, names: set[str]) -> bool:
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return bool(names & (found | {getattr(node, "module", "")}))


def test_llama_factory_takes_every_row(run, tmp_path):
    """Its `sharegpt` converter: an optional system turn, then human or observation and gpt or
    function_call in turn; a function_call is JSON of a call or of a list of calls."""
    rows, remarks = exported(run, tmp_path / "x", "llama-factory")
    for row in rows:
        turns = row["conversations"]
        turns = turns[1:] if turns[0]["from"] == "system" else turns
        assert len(turns) % 2 == 0
        for place, turn in enumerate(turns):
            allowed = (("human", "observation"), ("gpt", "function_call"))[place % 2]
            assert turn["from"] in allowed, row
            if turn["from"] == "function_call":
                calls = json.loads(turn["value"])
                for one in calls if isinstance(calls, list) else [calls]:
                    assert one.keys() == {"name", "arguments"}
        assert row["tools"] == "" or isinstance(json.loads(row["tools"]), list)
    parallel = [turn["value"] for turn in rows[1]["conversations"]]
    assert json.loads(parallel[2]) == [
        {"name": "weather", "arguments": {"city": "Rome"}},
        {"name": "time", "arguments": {"zone": [1, 2]}},
    ]
    assert parallel[3] == "noon\n</tool_response>\n<tool_response>\nsun"
    assert rows[2]["conversations"][-1]["value"] == "<think>\nIt said sun.\n</think>\n\nSun."
    beside = rows[3]["conversations"][1]
    assert beside["from"] == "gpt" and beside["value"].startswith("I look.\n{")
    assert len(remarks) == 2 and any("text and tool calls" in remark for remark in remarks)
    info = json.loads((tmp_path / "x/dataset_info.json").read_text())["instructmix"]
    assert info["columns"] == {"messages": "conversations", "tools": "tools"}
    settings = yaml.safe_load((tmp_path / "x/train.yaml").read_text())
    assert settings["disable_shuffling"] and not settings["train_on_prompt"]


def test_axolotl_gets_marks_of_turns_and_arguments_as_text(run, tmp_path):
    rows, remarks = exported(run, tmp_path / "x", "axolotl")
    assert remarks == ()
    arguments = rows[1]["messages"][2]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"city": "Rome"}
    assert [turn.get("train") for turn in rows[4]["messages"]] == [None, False, None, None]
    (data,) = yaml.safe_load((tmp_path / "x/axolotl.yaml").read_text())["datasets"]
    assert data["message_field_training"] == "train" and data["field_tools"] == "tools"
    assert data["roles_to_train"] == ["assistant"]


def test_hf_has_the_columns_of_the_selection(run, tmp_path):
    from datasets import load_from_disk

    export_selection(str(run), "hf", str(tmp_path / "x"))
    rows = load_from_disk(str(tmp_path / "x"))
    assert [row["id"] for row in rows] == [identity(row) for row in ROWS]


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fails(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("system.selection.export._write_yaml", fails)
    with pytest.raises(OSError, match="disk full"):
        export_selection(str(run), "axolotl", str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "x").mkdir()
    exported(run, tmp_path / "x", "axolotl")


def test_an_unknown_format_and_a_full_directory_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="hf, trl, llama-factory, axolotl, found 'csv'"):
        export_selection(str(run), "csv", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    (tmp_path / "y").mkdir()
    (tmp_path / "y/kept.txt").write_text("mine")
    with pytest.raises(ConfigError, match="new or empty directory"):
        export_selection(str(run), "trl", str(tmp_path / "y"))
