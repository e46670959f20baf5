"""``instructmix solve``: tables in, ``mix.json`` out."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from system.solve.mix import Mix

_DESCRIPTION = """\
Solve the best mix of instruction categories from measured effects, exactly (HiGHS), and explain it:
which limits bind, what loosening each of them would bring, how far the answer holds.

matrix: a table, first column target names, header source names (rows = targets, columns = sources);
        .csv, .parquet, or .npy with the names of the base table; an empty cell is an effect that
        could not be measured and counts as zero.
base:   category,count[,supply,importance,lower,upper,cap,tokens,group]
limits: YAML with any of  groups: {NAME: {min, max, categories}},
        categories: {NAME: {lower, upper, cap, supply}}, guards: {TARGET: nats},
        importance: {TARGET: weight}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``solve``; needs nothing but argparse."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    matrix = parser.add_mutually_exclusive_group(required=True)
    matrix.add_argument("--gamma", metavar="TABLE", help="square matrix of gamma (dimensionless)")
    matrix.add_argument("--effect", metavar="TABLE", help="effects, nats per example added")
    add = parser.add_argument
    add("--remove", metavar="TABLE", help="effects, nats per example removed")
    add("--base", metavar="TABLE", required=True, help="categories and their counts")
    add("--budget", type=float, metavar="N", help="size of the mix (default: sum of the counts)")
    add("--unit", choices=("examples", "tokens"), help="unit of the budget (default: examples)")
    add("--max-epochs", type=float, metavar="E", help="uses of one example (default: 1)")
    add("--move", type=float, metavar="SHARE", help="share of the budget to move (default: 0.1)")
    add("--cap", type=float, metavar="SHARE", help="share of the budget one category may move")
    guard = parser.add_mutually_exclusive_group()
    guard.add_argument("--guard", type=float, metavar="EPS", help="loss allowed, share of base")
    guard.add_argument("--guard-nats", type=float, metavar="X", help="loss allowed, in nats")
    add("--objective", choices=("linear", "max-min", "concave", "robust"), help="default: linear")
    add("--stderr", metavar="TABLE", help="standard errors of the effects (of adding)")
    add("--stderr-remove", metavar="TABLE", help="standard errors of removing (default: --stderr)")
    add("--uncertainty", choices=("box", "budget"), help="robust: all sources off, or some")
    add("--radius", type=float, metavar="R", help="robust: standard errors (default: 1)")
    add("--sources-off", type=float, metavar="K", help="robust: sources off (default: sqrt)")
    add("--regret", type=int, metavar="DRAWS", help="expected regret by so many drawn matrices")
    add("--integer", action="store_true", help="whole examples")
    add("--max-categories", type=int, metavar="K", help="at most K categories")
    add("--mip-max-nodes", type=int, metavar="N", help="nodes of the integer search at most")
    add("--limits", metavar="YAML", help="groups and limits per category and per target")
    add("--out", metavar="PATH", required=True, help="mix.json to write; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Solve and write; returns 0.

    Raises:
        InstructMixError: the input or the limits cannot be used (exit code 2), see ``solve_mix``.
    """
    from system.solve.regret import expected_regret
    from system.solve.request import read_request
    from system.solve.solve import solve_mix

    problem, options = read_request(args)
    mix = solve_mix(problem, options)
    if args.regret is not None:
        regret = expected_regret(problem, options, num_draws=args.regret)
        mix = dataclasses.replace(mix, expected_regret=regret.known_value)
    if args.out == "-":
        sys.stdout.write(mix.to_json() + "\n")
        return 0
    _write(args.out, mix.to_json() + "\n")
    sys.stdout.write(render_summary(mix))
    for note in mix.notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


def render_summary(mix: "Mix") -> str:
    """The mix as a plain table: the largest moves first."""
    width = max(len("category"), *(len(c.category) for c in mix.categories))
    lines = [
        f"{mix.status}: gain {mix.gain:.6g} ({mix.kind}), {mix.moved:.1%} of {mix.budget:.10g} "
        f"{mix.unit} moved",
        f"{'category':<{width}} {'base':>12} {'mix':>12} {'move':>12}  at       price of limit",
    ]
    ranked = sorted(mix.categories, key=lambda c: -abs(c.count - c.base))
    for record in ranked:
        price = "" if record.limit_price is None else f"{record.limit_price:.4g}"
        lines.append(
            f"{record.category:<{width}} {record.base:>12.2f} {record.count:>12.2f} "
            f"{record.count - record.base:>+12.2f}  {record.at:<8} {price}"
        )
    if mix.move_price is not None and mix.budget_price is not None:
        lines.append(
            f"one more {mix.unit[:-1]} of trust region is worth {mix.move_price:.4g}, of budget "
            f"{mix.budget_price:.4g}"
        )
    if mix.expected_regret is not None:
        lines.append(
            f"expected gain {mix.expected_gain:.4g}; knowing the effects exactly would add "
            f"{mix.expected_regret:.4g} on average"
        )
    guards = [t for t in mix.targets if t.guard_price]
    lines += [f"the guard of {t.target!r} binds, price {t.guard_price:.4g}" for t in guards]
    return "\n".join(lines) + "\n"


def _write(path: str, text: str) -> None:
    """Write beside, then rename: a reader never sees half a mix."""
    import os
    from pathlib import Path

    from system.errors import ConfigError

    target = Path(path)
    beside = target.with_name(target.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
