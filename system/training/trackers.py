"""Experiment trackers besides `metrics.jsonl`, each used only where its package is installed."""

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
"""What MLflow takes in no name of a metric."""


def check_trackers(names: Sequence[str], output_uri: str) -> None:
    """Before training: every tracker asked for can be used.

    Raises:
        ConfigError: its package is not installed, or it cannot write where the run writes.
    """
    for name in names:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.log_to asks for {name!r}, but the package {package} is not installed here; "
                f"run `pip install {package}` or take it out (metrics.jsonl is always written)"
            )
    if "tensorboard" in names and storage.local_path(output_uri) is None:
        raise ConfigError(
            f"train.log_to: tensorboard writes local files, but the run directory is {output_uri}; "
            "use wandb or mlflow there, or read metrics.jsonl"
        )


class Trackers:
    """The trackers of one training.

    One that fails on the way (its server is away) is given up, and training goes on without it:
    `metrics.jsonl` has every step whatever happens, and a training that starts again tries again.

    Args:
        names: `tensorboard`, `wandb`, `mlflow`.
        output_uri: the job's directory; TensorBoard writes below it.
        run_name: how the trackers call the run.
        is_resumed: whether a tracker that cannot be opened is no reason to end.

    Raises:
        ConfigError: a tracker cannot be opened for a training that begins.
    """

    def __init__(
        self, names: Sequence[str], output_uri: str, run_name: str, *, is_resumed: bool
    ) -> None:
        self.lost: dict[str, str] = {}
        """Name -> why it was given up."""
        self._open: dict[str, tuple[Sink, contextlib.ExitStack]] = {}
        for name in names:
            stack = contextlib.ExitStack()
            try:
                self._open[name] = _OPENERS[name](output_uri, run_name, stack), stack
            except Exception as error:
                if not is_resumed:
                    raise ConfigError(
                        f"train.log_to: expected a {name} that takes metrics, found {error!r}. Set "
                        "it up on the nodes that train, or take it out (metrics.jsonl is always "
                        "written)."
                    ) from error
                self.lost[name] = f"as training went on: {error!r}"

    def write(self, record: dict[str, Any]) -> None:
        """Hands a step's metrics to those that are left."""
        for name, (sink, _) in list(self._open.items()):
            try:
                sink(record)
            except Exception as error:
                del self._open[name]
                self.lost[name] = f"at step {record['step']}: {error!r}"

    def close(self) -> None:
        """Ends the curves."""
        for name, (_, stack) in self._open.items():
            try:
                stack.close()
            except Exception as error:
                self.lost[name] = f"at the end: {error!r}"
        self._open.clear()


def flat_metrics(record: dict[str, Any]) -> dict[str, float]:
    """Names and numbers of a record, categories included, as every tracker takes them."""
    numbers = {name: float(record[name]) for name in _NUMBERS if record.get(name) is not None}
    for category, loss in record["category_loss"].items():
        name = plain = "loss/" + _REFUSED.sub("_", category)
        number = 2
        while name in numbers:  # `c+` and `c#` are two curves
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
    ours = _run_id(output_uri)
    found = mlflow.search_runs(
        experiment_names=["instructmix"], filter_string=f"tags.output = '{ours}'",
        max_results=1, output_format="list",
    )  # fmt: skip
    run = (
        mlflow.start_run(run_id=found[0].info.run_id)
        if found
        else mlflow.start_run(run_name=run_name, tags={"output": ours})
    )
    stack.enter_context(run)

    def write(record: dict[str, Any]) -> None:
        mlflow.log_metrics(flat_metrics(record), step=record["step"])

    return write


def _run_id(output_uri: str) -> str:
    """The same id after a restart, so that the tracker continues its curve."""
    import hashlib

    return hashlib.sha256(output_uri.encode()).hexdigest()[:16]


_OPENERS: dict[str, Callable[[str, str, contextlib.ExitStack], Sink]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}
