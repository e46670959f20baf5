"""Estimators on planted truth: what is recovered, and what it costs.

    python bench_influence.py --store DIR --measure retrain-reference --replications 6
    python bench_influence.py --store DIR --measure gradient branch --replications 3
    python bench_influence.py --store DIR --report tests/benchmarks/influence.md

A planted corpus (`system.influence.planted`) and its warm base model are made in DIR; each
estimator then runs one replication after the other, in this process, scored by transformers.  Every
replication is a file of its own: what is there is not measured again, so the whole can be had in
several sittings.  `retrain-reference` is `retrain` on schedules that no estimate has seen: the
truth to compare with, and (its halves against each other) the noise ceiling.

Reported for every estimator and number of replications: cost in token equivalents (forward +
backward = 1, forward = 1/3) relative to the reference; median over targets of the rank correlation
with the reference over the target's other sources, with a bootstrap interval over targets; sign
agreement with the reference, and with the truth where the construction fixes a sign; coverage of
zero by the intervals of unrelated pairs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import platform
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import stats

from system.config import InfluenceConfig, ModelConfig, RunConfig, SolveConfig, SourceConfig
from system.data.corpus import Corpus
from system.data.ingest import ingest_local
from system.influence.agreement import compare
from system.influence.design import Design, Unit
from system.influence.first_order import gradient_task, gradients_table, predicted_scores
from system.influence.gradient import checkpoint_path, differentiate, warm_up
from system.influence.heldout import draw_targets, seeded_draw
from system.influence.interventions import (
    Schedule,
    active_rows,
    assemble_design,
    plan_replication,
)
from system.influence.matrix import estimate_effects
from system.influence.measurements import Measurements, collect_losses, paired_differences
from system.influence.planted import planted_world
from system.influence.planted_command import MAX_LENGTH, write_planted
from system.influence.proxy import ProxyModel
from system.models.base import load_model, load_tokenizer
from system.scoring.score import score_reference
from system.training.settings import TrainSettings

SETTINGS: dict[str, dict[str, Any]] = {
    "retrain-reference": {"estimator": "retrain"},
    "retrain": {"estimator": "retrain"},
    "branch": {"estimator": "branch"},
    "random-design": {"estimator": "random-design"},
    "gradient": {"estimator": "gradient"},
    "gradient-1": {"estimator": "gradient", "gradient_checkpoints": 1},
    "gradient-4": {"estimator": "gradient", "gradient_checkpoints": 4},
    "gradient-8192": {"estimator": "gradient", "projection_dim": 8192},
    "gradient-40-rows": {"estimator": "gradient", "dose_rows": 40},
}
"""Name of a setting -> what it changes in the common configuration."""
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


class Bench:
    """A planted world with its model, ready for runs."""

    def __init__(self, folder: Path, seed: int, tasks: tuple[str, ...] = ()) -> None:
        world = planted_world(seed)
        self.truth = world.truth()
        self.folder = folder
        if not (folder / "corpus" / "manifest.json").exists():
            write_planted(folder / "world", world, num_rows=1000, seed=seed)
        self.model_dir = str(folder / "world" / "model")
        self.model_config = ModelConfig(path=self.model_dir, max_length=MAX_LENGTH)
        config = RunConfig(
            run_dir=str(folder),
            data_dir=str(folder / "world" / "data"),
            sources=tuple(
                SourceConfig(path=f"{task.name}.jsonl", category=task.name)
                for task in world.tasks
                if not tasks or task.name in tasks
            ),
            ingest={"estimate_share": 0.15, "test_share": 0.1},  # pyright: ignore
            model=self.model_config,
            solve=SolveConfig(budget=1),
        )
        if not (folder / "corpus" / "manifest.json").exists():
            ingest_local(config, str(folder / "corpus"))
        self.corpus = Corpus.open(str(folder / "corpus" / "manifest.json"))
        self.tokenizer = load_tokenizer(self.model_dir)
        self.proxy = ProxyModel(self.model_dir, device="cpu", trust_remote_code=False)

    def measure(self, name: str, replications: int, run_seed: int) -> Measured:
        """Replications of a setting, one after the other."""
        return joined([self.replication(name, k, run_seed) for k in range(replications)])

    def replication(self, name: str, index: int, run_seed: int) -> Measured:
        """One replication; the rate of learning is the planted configuration's."""
        config = InfluenceConfig(
            rows_per_category=160,
            dose_rows=120,
            heldout_rows=64,
            replications=1,
            batch_size=8,
            learning_rate=1e-3,
            warm_rows_per_category=40,
        ).model_copy(update=SETTINGS[name])
        draw = seeded_draw(self.corpus, self.tokenizer, MAX_LENGTH)
        sources = tuple(self.corpus.categories)
        heldout, targets, _ = draw_targets(
            run_seed=0,
            sources=sources,
            num_rows=config.heldout_rows,
            draw=draw,
            external={},
            tokenizer=self.tokenizer,
            max_length=MAX_LENGTH,
        )
        schedule = plan_replication(
            index,
            run_seed=run_seed,
            sources=sources,
            config=config,
            max_length=MAX_LENGTH,
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
        settings = TrainSettings.from_influence(
            config, self.model_config, schedule.replication.seed
        )
        start = time.perf_counter()
        run = self._gradients if config.estimator == "gradient" else self._trainings
        scores, trained, scored = run(design, schedule, heldout, settings, config)
        measured = paired_differences(design, collect_losses(design, scores), "remove")
        return Measured(measured, trained, scored, time.perf_counter() - start)

    def _trainings(
        self,
        design: Design,
        schedule: Schedule,
        heldout: pa.Table,
        settings: TrainSettings,
        config: InfluenceConfig,
    ) -> tuple[dict[str, pa.Table], int, int]:
        scores, tokens = {}, 0
        checkpoint, warm_uri = str(self.folder / "checkpoint"), str(self.folder / "warm")
        for unit in design.units:
            plan = schedule.warm if unit.kind == "warm" else schedule.plan
            assert plan is not None
            is_branch = config.estimator == "branch" and unit.kind != "warm"
            # A start is kept in memory by its name: replications need names of their own.
            start = f"{warm_uri}-{schedule.replication.seed}"
            mask = active_rows(plan, unit, design)
            stats = self.proxy.tune(plan, mask, settings, start if is_branch else None)
            tokens += stats.trained_tokens
            if unit.kind == "warm":
                self.proxy.save(start)
                continue
            self.proxy.save(checkpoint)
            scores[unit.name] = score_reference(load_model(checkpoint), heldout).table
        return scores, tokens, len(scores) * num_tokens(heldout)

    def _gradients(
        self,
        design: Design,
        schedule: Schedule,
        heldout: pa.Table,
        settings: TrainSettings,
        config: InfluenceConfig,
    ) -> tuple[dict[str, pa.Table], int, int]:
        assert schedule.warm is not None
        folder = self.folder / "warm-checkpoints"
        folder.mkdir(exist_ok=True)
        parts = config.gradient_checkpoints
        stats = warm_up(self.proxy.restored(), schedule.warm, settings, parts, folder)
        tables, tokens = {}, stats.trained_tokens
        for part in range(parts):
            unit = Unit(replication=0, kind="gradient", source=part)
            found = differentiate(
                self.proxy.restored(),
                schedule.plan,
                gradient_task(schedule.plan, design, unit, config.projection_dim),
                heldout,
                settings,
                checkpoint_path(folder, part),
            )
            tables[unit.name] = gradients_table(heldout, found)[0]
            tokens += found.num_tokens
        return predicted_scores(design, tables), tokens, 0


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


def target_ranks(first_TS: np.ndarray, second_TS: np.ndarray, own_T: np.ndarray) -> np.ndarray:
    """[T] rank correlation over each target's other sources."""
    return np.array(
        [
            stats.spearmanr(np.delete(one, own), np.delete(other, own))[0]
            for one, other, own in zip(first_TS, second_TS, own_T, strict=True)
        ]
    )


def median_interval(rank_KT: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median over targets of [K, T] correlations (mean over K), 95 % bootstrap over targets."""
    picked = np.random.default_rng(seed).integers(rank_KT.shape[1], size=(4000, rank_KT.shape[1]))
    medians_KB = np.median(rank_KT[:, picked], axis=2)
    low, high = np.percentile(medians_KB.mean(axis=0), [2.5, 97.5])
    return float(np.median(rank_KT, axis=1).mean()), float(low), float(high)


def split_ranks(effect_RTS: np.ndarray, own_T: np.ndarray, size: int) -> np.ndarray:
    """[K, T] rank correlations of `size` replications with as many others, K ways to choose."""
    everyone = range(effect_RTS.shape[0])
    return np.array(
        [
            target_ranks(effect_RTS[list(one)].mean(0), effect_RTS[list(other)].mean(0), own_T)
            for one in itertools.combinations(everyone, size)
            for other in itertools.combinations(sorted(set(everyone) - set(one)), size)
            if one < other
        ]
    )


def judge(measured: Measured, reference: Measured, truth: dict[str, Any]) -> dict[str, Any]:
    """Recovery of one estimate."""
    matrix = estimate_effects(measured.measurements).matrix
    wanted = estimate_effects(reference.measurements).matrix
    place = {name: index for index, name in enumerate(matrix.sources)}
    signs, zeros, duplicates = [], [], []
    for item in truth["relations"]:
        if item["target"] == item["source"]:
            continue
        entry = place[item["target"]], place[item["source"]]
        if item["sign"]:
            signs.append(np.sign(matrix.effect_TS[entry]) == item["sign"])
        elif item["sign"] == 0:
            zeros.append(matrix.effect_low_TS[entry] <= 0 <= matrix.effect_high_TS[entry])
        if item["relation"] == "duplicate":
            duplicates.append(matrix.effect_TS[entry] / matrix.effect_TS[entry[0], entry[0]])
    agreement = compare(matrix, wanted)
    ranks_T = target_ranks(matrix.effect_TS, wanted.effect_TS, measured.measurements.own_T)
    median, low, high = median_interval(ranks_T[None])
    own_TS = matrix.own_TS
    return {
        "cost": measured.equivalents / reference.equivalents,
        "seconds": measured.seconds,
        "target_rank_median": median,
        "target_rank_low": low,
        "target_rank_high": high,
        "rank": agreement.rank.value,
        "sign_agreement_with_reference": agreement.sign,
        "planted_signs_right": f"{sum(signs)}/{len(signs)}",
        "unrelated_pairs_covering_zero": float(np.mean(zeros)),
        "duplicate_gamma_mean": float(np.mean(duplicates)),
        "own_scale": float(np.median(matrix.effect_TS[own_TS] / wanted.effect_TS[own_TS])),
    }


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


def results(store: Path, truth: dict[str, Any]) -> dict[str, Any]:
    """Everything that is in the store, judged."""
    parts = stored(store, REFERENCE)
    reference = joined(parts)
    effect_RTS = reference.measurements.mean_RTS / reference.measurements.dose_S
    own_T = reference.measurements.own_T
    ceiling = {
        size: median_interval(split_ranks(effect_RTS, own_T, size))
        for size in range(1, len(parts) // 2 + 1)
    }
    rows = []
    for name in SETTINGS:
        found = stored(store, name) if name != REFERENCE else []
        for count in range(1, len(found) + 1):
            part = joined(found).first(count)
            rows.append({"setting": name, "replications": count, **judge(part, reference, truth)})
    return {
        "reference_replications": len(parts),
        "reference_equivalents": reference.equivalents,
        "reference_seconds": reference.seconds,
        "ceiling": ceiling,
        "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def main() -> None:
    """Measures what is asked for, reports what is there."""
    from influence_report import write_report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--measure", nargs="*", choices=SETTINGS, default=[])
    parser.add_argument("--replications", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="Markdown file; JSON goes beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.store.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.store, arguments.seed)
    for name in arguments.measure:
        measure_missing(bench, arguments.store, name, arguments.replications)
    if arguments.report:
        found = results(arguments.store, bench.truth)
        write_report(arguments.report, found)


if __name__ == "__main__":
    main()
