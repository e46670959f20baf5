"""Select against what people use today, on generated corpora, side by side in one run.

    python tests/benchmarks/bench_select.py --rows 100000 1000000 --work-dir /tmp/bench \
        --data-dir /data/instructions --out results.json

The corpus has 14 categories in shards of 50,000 rows, as ingest writes them.  Lengths of turns are
drawn from the real rows in `--data-dir` (the five files of `configs/real_cpu.yaml`); the text is
random words.  Every contender takes the same number of examples of each category (`--take` in all)
and writes them as Parquet in one shuffled order.  Each runs in a process of its own, one after the
other, `--repeats` times.

- `random`, `quality`: ours, one process: choose, arrange, gather, write
- `quality+diversity`, `facility-location`: the same with tf-idf vectors made in the same time
- `datasets-random`: `load_dataset("arrow")`, by category `.shuffle().select()`, joined, shuffled,
  `.to_parquet()`; `datasets-quality`: `.sort("score")` instead

With `--coverage`, instead: how well `facility-location` covers real rows by size of its blocks.
With `--index` the corpus has only ids and scores, and ours chooses and arranges: no body is there
to be written.  Memory: `anon` is what a process holds itself (peak of RssAnon, sampled every
20 ms); `peak` is the kernel's maximum resident size, in which pages of mapped files count as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from conditions import Memory, commit, hardware, last_json, memory_status, run_contender, versions
from select_corpus import NUM_CATEGORIES, ingest_real, real_lengths, write_corpus

OURS = ("random", "quality", "quality+diversity", "facility-location")
THEIRS = ("datasets-random", "datasets-quality")


def quotas_of(take: int) -> dict[str, int]:
    """Examples of each category."""
    return {f"category_{k:02d}": take // NUM_CATEGORIES for k in range(NUM_CATEGORIES)}


def ours(method: str, corpus_dir: Path, out: Path, take: int, is_index: bool) -> dict[str, float]:
    """Select in this process; seconds of its parts."""
    from system.config import SelectConfig
    from system.data.corpus import Corpus
    from system.selection import embed, parts
    from system.selection.choose import choose_rows
    from system.selection.select import StageQuota, arrange

    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = now - clock, now

    rule = SelectConfig.model_validate({"method": method})
    corpus = Corpus.open(str(corpus_dir / "manifest.json"))
    quotas = (StageQuota(name="all", counts=quotas_of(take)),)
    attempt = str(out)
    if rule.uses_embedding:
        shards = corpus.manifest.shards
        num_rows = sum(shard.rows for shard in shards)
        counts, counted = np.zeros(0), 0
        for shard in shards:
            found, rows = embed.count_words(corpus, shard, num_rows)
            counts, counted = found if not len(counts) else counts + found, counted + rows
        embed.write_weights(attempt, counts, counted)
        weights = embed.read_weights(attempt)
        for shard in shards:
            vectors = embed.embed_texts(corpus, shard, weights)
            embed.write_vectors(attempt, shard, vectors, np.ones(len(vectors), bool))
        lap("embed")
    chosen = {
        category: choose_rows(corpus, category, count, rule, 0, attempt)
        for category, count in quotas[0].counts.items()
    }
    selection = arrange(corpus, quotas, chosen, 0)
    lap("choose")
    if not is_index:
        groups = parts.plan_gather(selection)
        outcomes = [parts.gather_group(corpus, group, attempt) for group in groups]
        lap("gather")
        inputs = parts.part_inputs(len(selection.row), outcomes)
        written = [parts.write_part(given, attempt) for given in inputs]
        parts.write_selection_manifest(attempt, selection, written, chosen, rule)
        lap("write")
    assert len(selection.row) == sum(quotas[0].counts.values())
    return seconds


def theirs(method: str, corpus_dir: Path, out: Path, take: int) -> dict[str, float]:
    """The same with Hugging Face datasets; seconds of its parts."""
    import datasets

    datasets.disable_progress_bars()
    seconds: dict[str, float] = {}
    clock = time.perf_counter()
    files = {
        category: sorted(str(path) for path in (corpus_dir / category).glob("*.arrow"))
        for category in quotas_of(take)
    }
    loaded = datasets.load_dataset("arrow", data_files=files, cache_dir=str(out / "cache"))
    seconds["load"], clock = time.perf_counter() - clock, time.perf_counter()
    chosen = []
    for category, count in quotas_of(take).items():
        rows = loaded[category]
        if method == "datasets-quality":
            rows = rows.sort("score", reverse=True)
        else:
            rows = rows.shuffle(seed=0)
        chosen.append(rows.select(range(count)))
    joined = datasets.concatenate_datasets(chosen).shuffle(seed=0)
    seconds["choose"], clock = time.perf_counter() - clock, time.perf_counter()
    joined.to_parquet(str(out / "selection.parquet"))
    seconds["write"] = time.perf_counter() - clock
    assert len(joined) == sum(quotas_of(take).values())
    return seconds


def run_child(arguments: argparse.Namespace) -> None:
    """One contender; prints its measurement as JSON."""
    out = arguments.out_dir
    with Memory() as memory:
        if arguments.child in OURS:
            seconds = ours(arguments.child, arguments.corpus, out, arguments.take, arguments.index)
        else:
            seconds = theirs(arguments.child, arguments.corpus, out, arguments.take)
    answer = {
        "seconds": sum(seconds.values()),
        "parts": {name: round(value, 2) for name, value in seconds.items()},
        "anon_mib": memory.anon_mib,
        "peak_mib": memory_status("VmHWM"),
    }
    print(json.dumps(answer))


def measure(name: str, corpus: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a contender in a process of its own."""
    out = arguments.work_dir / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [__file__, "--child", name, "--corpus", str(corpus), "--out-dir", str(out),
               "--take", str(arguments.take)]  # fmt: skip
    command += ["--index"] if arguments.index else []
    try:
        printed = run_contender(name, command, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return last_json(printed)


def coverage_on_real_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Mean similarity of a category's rows to the nearest of the 5 % chosen, by size of block."""
    from system.config import SelectConfig
    from system.selection import embed
    from system.selection.choose import choose_rows
    from system.selection.coverage import coverage

    work = arguments.work_dir / "real"
    shutil.rmtree(work, ignore_errors=True)
    corpus = ingest_real(arguments.data_dir, work)
    shards = [s for name in corpus.categories for s in corpus.shards("train", name)]
    counted = [embed.count_words(corpus, s, sum(t.rows for t in shards)) for s in shards]
    counts = np.sum([found for found, _ in counted], axis=0)
    embed.write_weights(str(work), counts, sum(rows for _, rows in counted))
    weights = embed.read_weights(str(work))
    for category in ("math", "code", "closed_book_qa"):
        own = corpus.shards("train", category)
        parts = [embed.embed_texts(corpus, shard, weights) for shard in own]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        for shard, part in zip(own, parts, strict=True):
            embed.write_vectors(str(work), shard, part, np.ones(len(part), bool))
        vectors = np.concatenate(parts)
        take = len(vectors) // 20
        found: dict[str, Any] = {"category": category, "rows": len(vectors), "taken": take}
        for num_blocks in (0, 1, 2, 4, 8):
            rule = SelectConfig()
            if num_blocks:
                rule = SelectConfig(method="facility-location")
                rule = rule.model_copy(update={"block_rows": -(-len(vectors) // num_blocks)})
            chosen = choose_rows(corpus, category, take, rule, 0, str(work))
            value = coverage(vectors, starts[chosen.shard] + chosen.row) / 32767 / len(vectors)
            found[f"{num_blocks} blocks" if num_blocks else "random"] = round(value, 4)
        yield found
    shutil.rmtree(work)


def run_size(num_rows: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Writes the corpus of a size, runs the contenders on it, removes it."""
    corpus = arguments.work_dir / f"corpus-{num_rows}"
    shutil.rmtree(corpus, ignore_errors=True)
    lengths = real_lengths(arguments.data_dir, arguments.work_dir)
    try:
        write_corpus(corpus, num_rows, lengths, arguments.index)
        size = sum(path.stat().st_size for path in corpus.rglob("*.arrow")) / 2**20
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
        for _ in range(arguments.repeats):
            for name in arguments.only:
                runs[name].append(measure(name, corpus, arguments))
        for name, found in runs.items():
            best = min(found, key=lambda item: item["seconds"])
            yield {
                "method": name,
                "rows": num_rows,
                "corpus_mib": round(size),
                "seconds": round(best["seconds"], 2),
                "all_seconds": [round(item["seconds"], 2) for item in found],
                "parts": best["parts"],
                "rows_per_second": round(num_rows / best["seconds"]),
                "anon_mib": round(max(item["anon_mib"] for item in found)),
                "peak_mib": round(max(item["peak_mib"] for item in found)),
            }
    finally:
        shutil.rmtree(corpus, ignore_errors=True)


def main() -> None:
    """Runs all sizes in turn and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--take", type=int, default=49_000)
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["random", "quality", *THEIRS])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out-dir", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    results = []
    sizes = (item for num_rows in arguments.rows for item in run_size(num_rows, arguments))
    for item in coverage_on_real_rows(arguments) if arguments.coverage else sizes:
        print(json.dumps(item), flush=True)
        results.append(item)
    summary = {
        "benchmark": "select",
        "take": arguments.take,
        "index": arguments.index,
        "results": results,
        "hardware": hardware(),
        "versions": versions("datasets", "numpy", "pyarrow"),
        "commit": commit(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
