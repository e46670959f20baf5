"""What lies in the run directory at once, and whether it fits.

Weights count by their parameters; an optimiser keeps two moments of every trained parameter.  The
intervention checkpoints between training and scoring are bounded by the ledger, and the arms of
the evaluation lie there together until they are measured.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from system import storage
from system.config import InfluenceConfig, LoraConfig, RunConfig
from system.data.corpus import Corpus
from system.influence.design.cost import most_replications
from system.influence.design.doses import at_every_dose
from system.influence.design.estimators import ESTIMATORS, UNSCORED
from system.influence.measure.ledger import open_checkpoints

_FLOAT32 = 4
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters, as the files' headers say."""

    parameters: int
    adapted: int | None
    """Parameters of the adapters of the final training; None where all weights are trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPart:
    """Something that takes room."""

    name: str
    size_bytes: int
    stage: str
    stays: bool
    """Still there when the next stage starts."""


def model_size(model_dir: Path, lora: LoraConfig | None) -> ModelSize:
    """Reads shapes from the safetensors headers alone.

    Args:
        model_dir: local Hugging Face directory.
        lora: adapters of the training.
    """
    parameters = adapted = 0
    targets = "|".join(map(re.escape, lora.targets)) if lora else "(?!)"
    is_target = re.compile(rf"(^|\.)({targets})\.weight$")
    for file in sorted(model_dir.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            size = 1
            for side in tensor["shape"]:
                size *= side
            parameters += size
            if lora is not None and is_target.search(name) and len(tensor["shape"]) == 2:
                adapted += lora.rank * sum(tensor["shape"])
    return ModelSize(parameters=parameters, adapted=None if lora is None else adapted)


def disk_parts(
    config: RunConfig,
    model: ModelSize,
    corpus: Corpus | None,
    *,
    num_categories: int | None,
    train_rows: int | None,
) -> list[DiskPart]:
    """What the stages from `model` on put into the run directory.

    Args:
        config: of the run.
        model: its size.
        corpus: once it is there; the selection is estimated from it.
        num_categories: once known.
        train_rows: of the final training, once known.
    """
    influence, evaluate, cluster = config.influence, config.evaluate, config.cluster
    weights = model.parameters * _FLOAT32
    exported = model.parameters * _DTYPE_BYTES[config.model.dtype]
    trained = model.parameters if model.adapted is None else model.adapted
    state = 3 * trained * _FLOAT32
    at_once = open_checkpoints(cluster.num_tuners, cluster.num_scorers)
    replications = most_replications(influence)
    # `auto` tries its designs one after the other.
    designs = influence.auto.designs if influence.estimator == "auto" else (influence.design,)
    warm = max(_num_warm(influence, name) for name in designs) * replications
    scored = replications * max(
        _num_scored(influence, name, num_categories or 0) for name in designs
    )
    if num_categories is not None:
        at_once = scored if influence.keep_checkpoints else min(at_once, scored)
    arms = len(evaluate.arms) * evaluate.seeds
    parts = [
        DiskPart(
            name=f"{at_once + warm} intervention checkpoints",
            size_bytes=(at_once + warm) * weights,
            stage="influence",
            stays=influence.keep_checkpoints,
        ),
        DiskPart(
            name=f"{config.train.keep_checkpoints + 1} training checkpoints with optimiser",
            size_bytes=(config.train.keep_checkpoints + 1) * state,
            stage="train",
            stays=True,
        ),
        DiskPart(name="the trained model", size_bytes=exported, stage="train", stays=True),
        DiskPart(
            name=f"{arms} models of arms and 2 checkpoints",
            size_bytes=arms * exported + 2 * state,
            stage="evaluate",
            stays=False,
        ),
    ]
    row_bytes = None if corpus is None else mean_row_bytes(corpus)
    if row_bytes is not None and train_rows is not None:
        parts.append(
            DiskPart(
                name="selection", size_bytes=round(row_bytes * train_rows), stage="select",
                stays=True,
            )
        )  # fmt: skip
    return parts


def _num_warm(influence: InfluenceConfig, design: str) -> int:
    """States of a replication's warm-up that are kept until the stage is done."""
    estimator = ESTIMATORS[design]
    # First order keeps Adam's second moments beside the weights, at every checkpoint.
    return estimator.is_warmed * (
        2 * influence.gradient_checkpoints if estimator.is_first_order else 1
    )


def _num_scored(influence: InfluenceConfig, design: str, num_categories: int) -> int:
    """Checkpoints of a replication that are scored, at all doses."""
    runs = ESTIMATORS[design].all_runs(
        num_categories, influence.directions, influence.gradient_checkpoints
    )
    at_doses = at_every_dose(runs, influence.doses, lambda *_: influence.largest_dose)
    return sum(kind not in UNSCORED for kind, _, _ in at_doses)


def peak_bytes(parts: Sequence[DiskPart], done: Collection[str]) -> int:
    """Most bytes that the stages still to run add to the disk at once."""
    left = [part for part in parts if part.stage not in done]
    staying = sum(part.size_bytes for part in left if part.stays)
    passing: dict[str, int] = {}
    for part in left:
        if not part.stays:
            passing[part.stage] = passing.get(part.stage, 0) + part.size_bytes
    return staying + max(passing.values(), default=0)


def corpus_bytes(corpus: Corpus) -> int | None:
    """Bytes of the shards of a local corpus."""
    paths = [storage.local_path(corpus.shard_uri(shard)) for shard in corpus.manifest.shards]
    if any(path is None for path in paths):
        return None
    return sum(path.stat().st_size for path in paths if path is not None)


def mean_row_bytes(corpus: Corpus) -> float | None:
    """Bytes of a row in the shards; None where they are not local, or there is none."""
    size, rows = corpus_bytes(corpus), sum(shard.rows for shard in corpus.manifest.shards)
    return None if size is None or not rows else size / rows


def free_bytes(run_dir: str) -> int | None:
    """Free bytes where the run directory is or will be; None where that is no local disk."""
    path = storage.local_path(storage.absolute(run_dir))
    if path is None:
        return None
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
