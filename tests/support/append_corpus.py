"""An influence stage whose trainings are made up, and a corpus that is another afterwards.

The losses come from hashes, so that every number can be told from every other.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from check_runs import Run
from influence_corpus import TASKS, influence_config
from ingest_builders import write_lines

from actors.cluster import Cluster
from actors.influence.analysis import analyse
from actors.influence.appender import draw_appended
from actors.influence.designer import draw_design
from actors.pipeline import STAGES, stage_inputs
from actors.stage import StageContext
from system import storage
from system.config import SourceConfig
from system.data.corpus import Corpus
from system.examples.planted import planted_world
from system.influence.append.earlier import APPENDS_TO, EarlierResult
from system.influence.design.design import Design
from system.influence.design.interventions import active_rows
from system.influence.estimate.matrix import EffectMatrix
from system.progress import Progress
from system.rundir import RunDir
from system.schema import SCORES
from system.training.plan import read_plan

FOURTH, FIFTH = "place", "weather"
INFLUENCE = next(stage for stage in STAGES if stage.name == "influence")


def source(category: str, file: str = "", *, has_answers: bool = False) -> SourceConfig:
    pattern = "(.+)" if has_answers else None
    return SourceConfig(path=f"{file or category}.jsonl", category=category, answer_pattern=pattern)


class Grown(Run):
    """Three categories measured (losses made up), then a corpus that is another."""

    def __init__(self, root: Path, **influence: object) -> None:
        super().__init__(root)
        tasks = {task.name: task for task in planted_world(0).tasks}
        for name in (FOURTH, FIFTH):
            write_lines(root / "data" / f"{name}.jsonl", planted_world(0).rows(tasks[name], 160))
        lines = (root / "data" / "size.jsonl").read_bytes().splitlines()
        write_lines(root / "data" / "size-left.jsonl", lines[:70])
        write_lines(root / "data" / "size-split.jsonl", lines[70:])
        self.config = influence_config(root, **influence)
        if self.config.influence.metric == "accuracy":
            sources = tuple(source(task, has_answers=True) for task in TASKS)
            self.config = self.config.model_copy(update={"sources": sources})
        self.prepare()
        self.first = self.measure()

    def prepare(self, *sources: SourceConfig) -> None:
        """The stages before influence, on these sources."""
        if sources:
            influence = self.config.influence.model_copy(update={"append": True})
            update = {"sources": sources, "influence": influence}
            self.config = self.config.model_copy(update=update)
        self.ingest()
        self.model()
        self.tag()

    def measure(self) -> str:
        """An influence attempt, committed: everything but the trainings is real."""

        def fill(uri: str) -> None:
            context = self.context(uri)
            appended = context.appends_to is not None
            design = draw_appended(context) if appended else draw_design(context)
            self.make_up(context, design)

        self.commit("influence", {"design": "design.json"}, fill)
        return self.records["influence"].fingerprint

    def context(self, uri: str) -> StageContext:
        inputs = stage_inputs(INFLUENCE, self.config, self.records)
        return StageContext(
            config=self.config,
            run_dir=RunDir(self.config.run_dir),
            attempt=uri,
            upstream=self.records,
            progress=Progress(is_terminal=False),
            cluster=Cluster(self.config.cluster),
            appends_to=inputs.get(APPENDS_TO),
        )

    def make_up(self, context: StageContext, design: Design) -> None:
        """Training records with the tokens that the masks leave, and losses by hash."""
        heldout = storage.read_table(storage.join(context.attempt, "heldout.arrow"))
        for run in design.all_runs:
            kind = run.kind if run.kind in ("append", "warm") else "main"
            uri = storage.join(context.attempt, "plans", f"r{run.replication:02d}-{kind}.arrow")
            plan = read_plan(uri)
            rows = np.flatnonzero(active_rows(plan, run, design))
            tokens = int(plan.lengths(rows).sum())
            value = {"trained_tokens": tokens, "seconds": 1.0, "first_loss": 2.0, "last_loss": 1.0}
            storage.write_json(storage.join(context.attempt, "units", f"{run.name}.json"), value)
            name = design.sources[run.source] if run.source >= 0 else ""
            table = made_up_scores(heldout, f"{run.replication} {run.kind} {name}")
            uri = storage.join(context.attempt, "scores", f"{run.name}.parquet")
            if run.kind != "warm":
                storage.write_table(uri, table)

    def earlier(self) -> EarlierResult:
        return EarlierResult(RunDir(self.config.run_dir).stage_uri("influence"), self.first)

    def corpus(self) -> Corpus:
        return Corpus.open(self.output("tag", "manifest"))


def made_up_scores(heldout: pa.Table, key: str) -> pa.Table:
    """Scores of held-out rows that depend on the run, the target and the row alone."""
    rows = heldout.to_pylist()
    tokens = [sum(row["response_mask"][1:]) if "response_mask" in row else 1 for row in rows]
    noise = [
        int(hashlib.sha256(f"{key} {row['category']} {row['id']}".encode()).hexdigest()[:8], 16)
        for row in rows
    ]
    columns = {
        "id": [row["id"] for row in rows],
        "category": [row["category"] for row in rows],
        "nll": [count * (2.0 + value / 2**32) for count, value in zip(tokens, noise, strict=True)],
        "num_tokens": tokens,
    }
    metadata = {"instructmix.seconds": "1.0", "instructmix.rejected": "{}"}
    return pa.table(columns, schema=SCORES).replace_schema_metadata(metadata)


def design_at(uri: str) -> Design:
    """The design that an attempt drew."""
    return Design.from_json(storage.read_json(storage.join(uri, "design.json")), uri)


def matrices(run: Grown, uri: str) -> dict[str, EffectMatrix]:
    """The effects of an attempt per example, by direction."""
    design = design_at(uri)
    context = replace(
        run.context(uri), appends_to=None if design.append is None else design.append.earlier
    )
    found = analyse(context, design).largest.estimates["examples"]
    return {direction: estimate.matrix for direction, estimate in found.items()}
