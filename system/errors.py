"""The errors that are shown to a user.

Every message is one paragraph: what was expected, what was found, where, and what to do.  The
command line prints it without a traceback and exits with the code of its class.

No class has its own constructor: an exception that cannot be unpickled would hide the real cause
when it travels from one process to another.
"""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that can change what a terminal shows or does, and halves of characters."""


def printable(text: str) -> str:
    """The text with control characters written as escapes: it may quote a row or a file's name."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class InstructMixError(Exception):
    """An error whose cause is not the user's input: exit code 1."""

    exit_code = 1


class ConfigError(InstructMixError, ValueError):
    """The configuration or a command-line value cannot be used: exit code 2."""

    exit_code = 2


class DataError(InstructMixError, ValueError):
    """The data cannot be used: exit code 2."""

    exit_code = 2


class InfeasibleMixError(InstructMixError, ValueError):
    """No mix satisfies all limits; the message names the limits that conflict: exit code 2."""

    exit_code = 2


class RunBusyError(InstructMixError, RuntimeError):
    """Another driver holds the lease of this run directory: exit code 2."""

    exit_code = 2


class ModelError(InstructMixError, ValueError):
    """A model, tokenizer or chat template cannot be used: exit code 2."""

    exit_code = 2


class ClusterError(InstructMixError, RuntimeError):
    """The Ray cluster cannot be reached, or has too few resources for the run: exit code 1."""


class StageError(InstructMixError, RuntimeError):
    """A stage failed; running it again may or may not help: exit code 1."""
