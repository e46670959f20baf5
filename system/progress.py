"""What a person sees while a stage works: a bar on a terminal, a plain line now and then elsewhere.

Everything goes to stderr; stdout belongs to data.  What is said is kept in a file of the
run directory too, where that is on this machine, so that a run can be looked into after its
terminal is gone.
"""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

_FORECAST_FROM = 0.1
"""Share of the work to do from which the time left is told."""
LINE_SECONDS = 15.0


class Bar:
    """Progress of one piece of work; use as a context manager."""

    def __init__(self, label: str, total: int, is_terminal: bool) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._found = 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = (
            tqdm(total=total, desc=f"  {label}", file=sys.stderr, leave=False, dynamic_ncols=True)
            if is_terminal
            else None
        )

    def skip(self, amount: int) -> None:
        """Counts units that were found finished; they took no time, which tells nothing."""
        self._done += amount
        self._found += amount
        if self._bar is not None:
            self._bar.initial += amount
            self._bar.n += amount
            self._bar.refresh()

    def advance(self, amount: int = 1) -> None:
        """Counts units as they are finished."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._done and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._started
            # Early on the start of actors and engines is most of the time: no forecast from that.
            forecast = ""
            worked = self._done - self._found
            if worked and worked >= _FORECAST_FROM * (self._total - self._found):
                left = seconds / worked * (self._total - self._done)
                forecast = f", about {left:.0f} s left"
            print(
                f"  {self._label}: {self._done:,} of {self._total:,}, {seconds:.0f} s{forecast}",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Bar:
        """The bar itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


class Progress:
    """Where a stage says how far it is."""

    def __init__(self, is_terminal: bool | None = None) -> None:
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._log: Path | None = None

    def bar(self, label: str, total: int) -> Bar:
        """A bar for `total` units of work."""
        return Bar(label, total, self._is_terminal)

    def say(self, line: str) -> None:
        """One line for a person, without breaking a bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
        self.note(line)

    def keep(self, log: Path) -> None:
        """From here on what is said goes into a file as well, each line with its time."""
        self._log = log

    def note(self, line: str) -> None:
        """One line for the file alone."""
        if self._log is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{now} {line}\n")
