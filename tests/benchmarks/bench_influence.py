"""Estimators on planted truth: what is recovered, and what it costs.

    python tests/benchmarks/bench_influence.py [--replications 3] [--budget 6] [--out results.json]

A planted corpus (`system.influence.planted`) and its warm base model are made; each estimator then
runs with one, two, ... replications, in this process, scored by transformers. `retrain` with
`--budget` replications of its own, on schedules that no estimate has seen, is the reference.
Printed per estimator and number of replications: trained tokens relative to the reference, median
over targets of the rank correlation with the reference (with the noise ceiling: the reference's own
split-half reliability), sign agreement with the truth where the construction fixes a sign and the
effect is not zero, coverage of zero by the intervals of unrelated pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from system.config import InfluenceConfig, ModelConfig, RunConfig, SolveConfig, SourceConfig
from system.data.corpus import Corpus
from system.data.ingest import ingest_local
from system.influence.agreement import compare, split_half
from system.influence.design import Unit
from system.influence.heldout import draw_targets, seeded_draw
from system.influence.interventions import active_rows, assemble_design, plan_replication
from system.influence.matrix import Estimate, estimate_effects
from system.influence.measurements import Measurements, collect_losses, paired_differences
from system.influence.planted import planted_world
from system.influence.planted_command import MAX_LENGTH, write_planted
from system.influence.proxy import ProxyModel
from system.models.base import load_model, load_tokenizer
from system.scoring.score import score_reference
from system.training.settings import TrainSettings

ESTIMATORS = ("retrain", "branch", "random-design")


@dataclass(frozen=True)
class Measured:
    """One estimator's runs."""

    measurements: Measurements
    trained_tokens: int
    seconds: float


class Bench:
    """A planted world with its model, ready for runs."""

    def __init__(self, folder: Path, seed: int, tasks: tuple[str, ...] = ()) -> None:
        world = planted_world(seed)
        write_planted(folder / "world", world, num_rows=1000, seed=seed)
        self.truth = world.truth()
        self.folder = folder
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
        ingest_local(config, str(folder / "corpus"))
        self.corpus = Corpus.open(str(folder / "corpus" / "manifest.json"))
        self.tokenizer = load_tokenizer(self.model_dir)
        self.proxy = ProxyModel(self.model_dir, device="cpu", trust_remote_code=False)

    def measure(self, estimator: str, replications: int, run_seed: int) -> Measured:
        """All runs of an estimator; the rate of learning is the planted configuration's."""
        config = InfluenceConfig(
            rows_per_category=160,
            dose_rows=120,
            heldout_rows=64,
            replications=replications,
            batch_size=8,
            learning_rate=1e-3,
            warm_rows_per_category=40,
        ).model_copy(update={"estimator": estimator})
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
        schedules = [
            plan_replication(
                index,
                run_seed=run_seed,
                sources=sources,
                config=config,
                max_length=MAX_LENGTH,
                draw=draw,
            )
            for index in range(replications)
        ]
        design = assemble_design(
            run_seed=run_seed,
            config=config,
            sources=sources,
            targets=targets,
            schedules=schedules,
            heldout_dropped={},
        )
        scores, tokens, start = {}, 0, time.perf_counter()
        checkpoint = str(self.folder / "checkpoint")
        for unit in design.units:
            schedule = schedules[unit.replication]
            plan = schedule.warm if unit.kind == "warm" else schedule.plan
            assert plan is not None
            is_branch = estimator == "branch" and unit.kind != "warm"
            warm = Unit(replication=unit.replication, kind="warm", source=-1)
            settings = TrainSettings.from_influence(
                config, self.model_config, schedule.replication.seed
            )
            stats = self.proxy.tune(
                plan,
                active_rows(plan, unit, design),
                settings,
                str(self.folder / f"{run_seed}-{warm.name}") if is_branch else None,
            )
            tokens += stats.trained_tokens
            if unit.kind == "warm":
                self.proxy.save(str(self.folder / f"{run_seed}-{unit.name}"))
                continue
            self.proxy.save(checkpoint)
            scores[unit.name] = score_reference(load_model(checkpoint), heldout).table
            print(f"  {estimator} {unit.name} {time.perf_counter() - start:.0f} s", flush=True)
        measured = paired_differences(design, collect_losses(design, scores), "remove")
        return Measured(measured, tokens, time.perf_counter() - start)


def judge(estimate: Estimate, reference: Estimate, truth: dict[str, Any]) -> dict[str, float]:
    """Recovery of one estimate."""
    matrix = estimate.matrix
    place = {name: index for index, name in enumerate(matrix.sources)}
    signs, zeros, duplicates = [], [], []
    for item in truth["relations"]:
        entry = place[item["target"]], place[item["source"]]
        if item["target"] == item["source"]:
            continue
        if item["sign"]:
            signs.append(np.sign(matrix.effect_TS[entry]) == item["sign"])
        elif item["sign"] == 0:
            zeros.append(matrix.effect_low_TS[entry] <= 0 <= matrix.effect_high_TS[entry])
        if item["relation"] == "duplicate":
            duplicates.append(matrix.effect_TS[entry] / matrix.effect_TS[entry[0], entry[0]])
    agreement = compare(matrix, reference.matrix)
    return {
        "target_rank_median": agreement.target_rank_median,
        "rank": agreement.rank.value,
        "rank_low": agreement.rank.low,
        "rank_high": agreement.rank.high,
        "sign_agreement_with_reference": agreement.sign,
        "planted_signs_right": float(np.mean(signs)),
        "unrelated_pairs_covering_zero": float(np.mean(zeros)),
        "duplicate_gamma_mean": float(np.mean(duplicates)),
    }


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=3)
    parser.add_argument("--budget", type=int, default=6, help="replications of the reference")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with tempfile.TemporaryDirectory(prefix="instructmix-bench-") as folder:
        bench = Bench(Path(folder), arguments.seed)
        whole = bench.measure("retrain", arguments.budget, run_seed=1000)
        reference = estimate_effects(whole.measurements)
        halves = split_half(whole.measurements)
        for estimator in arguments.estimators:
            measured = bench.measure(estimator, arguments.replications, run_seed=1)
            for count in range(1, arguments.replications + 1):
                part = measured.measurements.replications(list(range(count)))
                results.append(
                    {
                        "estimator": estimator,
                        "replications": count,
                        "cost_share": measured.trained_tokens
                        * count
                        / arguments.replications
                        / whole.trained_tokens,
                        **judge(estimate_effects(part), reference, bench.truth),
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    report = {
        "reference_reliability": halves.reliability if halves else None,
        "reference_replications": arguments.budget,
        "reference_trained_tokens": whole.trained_tokens,
        "reference_seconds": whole.seconds,
        "reference": judge(reference, reference, bench.truth),
        "results": results,
        "machine": {"processor": platform.processor(), "threads": arguments.threads},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    print(json.dumps({key: report[key] for key in report if key != "results"}, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
