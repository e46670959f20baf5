"""The input and the output of a stage: types that all stages of the pipeline share.

`actors.pipeline` makes the StageContext; each stage's `run(context)` returns a StageResult.
"""

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
    """The input of a stage: everything that it may use."""

    config: RunConfig
    run_dir: RunDir
    attempt: str
    """Absolute URI. The stage writes only below it, and gets the same one again after a crash."""
    upstream: Mapping[str, StageRecord]
    """Records of the stages before it, by stage name."""
    progress: Progress
    cluster: Cluster
    appends_to: str | None = None
    """Name of the finished attempt that this one appends to (`influence.append`)."""

    shared: str | None = None
    """`shared_uri` of the whole attempt, when this context covers only a folder of the attempt."""

    @property
    def shared_uri(self) -> str:
        """Absolute URI of the files that all attempts of this stage share; `--redo` deletes it."""
        return self.shared or shared_uri(self.attempt)

    @property
    def model_identity(self) -> dict[str, Any]:
        """The inputs that decide the base model and its tokenizer.

        A built-in model is trained on the corpus, so there the corpus is one of them.
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
    """The output of a stage."""

    outputs: dict[str, str]
    """Name -> path relative to the attempt."""
    counts: dict[str, Any]
    """JSON values: rows in / out / dropped by reason, tokens, ..."""
    lines: tuple[str, ...] = ()
    """Two to six short lines for the log."""
    digest: str = ""
    """Hash of everything that later stages read. Equal digests keep later stages finished. Empty:
    later stages depend on the inputs of this stage instead."""
