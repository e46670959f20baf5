"""What a stage gets and gives: the shape that all stages of the pipeline share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.cluster import Cluster
from system.config import RunConfig
from system.models.base import kind_of
from system.progress import Progress
from system.rundir import RunDir, StageRecord, shared_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """Everything a stage may use."""

    config: RunConfig
    run_dir: RunDir
    attempt: str
    """Absolute URI. The stage writes only below it; after a crash it gets the same one again."""
    upstream: Mapping[str, StageRecord]
    """Records of the stages before it, by stage name."""
    progress: Progress
    cluster: Cluster
    appends_to: str | None = None
    """Name of the finished attempt that this one adds to (`influence.append`)."""

    shared: str | None = None
    """`shared_uri` of a part of an attempt, which is that of the attempt."""

    @property
    def shared_uri(self) -> str:
        """Absolute URI of what all attempts of this stage share; `--redo` deletes it."""
        return self.shared or shared_uri(self.attempt)

    @property
    def model_identity(self) -> dict[str, Any]:
        """What decides the base model and its tokenizer; the corpus only where they are built
        from it.
        """
        record = self.upstream["model"]
        if kind_of(self.config.model.path) == "builtin":
            return {"fingerprint": record.fingerprint}
        inputs = record.inputs.items()
        return {name: value for name, value in inputs if not name.startswith("after.")}

    def input(self, stage: str, output: str) -> str:
        """Absolute URI of an output of an earlier stage."""
        return self.run_dir.output_uri(self.upstream[stage], output)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage leaves."""

    outputs: dict[str, str]
    """Name -> path relative to the attempt."""
    counts: dict[str, Any]
    """JSON values: rows in / out / dropped by reason, tokens, ..."""
    lines: tuple[str, ...] = ()
    """Two to six short lines for a person."""
    digest: str = ""
    """Of all that later stages read of the outputs; empty: they go by the inputs."""
