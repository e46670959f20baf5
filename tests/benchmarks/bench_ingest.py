"""Ingest against what people use today, on generated rows, side by side in one run.

    python tests/benchmarks/bench_ingest.py --rows 300000 --work-dir /tmp/bench --out results.json

Each contender runs in a process of its own on the same JSONL file and writes to disk; best of
`--repeats`.  Sizes of prompts and responses follow the distribution of 49,341 real instruction rows
(P3, GSM8K, CodeAlpaca, GPTeacher).  What each one does:

- `ours`: read, shape, normalise, content id, split, exact deduplication, shards by category with
  digests, manifest with exact counts; one process
- `ours-ray`: the same through actors (`--actors`), start of Ray included
- `ours-near`: with near-deduplication
- `datasets-map`: `load_dataset("json")`, `.map` of the same normalisation, ids and splits, row by
  row, `save_to_disk`; no deduplication
- `datasets-batched`: the same with `batched=True`
- `ray-data`: `read_json`, `map_batches` of the same function, `write_parquet`; with start of Ray
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Every 5 % quantile, in characters.
PROMPT_CHARS = [
    22, 95, 120, 142, 162, 185, 209, 231, 255, 279, 307, 342, 386, 468, 609, 800, 1063, 1525, 2094,
    2263, 26252,
]  # fmt: skip
RESPONSE_CHARS = [
    1, 2, 3, 4, 6, 7, 8, 9, 12, 18, 27, 40, 59, 88, 116, 154, 210, 280, 395, 626, 2048,
]  # fmt: skip
NUM_CATEGORIES = 14
DUPLICATE_SHARE = 0.02


def write_rows(path: Path, num_rows: int, seed: int = 0) -> None:
    """Rows of random words; some rows are repeats of earlier ones."""
    draw = random.Random(seed)
    numbers = np.random.default_rng(seed)
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    text = " ".join(draw.choices(words, k=2_000_000))
    grid = np.linspace(0, 1, len(PROMPT_CHARS))
    kept: list[str] = []
    with path.open("w") as file:
        for start in range(0, num_rows, 10_000):
            count = min(10_000, num_rows - start)
            sizes = [
                np.interp(numbers.random(count), grid, table).astype(int)
                for table in (PROMPT_CHARS, RESPONSE_CHARS)
            ]
            for prompt_size, response_size in zip(*sizes, strict=True):
                if kept and draw.random() < DUPLICATE_SHARE:
                    file.write(draw.choice(kept))
                    continue
                at = draw.randrange(len(text) - 30_000)
                row = {
                    "prompt": f"{draw.getrandbits(64):x} {text[at : at + prompt_size]}?",
                    "completion": f"{text[at + prompt_size : at + prompt_size + response_size]}.",
                    "task": f"task-{draw.randrange(NUM_CATEGORIES)}",
                }
                line = json.dumps(row) + "\n"
                file.write(line)
                if len(kept) < 1000:
                    kept.append(line)


def _config(path: Path, out: Path, actors: int, **ingest: Any) -> Any:
    from system.config import ClusterConfig, IngestConfig, ModelConfig, RunConfig, SolveConfig
    from system.config import SourceConfig as Source

    return RunConfig(
        run_dir=str(out),
        sources=(Source(path=str(path), category_column="task"),),
        ingest=IngestConfig(min_train_rows=1, min_heldout_rows=1, **ingest),
        model=ModelConfig(path="builtin:tiny"),
        solve=SolveConfig(budget=100),
        cluster=ClusterConfig(address="local", num_ingestors=actors, num_cpus=actors),
    )


def ours(path: Path, out: Path, actors: int) -> int:
    """The whole ingest in one process."""
    from system.data.ingest import ingest_local

    return ingest_local(_config(path, out, actors), str(out / "attempt")).read


def ours_near(path: Path, out: Path, actors: int) -> int:
    """With near-deduplication."""
    from system.data.ingest import ingest_local

    return ingest_local(_config(path, out, actors, deduplicate="near"), str(out / "attempt")).read


def ours_ray(path: Path, out: Path, actors: int) -> int:
    """Through Ray actors."""
    from actors import ingestor
    from actors.cluster import Cluster
    from actors.stage import StageContext
    from system.progress import Progress
    from system.rundir import RunDir

    config = _config(path, out, actors, chunk_bytes=16 * 2**20)
    cluster = Cluster(config.cluster)
    context = StageContext(
        config=config,
        run_dir=RunDir(config.run_dir),
        attempt=str(out / "attempt"),
        upstream={},
        progress=Progress(False),
        cluster=cluster,
    )
    read = ingestor.run(context).counts["read"]
    cluster.shutdown()
    return read


def _normalised(prompt: str, completion: str) -> dict[str, Any]:
    from system.data.conversation import normalise, split_of

    found = normalise([("user", prompt), ("assistant", completion)], 200_000)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(found.roles, found.contents, strict=True)
    ]
    return {"id": found.id, "messages": messages, "split": split_of(found.prompt_hash, 0.1, 0.1)}


def _normalised_batch(batch: Any) -> dict[str, Any]:
    rows = [
        _normalised(prompt, completion)
        for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
    ]
    return {name: [row[name] for row in rows] for name in ("id", "messages", "split")}


def _load(path: Path, out: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(out / "cache")
    )


def datasets_map(path: Path, out: Path, actors: int) -> int:
    """Hugging Face datasets, row by row."""
    loaded = _load(path, out)
    mapped = loaded.map(
        lambda row: _normalised(row["prompt"], row["completion"]),
        remove_columns=["prompt", "completion"],
    )
    mapped.save_to_disk(str(out / "saved"))
    return len(mapped)


def datasets_batched(path: Path, out: Path, actors: int) -> int:
    """Hugging Face datasets, in batches."""
    loaded = _load(path, out)
    mapped = loaded.map(_normalised_batch, batched=True, remove_columns=["prompt", "completion"])
    mapped.save_to_disk(str(out / "saved"))
    return len(mapped)


def ray_data(path: Path, out: Path, actors: int) -> int:
    """Plain Ray Data."""
    import ray

    ray.init(
        address="local", num_cpus=actors, include_dashboard=False, log_to_driver=False,
        _temp_dir=os.environ.get("RAY_TMPDIR", "/tmp/bench-ray"),
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    mapped = ray.data.read_json(str(path), lines=True).map_batches(
        lambda batch: {**_normalised_batch(batch), "task": batch["task"]}
    )
    mapped.write_parquet(str(out / "saved"))
    count = ray.data.read_parquet(str(out / "saved")).count()
    ray.shutdown()
    return count


CONTENDERS: dict[str, Callable[[Path, Path, int], int]] = {
    "ours": ours,
    "ours-ray": ours_ray,
    "ours-near": ours_near,
    "datasets-map": datasets_map,
    "datasets-batched": datasets_batched,
    "ray-data": ray_data,
}


def run_child(name: str, path: Path, out: Path, actors: int) -> None:
    """One contender; prints its measurement as JSON."""
    started = time.perf_counter()
    rows = CONTENDERS[name](path, out, actors)
    seconds = time.perf_counter() - started
    times = os.times()
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        json.dumps(
            {
                "rows": rows,
                "seconds": seconds,
                "cpu_seconds": sum(times[:4]),
                "peak_mib": own,
                "largest_child_mib": children,
            }
        )
    )


def measure(name: str, path: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a contender in a process of its own."""
    out = work / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, __file__, "--child", name, "--input", str(path), "--work-dir",
               str(out), "--actors", str(arguments.actors)]  # fmt: skip
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    if answer.returncode:
        raise SystemExit(f"{name} failed:\n{answer.stderr[-3000:]}")
    shutil.rmtree(out, ignore_errors=True)
    return json.loads(answer.stdout.splitlines()[-1])


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform()}


def main() -> None:
    """Generates the input, runs all contenders in turn, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--child")
    parser.add_argument("--input", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.input, arguments.work_dir, arguments.actors)
        return
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.work_dir / f"rows-{arguments.rows}.jsonl"
    if not path.exists():
        write_rows(path, arguments.rows)
    mib = path.stat().st_size / 2**20
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    for _ in range(arguments.repeats):
        for name in arguments.only:
            runs[name].append(measure(name, path, arguments.work_dir, arguments))
    results = {}
    for name, found in runs.items():
        best = min(found, key=lambda item: item["seconds"])
        assert best["rows"] == arguments.rows, f"{name} has {best['rows']} rows"
        results[name] = {
            **{key: round(value, 1) for key, value in best.items()},
            "rows_per_second": round(arguments.rows / best["seconds"]),
            "mib_per_second": round(mib / best["seconds"], 1),
            "all_seconds": [round(item["seconds"], 1) for item in found],
        }
        print(f"{name:<18} {results[name]}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    summary = {
        "benchmark": "ingest",
        "rows": arguments.rows,
        "input_mib": round(mib, 1),
        "actors": arguments.actors,
        "results": results,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("datasets", "pyarrow", "ray", "msgspec")},
        "commit": commit,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
