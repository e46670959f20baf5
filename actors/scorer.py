"""The actor that keeps one running vLLM engine and exchanges its weights between calls.

    tagger ──────┐                              one pool for all stages that score, made on first
    influencer ──┼── submit ──> Scorer, Scorer  use and ended by the driver before training needs
    selector ────┤                              the CPUs; a call blocks its actor until answered
    evaluator ───┘

The pool replaces a dead scorer and gives its work unit to another: every method can be repeated.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from actors.pool import ActorPool, ActorSpec
from actors.stage import StageContext
from system import storage
from system.data.corpus import Corpus
from system.influence.design.accuracy_targets import score_answers
from system.scoring.answers import Generated
from system.scoring.engine import Engine, EngineSettings
from system.scoring.score import Scored, score_tokens
from system.selection.difficulty import measure_rows
from system.selection.scores import Block, write_scores

POOL = "scorer"


class Scorer:
    """One engine.  Its only state is the set of weights that is loaded."""

    def __init__(self, model_uri: str, settings: EngineSettings) -> None:
        self._copy = storage.LocalCopy(model_uri)
        self._base_dir = self._copy.path
        self._engine = Engine(self._base_dir, settings)
        self._loaded = _weights_key(self._base_dir)

    def score(self, weights_uri: str | None, tokens: pa.Table) -> Scored:
        """Loads the weights (None: the base model's), scores a TOKENS table."""
        self._load(weights_uri)
        return score_tokens(self._engine, tokens)

    def answer(self, weights_uri: str | None, questions: pa.Table, max_new_tokens: int) -> Scored:
        """Loads the weights, answers a QUESTIONS table greedily; wrong answers count as loss 1."""
        self._load(weights_uri)
        prompts = questions.column("input_ids").to_pylist()
        stops = questions.column("stop_token_ids")[0].as_py()
        return score_answers(self._engine.generate(prompts, max_new_tokens, stops), questions)

    def measure(
        self, corpus: Corpus, block: Block, score: Literal["loss", "ifd"], attempt: str
    ) -> None:
        """Loads the base model's weights, commits the difficulty of a block of train rows."""
        self._load(None)
        table = corpus.read_shard(block.shard, ["id", "category", "messages"])
        rows = table.slice(block.start, block.rows)
        engine = self._engine
        scores = measure_rows(engine, engine.tokenizer, rows, score, engine.max_length)
        write_scores(attempt, block, scores)

    def choose(
        self, weights_uri: str | None, prompts: list[list[int]], candidates: list[list[int]]
    ) -> np.ndarray:
        """Loads the weights, gives the [B, K] log-likelihoods of the candidates."""
        self._load(weights_uri)
        return self._engine.choose(prompts, candidates)

    def generate(
        self,
        weights_uri: str | None,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_token_ids: list[int],
    ) -> Generated:
        """Loads the weights, answers the prompts greedily."""
        self._load(weights_uri)
        return self._engine.generate(prompts, max_new_tokens, stop_token_ids)

    def _load(self, weights_uri: str | None) -> None:
        uri = self._base_dir if weights_uri is None else weights_uri
        if storage.local_path(uri) is not None:
            self._reload(uri)
            return
        with tempfile.TemporaryDirectory(prefix="instructmix-weights-") as copy:
            self._reload(str(storage.download_directory(uri, Path(copy))))

    def _reload(self, weights_dir: str) -> None:
        key = _weights_key(weights_dir)
        if key != self._loaded:
            self._loaded = ()  # if the reload fails, the engine has no usable weights
            self._engine.reload(weights_dir)
            self._loaded = key


def scorer_pool(context: StageContext) -> ActorPool:
    """The pool of scorers that all stages of this driver share."""
    config = context.config
    return context.cluster.pool(
        ActorSpec(
            name=POOL,
            actor_class=Scorer,
            args=(context.input("model", "model"), engine_settings(context)),
            num_actors=config.cluster.num_scorers,
            num_cpus=config.cluster.actor_cpus,
            num_gpus=config.cluster.scorer_gpus,
            max_attempts=config.cluster.max_attempts,
        )
    )


def engine_settings(context: StageContext) -> EngineSettings:
    """The engine settings of the configuration."""
    config = context.config
    use_gpu = config.cluster.scorer_gpus > 0
    return EngineSettings(
        dtype=config.model.dtype,
        max_length=config.model.max_length,
        memory_gib=config.cluster.engine_memory_gib,
        gpu_memory_utilization=config.cluster.gpu_memory_utilization,
        use_gpu=use_gpu,
        logits_memory_mib=2048 if use_gpu else 512,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.seed,
    )


def _weights_key(weights_dir: str) -> tuple[tuple[str, int, int, int], ...]:
    """Identifies a set of weight files, even if a path was overwritten."""
    key = []
    for path in sorted(Path(weights_dir).glob("*.safetensors")):
        info = path.stat()
        key.append((str(path), info.st_ino, info.st_size, info.st_mtime_ns))
    return tuple(key)
