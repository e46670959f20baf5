"""Influence estimators: what is recovered, and what it costs.

    python bench_influence.py --store DIR --measure retrain-reference --replications 6
    python bench_influence.py --store DIR --measure gradient branch --replications 3
    python bench_influence.py --store OTHER --data shared/data/instructions --measure ...
    python bench_influence.py --store DIR OTHER --report influence.md

A world (`influence_worlds`: planted truth, or real categories with `--data`) is made in the store;
each estimator then runs one replication after the other, in this process, scored by transformers.
Every replication is a file of its own: what is there is not measured again, so the whole can be had
in several sittings.  `retrain-reference` is `retrain` on schedules that no estimate has seen: the
truth to compare with; its halves against each other say how well it is known.

Reported for every estimator and number of replications: cost in token equivalents (forward +
backward = 1, forward = 1/3) relative to the reference; median over targets of the rank correlation
with the reference over the target's other sources, with a bootstrap interval over targets; sign
agreement with the reference, and with the truth where the construction fixes a sign; coverage of
zero by the intervals of unrelated pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from conditions import commit, versions
from influence_judge import judge, median_interval, split_ranks
from influence_worlds import World, planted, real

from system.config import InfluenceConfig
from system.influence.design.design import Design, InterventionRun
from system.influence.design.heldout import draw_targets, seeded_draw
from system.influence.design.interventions import (
    Schedule,
    active_rows,
    assemble_design,
    plan_replication,
)
from system.influence.estimate.measurements import Measurements, collect_losses, paired_differences
from system.influence.measure.first_order import gradient_task, gradients_table, predicted_scores
from system.influence.measure.gradient import checkpoint_path, differentiate, warm_up
from system.influence.measure.proxy import ProxyModel
from system.models.base import load_model, load_tokenizer
from system.scoring.score import score_reference
from system.training.settings import TrainSettings

NAMES = (
    "retrain-reference", "retrain", "branch", "random-design", "gradient", "gradient-1",
    "gradient-4", "gradient-8192", "gradient-third-dose", "gradient-short",
)  # fmt: skip
REFERENCE, REFERENCE_SEED, ESTIMATE_SEED = "retrain-reference", 1000, 1


@dataclass(frozen=True)
class Measured:
    """Replications of one estimator."""

    measurements: Measurements
    trained_tokens: float
    """Forward and backward, with or without a step."""
    scored_tokens: float
    """Forward."""
    seconds: float

    @property
    def equivalents(self) -> float:
        """Forward + backward token equivalents."""
        return self.trained_tokens + self.scored_tokens / 3.0

    def first(self, count: int) -> Measured:
        """The same with the first replications only."""
        share = count / self.measurements.num_replications
        return Measured(
            self.measurements.replications(list(range(count))),
            self.trained_tokens * share,
            self.scored_tokens * share,
            self.seconds * share,
        )


class Experiment(NamedTuple):
    """One replication, ready to be run."""

    design: Design
    schedule: Schedule
    heldout: pa.Table
    settings: TrainSettings
    config: InfluenceConfig


def setting(name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """What a setting changes in a world's base configuration."""
    if not name.startswith("gradient"):
        return {"estimator": name.removesuffix("-reference")}
    changed = {
        "gradient-1": {"gradient_checkpoints": 1},
        "gradient-4": {"gradient_checkpoints": 4},
        "gradient-8192": {"projection_dim": 8192},
        "gradient-third-dose": {"dose_rows": knobs["dose_rows"] // 3},
        "gradient-short": {"warm_rows_per_category": knobs["warm_rows_per_category"]},
    }
    base = {"estimator": "gradient", "warm_rows_per_category": knobs["rows_per_category"]}
    return base | changed.get(name, {})


class Bench:
    """A world with its model, ready for runs."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self.tokenizer = load_tokenizer(world.model.path)
        self.proxy = ProxyModel(world.model.path, device="cpu", trust_remote_code=False)

    def measure(self, name: str, replications: int, run_seed: int) -> Measured:
        """Replications of a setting, one after the other."""
        return joined([self.replication(name, k, run_seed) for k in range(replications)])

    def replication(self, name: str, index: int, run_seed: int) -> Measured:
        """One replication."""
        knobs = self.world.knobs | {"replications": 1} | setting(name, self.world.knobs)
        config = InfluenceConfig.model_validate(knobs)
        max_length = self.world.model.max_length
        draw = seeded_draw(self.world.corpus, self.tokenizer, max_length)
        sources = tuple(self.world.corpus.categories)
        heldout, targets, _ = draw_targets(
            run_seed=0,
            sources=sources,
            num_rows=config.heldout_rows,
            draw=draw,
            external={},
            tokenizer=self.tokenizer,
            max_length=max_length,
        )
        schedule = plan_replication(
            index,
            run_seed=run_seed,
            sources=sources,
            config=config,
            max_length=max_length,
            draw=draw,
        )
        design = assemble_design(
            run_seed=run_seed,
            config=config,
            sources=sources,
            targets=targets,
            schedules=[schedule],
            heldout_dropped={},
        )
        settings = TrainSettings.from_influence(config, self.world.model, schedule.replication.seed)
        start = time.perf_counter()
        run = self._gradients if config.estimator == "gradient" else self._trainings
        scores, trained, scored = run(Experiment(design, schedule, heldout, settings, config))
        measured = paired_differences(design, collect_losses(design, scores), "remove")
        return Measured(measured, trained, scored, time.perf_counter() - start)

    def _trainings(self, work: Experiment) -> tuple[dict[str, pa.Table], int, int]:
        scores, tokens = {}, 0
        checkpoint, warm_uri = str(self.folder / "checkpoint"), str(self.folder / "warm")
        for run in work.design.all_runs:
            plan = work.schedule.warm if run.kind == "warm" else work.schedule.plan
            assert plan is not None
            is_branch = work.config.estimator == "branch" and run.kind != "warm"
            # A start is kept in memory by its name: replications need names of their own.
            start = f"{warm_uri}-{work.schedule.replication.seed}"
            mask = active_rows(plan, run, work.design)
            stats = self.proxy.tune(plan, mask, work.settings, start if is_branch else None)
            tokens += stats.trained_tokens
            if run.kind == "warm":
                self.proxy.save(start)
                continue
            self.proxy.save(checkpoint)
            scores[run.name] = score_reference(load_model(checkpoint), work.heldout).table
        return scores, tokens, len(scores) * num_tokens(work.heldout)

    def _gradients(self, work: Experiment) -> tuple[dict[str, pa.Table], int, int]:
        assert work.schedule.warm is not None
        folder = self.folder / "warm-checkpoints"
        folder.mkdir(exist_ok=True)
        parts = work.config.gradient_checkpoints
        stats = warm_up(self.proxy.restored(), work.schedule.warm, work.settings, parts, folder)
        tables, tokens = {}, stats.trained_tokens
        for part in range(parts):
            run = InterventionRun(replication=0, kind="gradient", source=part)
            found = differentiate(
                self.proxy.restored(),
                work.schedule.plan,
                gradient_task(work.schedule.plan, work.design, run, work.config.projection_dim),
                work.heldout,
                work.settings,
                checkpoint_path(folder, part),
            )
            tables[run.name] = gradients_table(work.heldout, found)[0]
            tokens += found.num_tokens
        return predicted_scores(work.design, tables), tokens, 0


def num_tokens(tokens: pa.Table) -> int:
    """Prompts included."""
    return sum(len(row) for row in tokens.column("input_ids").to_pylist())


def joined(parts: list[Measured]) -> Measured:
    """Replications side by side."""
    rows = zip(*(part.measurements.differences for part in parts), strict=True)
    differences = tuple(np.concatenate(row_parts) for row_parts in rows)
    return Measured(
        replace(parts[0].measurements, differences=differences),
        sum(part.trained_tokens for part in parts),
        sum(part.scored_tokens for part in parts),
        sum(part.seconds for part in parts),
    )


def stored(store: Path, name: str) -> list[Measured]:
    """Replications of a setting that have been measured, in order."""
    paths = sorted(store.glob(f"measured-{name}.[0-9]*.pickle"))
    return [pickle.loads(path.read_bytes()) for path in paths]


def measure_missing(bench: Bench, store: Path, name: str, replications: int) -> None:
    """Measures the replications of a setting that are not in the store."""
    seed = REFERENCE_SEED if name == REFERENCE else ESTIMATE_SEED
    for index in range(replications):
        path = store / f"measured-{name}.{index:03d}.pickle"
        if not path.exists():
            found = bench.replication(name, index, seed)
            path.with_suffix(".part").write_bytes(pickle.dumps(found))
            os.replace(path.with_suffix(".part"), path)
            print(f"{name} {index}: {found.equivalents:,.0f} tokens, {found.seconds:.0f} s")


def results(store: Path) -> dict[str, Any]:
    """Everything that is in the store, judged."""
    world = json.loads((store / "world.json").read_text())
    parts = stored(store, REFERENCE)
    reference = joined(parts)
    effect_RTS = reference.measurements.mean_RTS / reference.measurements.dose_S
    own_T = reference.measurements.own_T
    ceiling = {
        size: median_interval(split_ranks(effect_RTS, own_T, size))
        for size in range(1, len(parts) // 2 + 1)
    }
    rows = []
    for name in NAMES:
        found = stored(store, name) if name != REFERENCE else []
        for count in range(1, len(found) + 1):
            part = joined(found).first(count)
            rows.append(
                {"setting": name, "replications": count, **judge(part, reference, world["truth"])}
            )
    return {
        "world": world["name"],
        "text": world["text"],
        "parameters": world["parameters"],
        "commit": world["commit"],
        "reference_replications": len(parts),
        "reference_equivalents": reference.equivalents,
        "reference_seconds": reference.seconds,
        "ceiling": ceiling,
        "rows": rows,
    }


def measured_with() -> dict[str, str]:
    """Where and with what."""
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with others, one thread",
        "versions": ", ".join(f"{name} {number}" for name, number in versions("torch").items()),
    }


def main() -> None:
    """Measures what is asked for, reports what is there."""
    from influence_report import write_report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, nargs="+", required=True, help="a folder a world")
    parser.add_argument("--data", type=Path, help="real instruction data (see the worlds)")
    parser.add_argument("--measure", nargs="*", choices=NAMES, default=[])
    parser.add_argument("--replications", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="Markdown file; JSON goes beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        store = arguments.store[0]
        store.mkdir(parents=True, exist_ok=True)
        bench = open_bench(store, arguments.data, arguments.seed)
        for name in arguments.measure:
            measure_missing(bench, store, name, arguments.replications)
    if arguments.report:
        write_report(
            arguments.report, measured_with(), [results(store) for store in arguments.store]
        )


def open_bench(store: Path, data_dir: Path | None, seed: int) -> Bench:
    """The planted world, or that of real data, with what a report says of it."""
    world = planted(store, seed) if data_dir is None else real(store, data_dir, seed)
    bench = Bench(store, world)
    described = {
        "name": world.name,
        "text": world.text,
        "truth": world.truth,
        "parameters": bench.proxy.restored().num_parameters(),
        "commit": commit(),
    }
    (store / "world.json").write_text(json.dumps(described))
    return bench


if __name__ == "__main__":
    main()
