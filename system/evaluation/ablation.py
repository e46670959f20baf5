"""`instructmix ablate`: trains two mixes in three orders and shows what made the difference.

The mixes are natural and solved; the orders are shuffled, curriculum, and reversed.  All have the
same budget, seeds, and test examples.  The table has paired differences of held-out loss by
category, in nats per response token; positive is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from system import storage
from system.config import EvaluateConfig, RunConfig
from system.errors import ConfigError
from system.evaluation.prediction import NATURAL, SOLVED
from system.rundir import RunDir
from system.stages import STAGE_FOLDERS

ARMS = (
    "natural",
    "natural-curriculum",
    "natural-reversed",
    "solved",
    "solved-curriculum",
    "solved-reversed",
)


def ablation_config(config: RunConfig, seeds: int | None) -> RunConfig:
    """The configuration with all arms of the ablation, and with this number of seeds.

    Raises:
        ConfigError: fewer than two seeds, with which a difference cannot be told from chance.
    """
    num_seeds = config.evaluate.seeds if seeds is None else seeds
    if num_seeds < 2:
        raise ConfigError(
            "an ablation needs at least two seeds to tell a difference from chance, found "
            f"{num_seeds}; raise --seeds or evaluate.seeds"
        )
    values = config.evaluate.model_dump() | {"arms": ARMS, "seeds": num_seeds}
    evaluate = EvaluateConfig.model_validate(values)
    return config.model_copy(update={"evaluate": evaluate})


def describe_ablation(run_dir_uri: str) -> str:
    """The text that the command prints: paired differences, and the factors behind them.

    Raises:
        ConfigError: the run has no evaluation.
    """
    run_dir = RunDir(run_dir_uri)
    record = run_dir.read_record(STAGE_FOLDERS["evaluate"])
    if record is None:
        raise ConfigError(
            f"{run_dir_uri}: expected a run whose stage `evaluate` is finished, found none; finish "
            "it with `instructmix ablate CONFIG`"
        )
    return ablation_tables(storage.read_json(run_dir.output_uri(record, "summary")))


def ablation_tables(summary: Mapping[str, Any]) -> str:
    """The tables of a `summary.json`."""
    trained = [arm["name"] for arm in summary["arms"] if arm["name"] in ARMS]
    against_natural = [arm for arm in trained if arm != NATURAL]
    orders = [arm for arm in trained if arm.startswith(f"{SOLVED}-")]
    note = [summary["importance_note"]] if summary["importance_note"] else []
    lines = ["Gain over the natural mix, shuffled", *note, ""]
    lines += _table(summary, against_natural, NATURAL)
    if orders and SOLVED in trained:
        lines += ["", "Order alone: gain over the solved mix, shuffled", ""]
        lines += _table(summary, orders, SOLVED)
    lines += ["", "What made it (importance-weighted over categories)", ""]
    for row in summary["factors"]:
        if row["weighting"] == "importance":
            lines.append(
                f"  {row['factor']:<16} {_cell(row)}  {row['verdict']:<7} {row['formula']}"
            )
    seeds = {arm["seeds"] for arm in summary["arms"] if arm["name"] in ARMS}
    lines += [
        "",
        f"{max(seeds)} seeds; nats per response token, positive for better, with intervals",
    ]
    return "\n".join(lines)


def _table(summary: Mapping[str, Any], arms: Sequence[str], reference: str) -> list[str]:
    cells: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in summary["comparisons"]:
        if row["metric"] != "loss" or row["reference"] != reference:
            continue
        if row["category"] is not None or row["weighting"] == "importance":
            cells[row["arm"], row["category"] or "all, by importance"] = row
    names = list(dict.fromkeys(name for _, name in cells))
    names.sort(key=lambda name: (name == "all, by importance", name))
    width = max(len(name) for name in names)
    header = f"  {'category':<{width}}  " + "  ".join(f"{arm:<28}" for arm in arms)
    rows = [
        f"  {name:<{width}}  " + "  ".join(f"{_cell(cells[arm, name]):<28}" for arm in arms)
        for name in names
    ]
    return [header.rstrip(), *(row.rstrip() for row in rows)]


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
