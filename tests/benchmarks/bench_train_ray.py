"""What Ray Train costs against the bare loop in steady state, and where the loop's time goes.

    python tests/benchmarks/bench_train_ray.py [--model 1m] [--rows 1600] [--rounds 4] [--out FILE]

Both train the same job (plan, checkpoints, metrics, export) with one worker and one thread, each in
a process of its own, interleaved over the rounds.  A step's time is what passes between two lines
of metrics.jsonl, so whatever lies between the steps counts: reports to the controller, polls,
checkpoints.  The first fifth of the steps is left out.  `beside_cores` is the processor time of all
other processes of the job (Ray's controller, raylet, stores, agents) over the same time, in cores:
what Ray takes where no core is spare, and it tells a slow step from a slow machine, on which wall
times of equal steps differ by more than Ray costs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from conditions import ROOT, commit, hardware, run_contender, versions
from train_workload import Workload, build_model, build_packed_plan, build_rows

CHECKPOINT_EVERY = 20
MAX_LENGTH = 512
BATCH_ROWS = 16
WAYS = ("bare", "ray")


def build_job(root: Path, model: str, num_rows: int) -> Any:
    """The plan and the base model on disk, and a job without an output directory."""
    from transformers import AutoConfig

    from system.training.plan import write_plan
    from system.training.records import TrainJob
    from system.training.settings import TrainSettings

    if not (root / "model").exists():
        build_model(root / "model", model)
    vocabulary = AutoConfig.from_pretrained(root / "model").vocab_size
    work = Workload(
        rows=build_rows(num_rows, vocabulary, MAX_LENGTH),
        max_length=MAX_LENGTH,
        batch_rows=BATCH_ROWS,
        micro_batch_tokens=4096,
    )
    plan_uri = str(root / "plan.arrow")
    if not Path(plan_uri).exists():
        write_plan(plan_uri, build_packed_plan(work))
    return TrainJob(
        name="bench",
        plan_uri=plan_uri,
        output_uri="",
        settings=TrainSettings(learning_rate=1e-4, lr_schedule="linear", warmup_share=0.0),
        model_dir=str(root / "model"),
        checkpoint_every=CHECKPOINT_EVERY,
    )


def run_one(way: str, root: Path, output: Path, model: str, num_rows: int) -> None:
    """One training in this process."""
    import dataclasses

    import torch

    torch.set_num_threads(1)
    job = dataclasses.replace(build_job(root, model, num_rows), output_uri=str(output))
    if way == "bare":
        from system.training.job import Ranks, run_job

        run_job(job, Ranks(), torch.device("cpu"))
        return
    from actors.cluster import Cluster
    from actors.fit import fit
    from actors.stage import StageContext
    from system.config import RunConfig
    from system.progress import Progress
    from system.rundir import RunDir

    config = RunConfig.model_validate(
        {
            "run_dir": str(output),
            "sources": [{"path": "unused.jsonl"}],
            "model": {"path": "builtin:tiny"},
            "solve": {"budget": 1},
            "train": {"num_workers": 1},
            "cluster": {"address": "local", "num_cpus": 2},
        }
    )
    cluster = Cluster(config.cluster)
    context = StageContext(
        config=config, run_dir=RunDir(str(output)), attempt=str(output), upstream={},
        progress=Progress(is_terminal=False), cluster=cluster,
    )  # fmt: skip
    try:
        fit([job], context)
    finally:
        cluster.shutdown()


def steady(output: Path) -> dict[str, float]:
    """Seconds of a step between two lines of the metrics, and what of it the loop itself took."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    lines = lines[len(lines) // 5 :]
    gaps = [after["time"] - before["time"] for before, after in itertools.pairwise(lines)]
    tokens = sum(line["tokens"] for line in lines[1:])
    return {
        "median_step_seconds": statistics.median(gaps),
        "mean_step_seconds": statistics.mean(gaps),
        "tokens_per_second": tokens / sum(gaps),
        "between_steps_seconds": statistics.mean(gaps)
        - statistics.mean(line["seconds"] for line in lines[1:]),
    }


