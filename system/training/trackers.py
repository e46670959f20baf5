"""Experiment trackers (TensorBoard, W&B, MLflow), in addition to `metrics.jsonl`.

Their packages are optional; `check_trackers` reports a missing one before a training starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

from system import storage
from system.errors import ConfigError

Sink = Callable[[dict[str, Any]], None]

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_NUMBERS = (
    "loss", "heldout_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
    "memory_bytes",
)  # fmt: skip
_REFUSED = re.compile(r"[^\w./ -]")
"""Characters that MLflow does not allow in the name of a metric."""


def check_trackers(names: Sequence[str], output_uri: str) -> None:
    """Checks, before a training, that every configured tracker can be used.

    Raises:
        ConfigError: its package is not installed, or it cannot write where the run writes.
    """
    for name in names:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.log_to has {name!r}, but the package {package} is not installed here; run "
                f"`pip install {package}`, or remove it (metrics.jsonl is always written)"
            )
    if "tensorboard" in names and storage.local_path(output_uri) is None:
        raise ConfigError(
            "train.log_to: tensorboard needs a run directory on a local disk, found "
            f"{output_uri}; use wandb or mlflow instead, or read metrics.jsonl"
        )


class Trackers:
    """The trackers of one training.

    A tracker that fails during the training (for example because its server is down) is dropped,
    and the training continues without it: `metrics.jsonl` always has every step.  A training that
    starts again tries the tracker again.

    Args:
        names: `tensorboard`, `wandb`, `mlflow`.
        output_uri: directory of the job; TensorBoard writes below it.
        run_name: name of the run in the trackers.
        is_resumed: whether the training resumes; then a tracker that cannot be opened is dropped
            instead of raising an error.

    Raises:
        ConfigError: a tracker cannot be opened at the start of a training.
    """

    def __init__(
        self, names: Sequence[str], output_uri: str, run_name: str, *, is_resumed: bool
    ) -> None:
        self.lost: dict[str, str] = {}
        """Name -> reason why it was dropped."""
        self._open: dict[str, tuple[Sink, contextlib.ExitStack]] = {}
        for name in names:
            stack = contextlib.ExitStack()
            try:
                self._open[name] = _OPENERS[name](output_uri, run_name, stack), stack
            except Exception as error:
                if not is_resumed:
                    raise ConfigError(
                        f"train.log_to: {name} cannot be opened: {error!r}. Set it up on the nodes "
                        "that train, or remove it (metrics.jsonl is always written)."
                    ) from error
                self.lost[name] = f"when the training resumed: {error!r}"

    def write(self, record: dict[str, Any]) -> None:
        """Sends the metrics of a step to the remaining trackers."""
        for name, (sink, _) in list(self._open.items()):
            try:
                sink(record)
            except Exception as error:
                del self._open[name]
                self.lost[name] = f"at step {record['step']}: {error!r}"

    def close(self) -> None:
        """Closes all trackers."""
        for name, (_, stack) in self._open.items():
            try:
                stack.close()
            except Exception as error:
                self.lost[name] = f"at the end: {error!r}"
        self._open.clear()


def flat_metrics(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, with the losses of categories, for a tracker."""
    numbers = {name: float(record[name]) for name in _NUMBERS if record.get(name) is not None}
    for category, loss in record["category_loss"].items():
        name = plain = "loss/" + _REFUSED.sub("_", category)
        number = 2
        while name in numbers:  # `c+` and `c#` both become `c_`, but need two curves
            name, number = f"{plain} {number}", number + 1
        numbers[name] = loss
    return numbers


def _open_tensorboard(output_uri: str, run_name: str, stack: contextlib.ExitStack) -> Sink:
    from tensorboardX import SummaryWriter

    folder = storage.local_path(storage.join(output_uri, "tensorboard"))
    writer = SummaryWriter(str(folder))
    stack.callback(writer.close)

    def write(record: dict[str, Any]) -> None:
        for name, value in flat_metrics(record).items():
            writer.add_scalar(name, value, record["step"])

    return write


def _open_wandb(output_uri: str, run_name: str, stack: contextlib.ExitStack) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project="instructmix", name=run_name, id=_run_id(output_uri), resume="allow")
    stack.callback(run.finish)

    def write(record: dict[str, Any]) -> None:
        run.log(flat_metrics(record), step=record["step"])

    return write


def _open_mlflow(output_uri: str, run_name: str, stack: contextlib.ExitStack) -> Sink:
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment("instructmix")
    output_id = _run_id(output_uri)
    runs = mlflow.search_runs(
        experiment_names=["instructmix"], filter_string=f"tags.output = '{output_id}'",
        max_results=1, output_format="list",
    )  # fmt: skip
    run = (
        mlflow.start_run(run_id=runs[0].info.run_id)
        if runs
        else mlflow.start_run(run_name=run_name, tags={"output": output_id})
    )
    stack.enter_context(run)

    def write(record: dict[str, Any]) -> None:
        mlflow.log_metrics(flat_metrics(record), step=record["step"])

    return write


def _run_id(output_uri: str) -> str:
    """An id that is the same after a restart, so that the tracker continues the curve."""
    import hashlib

    return hashlib.sha256(output_uri.encode()).hexdigest()[:16]


_OPENERS: dict[str, Callable[[str, str, contextlib.ExitStack], Sink]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}
