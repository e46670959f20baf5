"""The command line: `instructmix COMMAND ...`.

Heavy modules are imported after the arguments are parsed, inside the command that needs them.
This is the one module of `system` that may import `actors`, and it does so inside functions.
Exit codes: 0 done, 1 failed, 2 bad input or configuration, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from system.errors import InstructMixError
from system.stages import STAGE_NAMES

_RUN_DIR = "`run_dir` of the configuration"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.execute(arguments)
    except InstructMixError as error:
        if arguments.debug:
            raise
        print(f"instructmix: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if arguments.debug:
            raise
        print(
            f"instructmix: the system refused a file operation: {error}. Check space, permissions "
            "and the path; finished work is kept, run again to continue.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as error:
        print("instructmix: stopped; finished work is kept, run again to continue", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _TerminatedError) else signal.SIGINT)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM has come."""


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    """`ray job stop` and Kubernetes end a driver so: leave as after Ctrl-C, the lease freed."""
    raise _TerminatedError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instructmix",
        description="Find out how categories of instructions help and harm each other, solve for "
        "the best mix, order it into a curriculum, and fine-tune the model.",
    )
    version = importlib.metadata.version("instructmix")
    parser.add_argument("--version", action="version", version=f"instructmix {version}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_ablate(commands)
    _add_check(commands)
    _add_looks(commands)
    _add_reference(commands)
    _add_submit(commands)
    _add_tools(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="YAML file; examples are in configs/")
    _add_overrides(command)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides",
        help="override one value of the configuration; may be given several times",
    )  # fmt: skip


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="run the job, or continue it where it stopped")
    _add_config(run)
    run.add_argument(
        "--from", dest="first", default=STAGE_NAMES[0], choices=STAGE_NAMES, metavar="STAGE",
        help="begin with this stage; those before it must be finished and fit the configuration",
    )  # fmt: skip
    run.add_argument(
        "--until", dest="last", default=STAGE_NAMES[-1], choices=STAGE_NAMES, metavar="STAGE",
        help="end after this stage",
    )  # fmt: skip
    run.add_argument(
        "--redo", action="append", default=[], choices=STAGE_NAMES, metavar="STAGE",
        help=f"run a finished stage again; stages: {', '.join(STAGE_NAMES)}",
    )  # fmt: skip
    run.set_defaults(execute=_run)
    quickstart = commands.add_parser(
        "quickstart", help="the whole job on generated instructions and a tiny model"
    )
    quickstart.add_argument(
        "--run-dir", default="runs/quickstart", help="where everything goes; default: %(default)s"
    )
    _add_overrides(quickstart)
    quickstart.set_defaults(execute=_quickstart)


def _add_ablate(commands: argparse._SubParsersAction) -> None:
    ablate = commands.add_parser(
        "ablate", help="train natural and solved mixes, shuffled, as curriculum and reversed"
    )
    _add_config(ablate)
    ablate.add_argument("--seeds", type=int, help="trainings per arm; default: evaluate.seeds")
    ablate.set_defaults(execute=_ablate)


def _add_check(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check", help="validate a configuration, show the plan and its cost, start nothing"
    )
    _add_config(check)
    check.add_argument(
        "--probe", action=argparse.BooleanOptionalAction, default=True,
        help="measure for some seconds how fast the model trains and scores here, where no run of "
        "the run directory tells it (default: yes, once there is a corpus and a model)",
    )  # fmt: skip
    check.add_argument(
        "--max-hours", type=_positive, metavar="H",
        help="refuse, with exit code 2, a plan whose stages still to run take more hours",
    )  # fmt: skip
    check.add_argument(
        "--max-tokens", type=_positive, metavar="N",
        help="refuse a plan that takes more token equivalents: trained tokens, and a third of the "
        "scored and generated ones; `influence.max_token_equivalents` in the configuration does "
        "the same for the influence stage, and `run` obeys it too",
    )  # fmt: skip
    check.set_defaults(execute=_check)