class Watch:
    """Processor seconds of every process below this one, twice a second, while a job runs."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, dict[int, float]]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process(os.getpid())
        while not self._is_over.wait(0.5):
            seconds = {}
            for process in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    seconds[process.pid] = times.user + times.system
            self._samples.append((time.time(), seconds))

    def beside_cores(self, output: Path) -> float:
        """Cores that all processes but the one that trains kept busy during the steady steps."""
        times = [json.loads(line)["time"] for line in (output / "metrics.jsonl").open()]
        start, stop = times[len(times) // 5], times[-1]
        inside = [sample for sample in self._samples if start <= sample[0] <= stop]
        (begin, before), (end, after) = inside[0], inside[-1]
        spent = sorted(after[pid] - before[pid] for pid in before.keys() & after.keys())
        return sum(spent[:-1]) / (end - begin)


def profile(root: Path, model: str, num_rows: int) -> dict[str, float]:
    """Share of the wall time of a training's steps by part; one thread, this process, no Ray."""
    import torch

    from system.models.base import load_model
    from system.training import objective as objective_module
    from system.training.parallel import Replicated
    from system.training.plan import read_plan
    from system.training.train import Training, train_on_plan

    torch.set_num_threads(1)
    job = build_job(root, model, num_rows)
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str, label: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(Training, "microbatch", "building micro-batches")
    timed(objective_module.Objective, "_hidden", "decoder, forward")
    timed(objective_module, "head_loss", "head and loss, forward and gradient")
    timed(torch.Tensor, "backward", "decoder, backward")
    timed(Replicated, "zero_gradient", "zeroing the gradient")
    timed(Replicated, "clip_gradient", "gradient norm and clipping")
    timed(torch.optim.AdamW, "step", "AdamW")
    result = train_on_plan(load_model(str(root / "model")), read_plan(job.plan_uri), job.settings)
    shares = {label: seconds / result.seconds for label, seconds in spent.items()}
    shares["the rest"] = 1.0 - sum(shares.values())
    shares["seconds of a step"] = result.seconds / len(result.losses)
    return shares


def main() -> None:
    """Runs both ways, interleaved, and prints (or writes) a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1m", choices=("1m", "4m", "30m"))
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--root")
    parser.add_argument("--one", choices=WAYS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--out")
    args = parser.parse_args()
    root = Path(args.root or tempfile.mkdtemp(prefix="bench-train-ray-"))
    if args.one:
        run_one(args.one, root, Path(args.output), args.model, args.rows)
        return
    build_job(root, args.model, args.rows)
    if args.profile:
        print(json.dumps(profile(root, args.model, args.rows), indent=2))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            output = root / f"{way}-{number}"
            command = [
                __file__, "--one", way, "--root", str(root), "--model", args.model,
                "--rows", str(args.rows), "--output", str(output),
            ]  # fmt: skip
            with Watch() as watch:
                run_contender(way, command, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            runs[way].append({**steady(output), "beside_cores": watch.beside_cores(output)})
            print(way, runs[way][-1], file=sys.stderr, flush=True)
    record = report(runs, args)
    print(json.dumps(record, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n")


def report(runs: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> dict[str, Any]:
    """Overhead by round and its median, beside what two bare runs differ by."""

    def overheads(name: str) -> list[float]:
        pairs = zip(runs["ray"], runs["bare"], strict=True)
        return [ours[name] / theirs[name] - 1.0 for ours, theirs in pairs]

    bare = [run["median_step_seconds"] for run in runs["bare"]]
    medians, means = overheads("median_step_seconds"), overheads("mean_step_seconds")
    return {
        "benchmark": "train-ray",
        "config": {**vars(args), "checkpoint_every": CHECKPOINT_EVERY, "batch_rows": BATCH_ROWS},
        "machine": hardware(),
        "versions": versions("torch", "transformers", "ray"),
        "commit": commit(),
        "runs": runs,
        "overhead_of_the_median_step": {
            "by_round": medians, "median": statistics.median(medians)
        },
        "overhead_of_the_mean_step": {"by_round": means, "median": statistics.median(means)},
        "spread_of_bare": max(bare) / min(bare) - 1.0,
        "beside_cores": statistics.median(run["beside_cores"] for run in runs["ray"]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
