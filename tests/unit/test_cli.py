"""The command line itself: version, help, how it ends when it is stopped."""

import argparse
import os
import signal
from collections.abc import Iterator

import pytest

from system import cli
from system.progress import Progress


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As a terminal has them: of a job in a shell's background, SIGINT is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_so_and_exits_as_shells_expect(number, code, monkeypatch, capsys):
    def stopped(arguments) -> int:
        os.kill(os.getpid(), number)
        raise AssertionError("never reached")

    monkeypatch.setattr(cli, "_status", stopped)
    assert cli.main(["status", "somewhere"]) == code
    assert "Finished work is kept" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("instructmix 0.")


def test_every_argument_of_every_command_has_a_help_text():
    parser = cli._parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    silent = [
        f"{name} {action.dest}"
        for name, command in commands.choices.items()
        for action in command._actions
        if not action.help
    ]
    assert silent == []


def test_what_is_said_is_kept_with_its_time(tmp_path, capsys):
    progress = Progress(is_terminal=False)
    progress.say("before")
    progress.keep(tmp_path / "log.txt")
    progress.say("solve ...")
    progress.note("DataError: only in the file")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("+00:00 solve ...")
    assert second.endswith("DataError: only in the file")
    assert capsys.readouterr().err.splitlines() == ["before", "solve ..."]


def test_an_error_of_our_own_is_called_a_defect(monkeypatch, capsys):
    def broken(arguments) -> int:
        raise KeyError("no\nsuch key")

    monkeypatch.setattr(cli, "_status", broken)
    assert cli.main(["status", "somewhere"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for words in ("a defect of instructmix 0.", "KeyError", "test_cli.py:", "--debug", "report"):
        assert words in message
    with pytest.raises(KeyError):
        cli.main(["status", "somewhere", "--debug"])


def test_too_little_memory_is_no_defect(monkeypatch, capsys):
    def full(arguments) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "_status", full)
    assert cli.main(["status", "somewhere"]) == 1
    assert "not enough memory" in capsys.readouterr().err
