"""What a row holds cannot change what a terminal shows or does."""

from __future__ import annotations

import pytest
from ingest_builders import ingest, numbered, write_lines

from system import cli
from system.config import SourceConfig
from system.errors import DataError, printable
from system.progress import Progress

ATTACK = "\x1b]0;owned\x07\x1b[2J\r\x9b1m\u202egpj.exe"


def is_harmless(text: str) -> bool:
    return not set(text) & set(ATTACK[:1] + "\x07\r\x9b\u202e")


def test_control_characters_become_escapes_and_other_text_stays():
    assert printable("a\tb\nç 日本 \u200d😀") == "a\tb\nç 日本 \u200d😀"
    assert printable("\x1b[2J\r\x9b\u202e\ud800") == "\\x1b[2J\\r\\x9b\\u202e\\ud800"


def test_bad_rows_are_listed_without_control_characters(tmp_path):
    bad = [
        ATTACK.encode() + b"{",
        {"prompt": "q", ATTACK: "a"},
        {"messages": [{"role": ATTACK, "content": "q"}]},
        {"prompt": "q" + ATTACK, "completion": "a"},
    ]
    write_lines(tmp_path / "rows.jsonl", [*numbered(40), *bad])
    done = ingest(tmp_path, SourceConfig(path="rows.jsonl"))
    assert len(done.rejected()) == 4
    assert all(is_harmless(row["detail"]) for row in done.rejected())
    with pytest.raises(DataError) as error:
        ingest(tmp_path, SourceConfig(path="rows.jsonl"), max_rejected_share=0.01)
    assert is_harmless(str(error.value))


def test_messages_and_logs_have_no_control_characters(tmp_path, capsys):
    progress = Progress(is_terminal=False)
    progress.keep(tmp_path / "log.txt")
    progress.say(f"category {ATTACK}")
    assert is_harmless(capsys.readouterr().err)
    assert is_harmless((tmp_path / "log.txt").read_text())
    assert cli.main(["check", f"{tmp_path}/{ATTACK}.yaml"]) == 2
    assert is_harmless(capsys.readouterr().err)
