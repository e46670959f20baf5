"""Stage `model`: writes the base model as one Hugging Face directory.

    driver ── build(target) ──> Modeler (one actor, a few CPUs) ──> <attempt>/model/

The record that the driver writes afterwards commits the directory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from actors.pool import ActorSpec
from actors.stage import StageContext, StageResult
from system import storage
from system.config import ModelConfig
from system.data.corpus import Corpus
from system.models.base import describe_model, kind_of, materialise

WARMUP_CPUS = 2.0
"""Threads for the warm-up of the built-in model: fixed, because the lowest bits depend on it."""


class Modeler:
    """Builds, converts or downloads the base model."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def build(self, manifest: str, target: str) -> dict[str, Any]:
        """Writes the model to `target` and returns its sizes and counts."""
        local = storage.local_path(target)
        if local is not None:
            counts = self._write(manifest, local)
        else:
            with tempfile.TemporaryDirectory(prefix="instructmix-model-") as folder:
                counts = self._write(manifest, Path(folder))
                storage.upload_directory(Path(folder), target)
        # Other code wrote these files: without this, a loss of power could leave the record of the
        # stage and half a model.
        storage.flush_directory(target)
        return counts

    def _write(self, manifest: str, folder: Path) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        if kind_of(self._config.path) == "builtin":
            from system.examples.tiny_model import build_tiny_model

            folder.mkdir(parents=True, exist_ok=True)
            counts = build_tiny_model(Corpus.open(manifest), self._config, self._seed, folder)
        else:
            materialise(self._config, folder)
        return {**describe_model(folder), **counts}


def run(context: StageContext) -> StageResult:
    """Builds, converts or downloads the base model."""
    config = context.config
    is_builtin = kind_of(config.model.path) == "builtin"
    pool = context.cluster.pool(
        ActorSpec(
            name="modeler",
            actor_class=Modeler,
            args=(config.model, config.seed),
            num_cpus=WARMUP_CPUS if is_builtin else config.cluster.actor_cpus,
        )
    )
    target = storage.join(context.attempt, "model")
    manifest = context.input("ingest", "manifest")
    ((_, counts),) = pool.map({"model": (manifest, target)}, "build")
    context.cluster.close_pool("modeler")
    line = f"{counts['architecture']}, {counts['parameters']:,} parameters from {config.model.path}"
    if "warmup_tokens" in counts:
        line += (
            f"; warmed up on {counts['warmup_tokens']:,} tokens, loss "
            f"{counts['warmup_first_loss']:.2f} -> {counts['warmup_last_loss']:.2f}"
        )
    return StageResult(outputs={"model": "model"}, counts=counts, lines=(line,))
