"""The command line: `instructmix COMMAND ...`.

Heavy modules are imported inside the command that needs them, after the arguments are parsed, so
that `--help` is fast.  This is the only module of `system` that may import `actors`, and it does so
inside functions.  Exit codes: 0 success, 1 failure (or a defect of instructmix), 2 invalid input or
configuration, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from system.errors import InstructMixError, printable
from system.redact import without_secrets
from system.stages import STAGE_NAMES

if TYPE_CHECKING:
    from system.config import RunConfig

_BAD_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Error numbers that mean: no machine has such a path, so the input is wrong."""
_LONGEST = 3000
"""Largest number of characters of a message."""
_RUN_DIR = "run directory: `run_dir` of the configuration"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.execute(arguments)
    except InstructMixError as error:
        if arguments.debug:
            raise
        _complain(str(error))
        return error.exit_code
    except OSError as error:
        if arguments.debug:
            raise
        _complain(
            f"a file operation failed: {str(error)[:1000]}. Check free space, permissions and the "
            "path. Finished work is kept; run the same command again to continue."
        )
        return 2 if error.errno in _BAD_PATH else 1
    except KeyboardInterrupt as error:
        _complain("stopped. Finished work is kept; run the same command again to continue.")
        return 128 + (signal.SIGTERM if isinstance(error, _TerminatedError) else signal.SIGINT)
    except Exception as error:
        # The last line of defence: every error of the user has a class of its own.
        if arguments.debug:
            raise
        _complain(_describe_defect(error))
        return 1


def _complain(text: str) -> None:
    """Prints why the command ended.  A message may quote the input: anything, of any length."""
    text = printable(without_secrets(text))
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … (cut here)"
    print(f"instructmix: {text}", file=sys.stderr)


def _describe_defect(error: Exception) -> str:
    places = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    found = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    if isinstance(error, MemoryError):
        return f"not enough memory ({places[-1]}). Finished work is kept; use a larger machine."
    version = importlib.metadata.version("instructmix")
    return (
        f"this is a defect of instructmix {version}, not of your input: expected a result or a "
        f"message that names the cause, found {found} (at {' > '.join(places[-3:])}). Finished "
        "work is kept. Please report it with the command, the configuration, and what the same "
        "command prints with --debug."
    )


