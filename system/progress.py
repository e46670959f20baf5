"""Shows the progress of a stage: a bar on a terminal, elsewhere a plain line from time to time.

Everything goes to stderr, because stdout is for data.  If the run directory is on this machine, the
messages are also written to a log file there, so they can be read after the terminal is closed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from system.errors import printable

_FORECAST_FROM = 0.1
"""Share of the work that must be done before the remaining time is forecast."""
LINE_SECONDS = 15.0
"""Time between two lines where there is no terminal."""


class Bar:
    """Shows the progress of one task; use as a context manager."""

    def __init__(self, label: str, total: int, is_terminal: bool) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._skipped = 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = (
            tqdm(total=total, desc=f"  {label}", file=sys.stderr, leave=False, dynamic_ncols=True)
            if is_terminal
            else None
        )

    def skip(self, amount: int) -> None:
        """Counts units that an earlier session finished; the forecast ignores them."""
        self._done += amount
        self._skipped += amount
        if self._bar is not None:
            self._bar.initial += amount
            self._bar.n += amount
            self._bar.refresh()

    def advance(self, amount: int = 1) -> None:
        """Counts units that were finished now."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._done and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._started
            # At first, most of the time is the start of actors and engines: no forecast from that.
            forecast = ""
            worked = self._done - self._skipped
            if worked and worked >= _FORECAST_FROM * (self._total - self._skipped):
                left = seconds / worked * (self._total - self._done)
                forecast = f", about {left:.0f} s left"
            print(
                f"  {self._label}: {self._done:,} of {self._total:,}, {seconds:.0f} s{forecast}",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Bar:
        """Returns the bar."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the bar from the screen."""
        if self._bar is not None:
            self._bar.close()


class Progress:
    """Prints the messages and bars of a run, and writes messages to its log file."""

    def __init__(self, is_terminal: bool | None = None) -> None:
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._log: Path | None = None
        self._without_secrets: Callable[[str], str] = str

    def bar(self, label: str, total: int) -> Bar:
        """A bar for `total` units of work."""
        return Bar(label, total, self._is_terminal)

    def say(self, line: str) -> None:
        """Prints one line without breaking a bar, and logs it."""
        tqdm.write(printable(self._without_secrets(line)), file=sys.stderr)
        sys.stderr.flush()
        self.note(line)

    def keep(self, log: Path) -> None:
        """From now on, writes each line to this file as well, with its time."""
        self._log = log

    def hide(self, without_secrets: Callable[[str], str]) -> None:
        """From now on, each line is printed and logged as this function returns it."""
        self._without_secrets = without_secrets

    def note(self, line: str) -> None:
        """Writes one line to the log file only."""
        if self._log is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{now} {printable(self._without_secrets(line))}\n")
