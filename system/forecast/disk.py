"""Estimates the largest disk space that a run uses at one time.

Weights are counted by parameters; an optimiser adds two moments for every trained parameter.  The
ledger limits the number of intervention checkpoints that wait for scoring.  The models of all arms
of stage `evaluate` are on the disk together until they are scored.
"""

from __future__ import annotations

import re
import shutil
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
from system.models.weights import count_parameters, read_tensors

_FLOAT32 = 4
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Number of parameters, from the headers of the files."""

    parameters: int
    adapted: int | None
    """Parameters of the adapters of the final training; None if all weights are trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPart:
    """Files of one kind that a stage writes."""

    name: str
    size_bytes: int
    stage: str
    stays: bool
    """Whether they are still there when the next stage starts."""


def model_size(model_dir: Path, lora: LoraConfig | None) -> ModelSize:
    """Counts parameters; reads only the headers of the safetensors files.

    Args:
        model_dir: local Hugging Face directory.
        lora: adapters of the training; None: all weights are trained.
    """
    adapted = None
    targets = "|".join(map(re.escape, lora.targets)) if lora else "(?!)"
    is_target = re.compile(rf"(^|\.)({targets})\.weight$")
    tensors = read_tensors(model_dir)
    if lora is not None:
        adapted = sum(
            lora.rank * sum(shape)
            for name, (_, shape) in tensors.items()
            if is_target.search(name) and len(shape) == 2
        )
    return ModelSize(parameters=count_parameters(tensors), adapted=adapted)


def disk_parts(
    config: RunConfig,
    model: ModelSize,
    corpus: Corpus | None,
    *,
    num_categories: int | None,
    train_rows: int | None,
) -> list[DiskPart]:
    """The files that the stages after `model` write into the run directory.

    Args:
        config: configuration of the run.
        model: size of the base model.
        corpus: the corpus, from which the selection is estimated; None if there is none yet.
        num_categories: number of categories; None if unknown yet.
        train_rows: rows of the final training; None if unknown yet.
    """
    influence, evaluate, cluster = config.influence, config.evaluate, config.cluster
    weights = model.parameters * _FLOAT32
    exported = model.parameters * _DTYPE_BYTES[config.model.dtype]
    trained = model.parameters if model.adapted is None else model.adapted
    state = 3 * trained * _FLOAT32
    at_once = open_checkpoints(cluster.num_tuners, cluster.num_scorers)
    replications = most_replications(influence)
    # `auto` tries its designs one after the other, so the largest one counts, not the sum.
    designs = influence.auto.designs if influence.estimator == "auto" else (influence.design,)
    warm = max(_num_warm(influence, name) for name in designs) * replications
    scored = replications * max(
        _num_scored(influence, name, num_categories or 0) for name in designs
    )
    # Without keep_checkpoints a checkpoint is deleted as soon as it is scored.
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
            # One more than is kept: the new one is written before the oldest is deleted.
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
    """Checkpoints of a replication's warm-up that are kept until the stage is finished."""
    estimator = ESTIMATORS[design]
    # First-order estimators keep Adam's second moments beside the weights of every checkpoint.
    return estimator.is_warmed * (
        2 * influence.gradient_checkpoints if estimator.is_first_order else 1
    )


def _num_scored(influence: InfluenceConfig, design: str, num_categories: int) -> int:
    """Checkpoints of one replication that are scored, at all doses."""
    runs = ESTIMATORS[design].all_runs(
        num_categories, influence.directions, influence.gradient_checkpoints
    )
    at_doses = at_every_dose(runs, influence.doses, lambda *_: influence.largest_dose)
    return sum(kind not in UNSCORED for kind, _, _ in at_doses)


def peak_bytes(parts: Sequence[DiskPart], done: Collection[str]) -> int:
    """Largest number of bytes that the remaining stages add to the disk at one time."""
    remaining = [part for part in parts if part.stage not in done]
    permanent = sum(part.size_bytes for part in remaining if part.stays)
    temporary: dict[str, int] = {}
    for part in remaining:
        if not part.stays:
            temporary[part.stage] = temporary.get(part.stage, 0) + part.size_bytes
    return permanent + max(temporary.values(), default=0)


def corpus_bytes(corpus: Corpus) -> int | None:
    """Bytes of all shards; None if the corpus is not on a local disk."""
    paths = [storage.local_path(corpus.shard_uri(shard)) for shard in corpus.manifest.shards]
    if any(path is None for path in paths):
        return None
    return sum(path.stat().st_size for path in paths if path is not None)


def mean_row_bytes(corpus: Corpus) -> float | None:
    """Mean bytes of a row in the shards; None if they are not local or there are no rows."""
    size, rows = corpus_bytes(corpus), sum(shard.rows for shard in corpus.manifest.shards)
    return None if size is None or not rows else size / rows


def free_bytes(run_dir: str) -> int | None:
    """Free bytes on the disk of the run directory; None if it is not on a local disk."""
    path = storage.local_path(storage.absolute(run_dir))
    if path is None:
        return None
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