class _TerminatedError(KeyboardInterrupt):
    """The process received SIGTERM."""


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Ends the command as Ctrl-C does, so that the lease is released.

    `ray job stop` and Kubernetes send SIGTERM to end a driver.
    """
    raise _TerminatedError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instructmix",
        description="Measure how categories of instruction data help and harm each other, solve "
        "for the best mix, order it into a curriculum, and fine-tune the model.",
    )
    version = importlib.metadata.version("instructmix")
    parser.add_argument("--version", action="version", version=f"instructmix {version}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_ablate(commands)
    _add_check(commands)
    _add_results(commands)
    _add_reference(commands)
    _add_submit(commands)
    _add_tools(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of errors")
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="configuration, a YAML file; examples are in configs/")
    _add_overrides(command)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides",
        help="override one key of the configuration; can be repeated",
    )  # fmt: skip


def _add_stages(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from", dest="first", default=STAGE_NAMES[0], choices=STAGE_NAMES, metavar="STAGE",
        help="first stage to run; the stages before it must be finished and match the "
        "configuration",
    )  # fmt: skip
    command.add_argument(
        "--until", dest="last", default=STAGE_NAMES[-1], choices=STAGE_NAMES, metavar="STAGE",
        help="last stage to run",
    )  # fmt: skip
    command.add_argument(
        "--redo", action="append", default=[], choices=STAGE_NAMES, metavar="STAGE",
        help=f"run this stage again although it is finished; can be repeated. Stages: "
        f"{', '.join(STAGE_NAMES)}",
    )  # fmt: skip


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="run all stages, or continue an interrupted run")
    _add_config(run)
    _add_stages(run)
    run.set_defaults(execute=_run)
    quickstart = commands.add_parser(
        "quickstart", help="run all stages on generated instructions with a tiny model"
    )
    quickstart.add_argument(
        "--run-dir", default="runs/quickstart", help="run directory; default: %(default)s"
    )
    _add_overrides(quickstart)
    _add_stages(quickstart)
    quickstart.set_defaults(execute=_quickstart)


def _add_ablate(commands: argparse._SubParsersAction) -> None:
    ablate = commands.add_parser(
        "ablate",
        help="compare the natural and the solved mix, each shuffled, as curriculum and reversed",
    )
    _add_config(ablate)
    ablate.add_argument("--seeds", type=int, help="trainings per arm; default: evaluate.seeds")
    ablate.set_defaults(execute=_ablate)


def _add_check(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check", help="validate a configuration and show the plan and its cost; starts nothing"
    )
    _add_config(check)
    check.add_argument(
        "--probe", action=argparse.BooleanOptionalAction, default=True,
        help="measure for some seconds how fast the model trains and scores on this machine, "
        "unless finished stages of the run directory show it (default: yes, as soon as corpus "
        "and model exist)",
    )  # fmt: skip
    check.add_argument(
        "--max-hours", type=_positive, metavar="H",
        help="exit with code 2 if the remaining stages are expected to take more hours",
    )  # fmt: skip
    check.add_argument(
        "--max-tokens", type=_positive, metavar="N",
        help="exit with code 2 if the remaining stages need more token equivalents (trained "
        "tokens plus a third of the scored and generated tokens). For the influence stage alone "
        "set `influence.max_token_equivalents` in the configuration, which `run` obeys too",
    )  # fmt: skip
    check.set_defaults(execute=_check)


def _add_results(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="show which stages of a run are finished")
    status.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    status.set_defaults(execute=_status)
    report = commands.add_parser("report", help="rewrite report.html and report.json")
    report.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    report.add_argument(
        "--compare", metavar="RUN_DIR", nargs="+", default=[],
        help="other runs whose measured effects are shown beside those of this run",
    )  # fmt: skip
    report.set_defaults(execute=_report)
    export = commands.add_parser(
        "export", help="write the selected examples, in training order, for another trainer"
    )
    export.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    export.add_argument(
        "--format", required=True, choices=("hf", "trl", "llama-factory", "axolotl"),
        help="file format of the trainer",
    )  # fmt: skip
    export.add_argument("--out", help="output directory; default: RUN_DIR/export/FORMAT")
    export.set_defaults(execute=_export)


def _add_reference(commands: argparse._SubParsersAction) -> None:
    reference = commands.add_parser(
        "config",
        help="print every key of the configuration with type, default and meaning (Markdown)",
    )
    reference.add_argument("--defaults", action="store_true", help="print all defaults as YAML")
    reference.set_defaults(execute=_reference)


def _add_submit(commands: argparse._SubParsersAction) -> None:
    submit = commands.add_parser("submit", help="run all stages as a job on a Ray cluster")
    _add_config(submit)
    submit.add_argument("--address", required=True, help="job server, such as http://HEAD:8265")
    submit.add_argument(
        "--no-wait", action="store_true", help="return as soon as the job is submitted"
    )
    submit.set_defaults(execute=_submit)


def _add_tools(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser(
        "verify", help="compare the predicted gain of every arm with its realised gain"
    )
    verify.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    verify.set_defaults(execute=_verify)
    compare = commands.add_parser(
        "compare", help="compare the effects that two runs measured, and what each cost"
    )
    compare.add_argument("first", metavar="RUN_DIR", help=_RUN_DIR)
    compare.add_argument("second", metavar="RUN_DIR", help="run directory of another run")
    compare.set_defaults(execute=_compare)
    from system.examples.planted_command import add_arguments as add_planted_arguments
    from system.solve.command import add_arguments as add_solve_arguments

    planted = commands.add_parser(
        "planted", help="generate a corpus with known interactions, to test estimators"
    )
    add_planted_arguments(planted)
    planted.set_defaults(execute=_planted)
    solve = commands.add_parser("solve", help="solve for a mix from tables, without a run")
    add_solve_arguments(solve)
    solve.set_defaults(execute=_solve)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def _run(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    return _run_stages(load_config(arguments.config, arguments.overrides), arguments)


def _quickstart(arguments: argparse.Namespace) -> int:
    from system.examples.quickstart import prepare_quickstart

    config = prepare_quickstart(arguments.run_dir, arguments.overrides)
    return _run_stages(config, arguments)


def _run_stages(config: RunConfig, arguments: argparse.Namespace) -> int:
    from actors.pipeline import Plan, run_pipeline
    from system.progress import Progress

    plan = Plan(first=arguments.first, last=arguments.last, redo=tuple(arguments.redo))
    run_pipeline(config, plan, Progress())
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from actors.pipeline import Plan, run_pipeline
    from system.evaluation.ablation import ablation_config, describe_ablation
    from system.progress import Progress

    config = ablation_config(config, arguments.seeds)
    run_pipeline(config, Plan(), Progress())
    print(printable(describe_ablation(config.run_dir)))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from actors.overview import describe_plan

    plan = describe_plan(config, probe=arguments.probe)
    print(printable(plan.text))
    plan.forecast.refuse(max_hours=arguments.max_hours, max_tokens=arguments.max_tokens)
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    from system.config.reference import render_defaults, render_reference

    print(render_defaults() if arguments.defaults else render_reference(), end="")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from actors.overview import describe_status

    print(printable(describe_status(arguments.run_dir)))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from system.report import write_report

    print(write_report(arguments.run_dir, arguments.compare))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from system.evaluation.verification import describe_prediction

    print(printable(describe_prediction(arguments.run_dir)))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from system.influence.estimate.comparison import describe_comparison

    print(printable(describe_comparison(arguments.first, arguments.second)))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from system.selection.export import export_selection

    exported = export_selection(arguments.run_dir, arguments.format, arguments.out)
    for remark in exported.remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(exported.path)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from actors.jobs import submit_job

    return submit_job(config, arguments.address, wait=not arguments.no_wait)


def _planted(arguments: argparse.Namespace) -> int:
    from system.examples.planted_command import run

    return run(arguments)


def _solve(arguments: argparse.Namespace) -> int:
    from system.solve.command import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
