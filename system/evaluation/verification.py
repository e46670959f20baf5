"""`instructmix verify`: predicted against realised, target by target.

A mix is chosen by what the effect matrix predicts; this table shows what it was worth.  Predicted
is the solver's change of each target, realised the difference `solved - natural` on the test split,
both in nats per response token, positive for better.
"""

from __future__ import annotations

from typing import Any

from system import storage
from system.errors import ConfigError
from system.rundir import RunDir
from system.stages import STAGE_FOLDERS


def describe_prediction(run_dir_uri: str) -> str:
    """The table and a plain sentence about it.

    Raises:
        ConfigError: the run is not evaluated, or its arms allow no comparison.
    """
    run_dir = RunDir(run_dir_uri)
    record = run_dir.read_record(STAGE_FOLDERS["evaluate"])
    if record is None:
        raise ConfigError(
            f"{run_dir_uri}: expected a run whose stage `evaluate` is finished, found none; "
            "finish it with `instructmix run CONFIG`"
        )
    prediction = storage.read_json(run_dir.output_uri(record, "summary"))["prediction"]
    if prediction is None:
        raise ConfigError(
            f"{run_dir_uri}: predicted and realised can be compared only when evaluate.arms has "
            "both `natural` and `solved`; add them and run again"
        )
    rows = [*prediction["targets"], {**prediction["overall"], "target": "overall"}]
    width = max(len(row["target"]) for row in rows)
    header = (
        f"{'target':<{width}}  {'predicted':>10}  {'realised':>10}  interval            verdict"
    )
    lines = [header, *(_line(row, width) for row in rows)]
    if prediction["slope"] is not None:
        lines += ["", f"realised per unit of predicted: {prediction['slope']:.2f}"]
    if prediction["rank_correlation"] is not None:
        lines += [f"rank correlation over targets: {prediction['rank_correlation']:.2f}"]
    return "\n".join(lines)


def _line(row: dict[str, Any], width: int) -> str:
    interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
    return (
        f"{row['target']:<{width}}  {row['predicted']:>+10.4f}  {row['realised']:>+10.4f}  "
        f"{interval:<18}  {row['verdict']}"
    )