def _add_looks(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="what is finished in a run directory")
    status.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    status.set_defaults(execute=_status)
    report = commands.add_parser("report", help="write report.html and report.json again")
    report.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    report.add_argument(
        "--compare", metavar="RUN_DIR", nargs="+", default=[],
        help="set the effects that other runs measured beside those of this one",
    )  # fmt: skip
    report.set_defaults(execute=_report)
    export = commands.add_parser(
        "export", help="write the selection for another trainer, in training order"
    )
    export.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    export.add_argument(
        "--format", required=True, choices=("hf", "trl", "llama-factory", "axolotl"),
        help="how the trainer wants its rows",
    )  # fmt: skip
    export.add_argument("--out", help="directory; default: RUN_DIR/export/FORMAT")
    export.set_defaults(execute=_export)


def _add_reference(commands: argparse._SubParsersAction) -> None:
    reference = commands.add_parser(
        "config", help="every key of the configuration: type, default and meaning (Markdown)"
    )
    reference.add_argument("--defaults", action="store_true", help="all defaults, as YAML")
    reference.set_defaults(execute=_reference)


def _add_submit(commands: argparse._SubParsersAction) -> None:
    submit = commands.add_parser("submit", help="run the job on a Ray cluster (Ray Jobs)")
    _add_config(submit)
    submit.add_argument("--address", required=True, help="http://HEAD:8265")
    submit.add_argument("--no-wait", action="store_true", help="return when it is submitted")
    submit.set_defaults(execute=_submit)


def _add_tools(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser(
        "verify", help="what the solver promised beside what the mix brought on held-out data"
    )
    verify.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_DIR)
    verify.set_defaults(execute=_verify)
    compare = commands.add_parser(
        "compare", help="whether two runs measured the same effects, and what each cost"
    )
    compare.add_argument("first", metavar="RUN_DIR", help=_RUN_DIR)
    compare.add_argument("second", metavar="RUN_DIR", help="another run")
    compare.set_defaults(execute=_compare)
    from system.examples.planted_command import add_arguments as add_planted_arguments
    from system.solve.command import add_arguments as add_solve_arguments

    planted = commands.add_parser(
        "planted", help="write a corpus whose interactions are known, to check estimators on"
    )
    add_planted_arguments(planted)
    planted.set_defaults(execute=_planted)
    solve = commands.add_parser("solve", help="solve a mix from tables, without a run")
    add_solve_arguments(solve)
    solve.set_defaults(execute=_solve)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def _run(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from actors.pipeline import Plan, run_pipeline
    from system.progress import Progress

    plan = Plan(first=arguments.first, last=arguments.last, redo=tuple(arguments.redo))
    run_pipeline(config, plan, Progress())
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from system.examples.quickstart import prepare_quickstart

    config = prepare_quickstart(arguments.run_dir, arguments.overrides)
    from actors.pipeline import Plan, run_pipeline
    from system.progress import Progress

    run_pipeline(config, Plan(), Progress())
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from actors.pipeline import Plan, run_pipeline
    from system.evaluation.ablation import ablation_config, describe_ablation
    from system.progress import Progress

    config = ablation_config(config, arguments.seeds)
    run_pipeline(config, Plan(), Progress())
    print(describe_ablation(config.run_dir))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from system.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from actors.overview import describe_plan

    plan = describe_plan(config, probe=arguments.probe)
    print(plan.text)
    plan.forecast.refuse(max_hours=arguments.max_hours, max_tokens=arguments.max_tokens)
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    from system.config.reference import render_defaults, render_reference

    print(render_defaults() if arguments.defaults else render_reference(), end="")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from actors.overview import describe_status

    print(describe_status(arguments.run_dir))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from system.report import write_report

    print(write_report(arguments.run_dir, arguments.compare))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from system.evaluation.verification import describe_prediction

    print(describe_prediction(arguments.run_dir))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from system.influence.estimate.comparison import describe_comparison

    print(describe_comparison(arguments.first, arguments.second))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from system.selection.export import export_selection

    print(export_selection(arguments.run_dir, arguments.format, arguments.out))
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
