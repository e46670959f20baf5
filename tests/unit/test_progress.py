"""What a person is told about the time left."""

from __future__ import annotations

import pytest

from system import progress
from system.progress import LINE_SECONDS, Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_the_time_left_is_told_from_what_was_done_here(clock, capsys):
    with Bar("work", 100, is_terminal=False) as bar:
        bar.skip(80)
        clock[0] = 10.0 * LINE_SECONDS
        bar.advance(10)
    line = capsys.readouterr().err
    assert "90 of 100, 150 s, about 150 s left" in line


def test_what_was_found_alone_says_nothing_about_time(clock, capsys):
    with Bar("work", 100, is_terminal=False) as bar:
        bar.skip(80)
        clock[0] = 2.0 * LINE_SECONDS
        bar.advance(1)
    assert "81 of 100, 30 s\n" in capsys.readouterr().err


def test_a_bar_on_a_terminal_takes_no_speed_from_what_was_found(capsys):
    with Bar("work", 100, is_terminal=True) as bar:
        bar.skip(80)
        assert bar._bar is not None
        assert (bar._bar.n, bar._bar.initial) == (80, 80)
