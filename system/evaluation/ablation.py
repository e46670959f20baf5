"""`instructmix ablate`: two mixes in three orders over seeds, and what made the difference.

Mixes natural and solved, orders shuffled, curriculum and reversed, all at equal budget and on the
same examples and seeds.  The table holds paired differences of held-out loss, category by category,
in nats per response token, positive for better.
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
    """The configuration with all arms of the ablation, and as many seeds as asked.

    Raises:
        ConfigError: fewer than two seeds, which cannot tell a difference from chance.
    """
    wanted = config.evaluate.seeds if seeds is None else seeds
    if wanted < 2:
        raise ConfigError(
            "an ablation needs two seeds or more to tell a difference from chance, found "
            f"{wanted}; raise --seeds or evaluate.seeds"
        )
    values = config.evaluate.model_dump() | {"arms": ARMS, "seeds": wanted}
    evaluate = EvaluateConfig.model_validate(values)
    return config.model_copy(update={"evaluate": evaluate})


def describe_ablation(run_dir_uri: str) -> str:
    """The tables of paired differences, and the factors behind them.

    Raises:
        ConfigError: the run holds no evaluation.
    """
    run_dir = RunDir(run_dir_uri)
    record = run_dir.read_record(STAGE_FOLDERS["evaluate"])
    if record is None:
        raise ConfigError(f"{run_dir_uri}: expected a run whose stage `evaluate` is finished")
    return ablation_tables(storage.read_json(run_dir.output_uri(record, "summary")))


def ablation_tables(summary: Mapping[str, Any]) -> str:
    """The tables of a `summary.json`."""
    trained = [arm["name"] for arm in summary["arms"] if arm["name"] in ARMS]
    against_natural = [arm for arm in trained if arm != NATURAL]
    orders = [arm for arm in trained if arm.startswith(f"{SOLVED}-")]
    note = [summary["importance_note"]] if summary["importance_note"] else []
    lines = ["Difference to the natural mix, shuffled", *note, ""]
    lines += _table(summary, against_natural, NATURAL)
    if orders and SOLVED in trained:
        lines += ["", "Order alone: difference to the solved mix, shuffled", ""]
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
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in summary["comparisons"]:
        if row["metric"] != "loss" or row["reference"] != reference:
            continue
        if row["category"] is not None or row["weighting"] == "importance":
            found[row["arm"], row["category"] or "all, by importance"] = row
    names = list(dict.fromkeys(name for _, name in found))
    names.sort(key=lambda name: (name == "all, by importance", name))
    width = max(len(name) for name in names)
    header = f"  {'category':<{width}}  " + "  ".join(f"{arm:<28}" for arm in arms)
    rows = [
        f"  {name:<{width}}  " + "  ".join(f"{_cell(found[arm, name]):<28}" for arm in arms)
        for name in names
    ]
    return [header.rstrip(), *(row.rstrip() for row in rows)]


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
