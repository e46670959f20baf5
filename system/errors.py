"""The errors a user may meet.

Every message is one paragraph that says what was expected, what was found, where, and what to do.
The command line prints it without a traceback and exits with the code of its class.
No class has a constructor of its own: an exception that cannot be unpickled hides the real cause
when it crosses a process border.
"""


class InstructMixError(Exception):
    """Something went wrong that is not the user's input: exit code 1."""

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
    """The Ray cluster cannot be reached, or cannot hold what the run asks for: exit code 1."""


class StageError(InstructMixError, RuntimeError):
    """A stage failed for a reason that a rerun may or may not cure: exit code 1."""
