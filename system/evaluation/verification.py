"""`instructmix verify`: predicted against realised, arm by arm and target by target.

The tables show, for the solved mix and for other mixes, the gain that the effect matrix predicted
and the gain that training realised on the test split (`system.evaluation.prediction`).  Both are in
the unit of the effects; positive is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from system import storage
from system.errors import ConfigError
from system.evaluation.prediction import NATURAL
from system.rundir import RunDir
from system.solve.mix import ANSWERS
from system.stages import STAGE_FOLDERS


def describe_prediction(run_dir_uri: str) -> str:
    """The text that the command prints: tables of predicted and realised gains.

    Raises:
        ConfigError: the run is not evaluated, or no two of its arms can be compared.
    """
    run_dir = RunDir(run_dir_uri)
    record = run_dir.read_record(STAGE_FOLDERS["evaluate"])
    if record is None:
        raise ConfigError(
            f"{run_dir_uri}: expected a run whose stage `evaluate` is finished, found none; "
            "finish it with `instructmix run CONFIG`"
        )
    summary = storage.read_json(run_dir.output_uri(record, "summary"))
    if not summary["predictions"]:
        raise ConfigError(f"{run_dir_uri}: {_why_no_prediction(summary)}")
    return prediction_tables(summary)


def prediction_tables(summary: Mapping[str, Any]) -> str:
    """The tables of a `summary.json` that has predictions."""
    rows = [
        {**item["overall"], "target": f"{item['arm']} - {item['reference']}"}
        for item in summary["predictions"]
    ]
    level, unit = f"{summary['confidence']:.0%} interval", summary["prediction_unit"]
    lines = [f"All targets by importance, {unit}, positive for better"]
    lines += [summary["importance_note"], ""] if summary["importance_note"] else [""]
    lines += _table("arms", rows, level)
    trained = {item["name"]: item["seeds"] for item in summary["arms"]}
    seeds = [trained[item["arm"]] for item in summary["predictions"]]
    lines += ["", f"trainings per arm: {max(seeds)}", *_reference(summary)]
    if max(seeds) == 1:
        lines.append(
            "one training per arm: intervals do not include the variation between trainings"
        )
    solved = summary["prediction"]
    if solved is not None:
        lines += ["", "Target by target, solved - natural", ""]
        lines += _table("target", [*solved["targets"], {**solved["overall"], "target": "overall"}],
                        level)  # fmt: skip
        if solved["slope"] is not None:
            lines += ["", f"realised per unit of predicted: {solved['slope']:.2f}"]
        if solved["rank_correlation"] is not None:
            lines += [f"rank correlation over targets: {solved['rank_correlation']:.2f}"]
    return "\n".join(lines)


def _why_no_prediction(summary: Mapping[str, Any]) -> str:
    if summary["prediction_unit"] == ANSWERS and not summary["accuracy"]:
        return (
            "the effects are in shares of correct answers, but the evaluation generated no "
            "answers, or no test row has an answer that can be checked; raise "
            "evaluate.accuracy_rows and run again"
        )
    return (
        "predicted and realised gains can be compared only if evaluate.arms has `natural` or "
        "`solved`, and another mix; add one and run again"
    )


def _reference(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"natural is the reference: held-out loss {row['value']:.4f} nats per response token"
        for row in summary["losses"]
        if row["arm"] == NATURAL and row["category"] is None
    ]


def _table(first: str, rows: Sequence[Mapping[str, Any]], level: str) -> list[str]:
    width = max(len(first), *(len(row["target"]) for row in rows))
    titles = f"{'predicted':>9} {'+- error':>10}  {'realised':>9}  {level:<18}  verdict"
    header = f"{first:<{width}}  {titles}"
    return [header, *(_line(row, width) for row in rows)]


def _line(row: Mapping[str, Any], width: int) -> str:
    error = "" if row["predicted_se"] is None else f"+- {row['predicted_se']:.4f}"
    interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
    return (
        f"{row['target']:<{width}}  {row['predicted']:>+9.4f} {error:>10}  {row['realised']:>+9.4f}"
        f"  {interval:<18}  {row['verdict']}"
    )
