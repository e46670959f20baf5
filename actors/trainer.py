"""Stage `train`: writes a plan of the selected examples and trains the model on it.

The training itself is `actors.fit`, which the stage `evaluate` also uses for its arms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from actors.fit import fit
from actors.stage import StageContext, StageResult
from system import schema, storage
from system.data.corpus import Corpus
from system.errors import DataError
from system.influence.design.heldout import seeded_draw
from system.influence.design.interventions import seed_of
from system.models.base import load_tokenizer
from system.models.chat import encode_table
from system.rundir import fingerprint
from system.training.identity import file_hash
from system.training.log import lost_trackers
from system.training.plan import TrainPlan, build_plan, write_plan
from system.training.records import TrainJob
from system.training.settings import TrainSettings

_HELD_OUT_BATCH = 64
"""Rows per step of the held-out plan; the number does not change the loss."""
_SOURCES = {
    "data, SHA-256 of manifest.json": ("tag", "manifest"),
    "mix, SHA-256 of mix.json": ("solve", "mix"),
    "curriculum, SHA-256 of curriculum.json": ("curriculum", "curriculum"),
}
"""Files whose hashes the model card lists: line of the card -> stage and output."""


def run(context: StageContext) -> StageResult:
    """Stage `train`: encodes the selection, writes the plan, trains, and exports the model."""
    config = context.config
    manifest = storage.read_json(context.input("select", "manifest"))
    folder = context.input("select", "selection")
    tables = (
        schema.check_table(
            storage.read_table(storage.join(folder, file["path"])), schema.SELECTION, file["path"]
        )
        for file in manifest["files"]
    )
    model_dir = context.input("model", "model")
    plan, dropped = plan_selection(tables, model_dir, context)
    plan_uri = storage.join(context.attempt, "plan.arrow")
    write_plan(plan_uri, plan)
    changes: dict[str, Any] = {}
    if config.train.keep_best:
        heldout_uri = storage.join(context.attempt, "heldout.arrow")
        write_plan(heldout_uri, plan_held_out(model_dir, context))
        changes = {"heldout_uri": heldout_uri, "export": config.train.export}
    job = make_job("train", plan_uri, context.attempt, context, seed=config.seed, **changes)
    (model,) = fit([job], context)
    stages = list(dict.fromkeys(plan.table.column("stage").to_pylist()))
    counts = {
        "rows": plan.table.num_rows,
        "dropped": dropped,
        "rows_by_category": dict(Counter(plan.table.column("category").to_pylist())),
        "steps": model.num_steps,
        "tokens": model.num_tokens,
        "response_tokens": model.num_labels,
        "first_loss": model.first_loss,
        "last_loss": model.last_loss,
        "step_seconds": model.seconds,
        "plan_sha256": plan.sha256,
        "exported_step": model.exported_step,
        "heldout_loss": model.heldout_loss,
    }
    rate = model.num_tokens / max(model.seconds, 1e-9)
    lines = [
        f"{plan.table.num_rows:,} rows in {model.num_steps:,} steps over "
        f"{len(stages)} stages ({', '.join(stages)})",
        f"loss {model.first_loss:.3f} -> {model.last_loss:.3f} nats per response token "
        "(first and last tenth of the steps)",
        f"{model.num_tokens:,} tokens at {rate:,.0f} tokens/s",
    ]
    if model.heldout_loss is not None:
        lines.append(
            f"exported the weights after step {model.exported_step:,}; held-out loss "
            f"{model.heldout_loss:.3f} nats per response token"
        )
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        lines.append(f"left out: {reasons}")
    if config.train.log_to:
        lines += [
            f"tracker {name} failed {why}; metrics.jsonl has every step"
            for name, why in lost_trackers(model.metrics_uri).items()
        ]
    outputs = {
        "model": "model",
        "metrics": "metrics.jsonl",
        "plan": "plan.arrow",
        "checkpoints": "checkpoints",
    }
    return StageResult(outputs=outputs, counts=counts, lines=tuple(lines))


def plan_selection(
    tables: Iterator[pa.Table] | Sequence[pa.Table], model_dir: str, context: StageContext
) -> tuple[TrainPlan, dict[str, int]]:
    """The plan of SELECTION tables in training order, and the number of left-out rows by reason."""
    config = context.config
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    parts, stages = [], []
    dropped: Counter[str] = Counter()
    for table in tables:
        for stage, rows in _by_stage(table):
            tokens, lost = encode_table(rows, tokenizer, config.model.max_length)
            dropped.update(lost)
            parts.append(tokens)
            stages += [stage] * tokens.num_rows
    if not parts:
        raise DataError("the selection has no files: run the select stage again")
    plan = build_plan(
        pa.concat_tables(parts),
        stages,
        batch_size=config.train.batch_size,
        max_length=config.model.max_length,
        packing=config.train.packing,
    )
    return plan, dict(dropped)


def plan_held_out(model_dir: str, context: StageContext) -> TrainPlan:
    """The plan of held-out rows: of the `estimate` split, drawn by the hash of their ids.

    Raises:
        DataError: the `estimate` split is empty.
    """
    config = context.config
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
    draw = seeded_draw(corpus, tokenizer, config.model.max_length)
    seed = seed_of(config.seed, "train", "heldout")
    parts = [
        draw("estimate", category, config.train.heldout_rows, seed)[0]
        for category in corpus.categories
    ]
    tokens = pa.concat_tables(parts)
    if tokens.num_rows == 0:
        raise DataError(
            "train.keep_best measures the loss on the estimate split, but this split is empty: "
            "raise ingest.estimate_share, or set `train.keep_best: false`"
        )
    return build_plan(
        tokens,
        ["held out"] * tokens.num_rows,
        batch_size=_HELD_OUT_BATCH,
        max_length=config.model.max_length,
        packing=config.train.packing,
    )


def make_job(
    name: str, plan_uri: str, output_uri: str, context: StageContext, *, seed: int, **changes: Any
) -> TrainJob:
    """A training job with the settings of the configuration.

    Args:
        name: name of the job in progress lines and trackers.
        plan_uri: a plan that was written.
        output_uri: directory of this job alone.
        context: of the calling stage.
        seed: of adapters and dropout.
        changes: other fields of TrainJob, for instance `keep_checkpoints=0`.
    """
    config = context.config
    hashes = {
        line: file_hash(context.input(stage, output))
        for line, (stage, output) in _SOURCES.items()
        if stage in context.upstream
    }
    hashes |= {
        f"fingerprint of stage {stage}": record.fingerprint
        for stage, record in context.upstream.items()
    }
    hashes["fingerprint of the configuration"] = fingerprint(config.to_hash())
    values: dict[str, Any] = {
        "name": name,
        "plan_uri": plan_uri,
        "output_uri": output_uri,
        "settings": TrainSettings.from_train(config.train, config.model, seed),
        "model_dir": context.input("model", "model"),
        "base_model": config.without_secrets(config.model.path),
        "export_dtype": config.model.dtype,
        "checkpoint_every": config.train.checkpoint_every,
        "keep_checkpoints": config.train.keep_checkpoints,
        "trust_remote_code": config.model.trust_remote_code,
        "log_to": config.train.log_to,
        "hashes": hashes,
    }
    return TrainJob(**(values | changes))


def _by_stage(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Splits the table into runs of rows of the same curriculum stage, in order."""
    names = table.column("stage").to_pylist()
    start = 0
    for row in range(1, len(names) + 1):
        if row == len(names) or names[row] != names[start]:
            yield names[start], table.slice(start, row - start)
            start = row
