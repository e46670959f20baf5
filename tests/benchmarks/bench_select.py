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
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

NUM_CATEGORIES = 14
SHARD_ROWS = 50_000
TEXT_BYTES = 64 * 2**20
OURS = ("random", "quality", "quality+diversity", "facility-location")
THEIRS = ("datasets-random", "datasets-quality")


def real_lengths(data_dir: Path, work: Path) -> np.ndarray:
    """[N, 2] characters of prompt (all turns but the last) and response of the real rows."""
    from system.data.corpus import Corpus
    from system.data.ingest import ingest_local
    from system.load import load_config

    kept = work / "lengths.npy"
    if not kept.exists():
        example = str(Path(__file__).parents[2] / "configs" / "real_cpu.yaml")
        config = load_config(example, [f"data_dir={data_dir}", f"run_dir={work / 'real'}"])
        ingest_local(config, str(work / "real"))
        corpus = Corpus.open(str(work / "real" / "manifest.json"))
        rows = [
            (sum(len(turn["content"]) for turn in turns[:-1]), len(turns[-1]["content"]))
            for category in corpus.categories
            for table in corpus.iter_tables("train", category, ["messages"])
            for turns in table["messages"].to_pylist()
        ]
        np.save(kept, np.array(rows, np.int64))
        shutil.rmtree(work / "real")
    return np.load(kept)


def random_text(seed: int) -> np.ndarray:
    """[TEXT_BYTES] uint8: random words of 2 to 9 letters."""
    draw = np.random.default_rng(seed)
    letters = np.frombuffer(b"etaoinshrdlcumwfgypbvk", np.uint8)
    text = letters[draw.integers(0, len(letters), TEXT_BYTES)]
    text[np.cumsum(draw.integers(3, 11, TEXT_BYTES // 10))] = ord(" ")
    return text


def random_ids(draw: np.random.Generator, count: int, low: float, high: float) -> pa.Array:
    """Ordered random content ids, from a range of all."""
    heads = np.sort(draw.integers(int(low * 2**62), int(high * 2**62), count)).astype(np.uint64)
    raw = np.empty((count, 2), ">u8")
    raw[:, 0], raw[:, 1] = heads << np.uint64(2), draw.integers(0, 2**63, count)
    text = raw.tobytes().hex()
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * 32)
    return pa.StringArray.from_buffers(count, offsets.buffers()[1], pa.py_buffer(text.encode()))


def messages_of(draw: np.random.Generator, lengths: np.ndarray, text: np.ndarray) -> pa.Array:
    """Conversations of one question and one answer."""
    from system.schema import MESSAGES

    count = len(lengths)
    ends = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])
    start = int(draw.integers(0, len(text)))
    bytes_ = np.take(text, np.arange(start, start + ends[-1]), mode="wrap")
    offsets = pa.array(ends.astype(np.int32))
    contents = pa.StringArray.from_buffers(2 * count, offsets.buffers()[1], pa.py_buffer(bytes_))
    roles = pa.array(["user", "assistant"]).take(pa.array(np.tile([0, 1], count)))
    turns = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGES.value_type))
    places = pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32))
    return pa.ListArray.from_arrays(places, turns, type=MESSAGES)


def write_corpus(folder: Path, num_rows: int, lengths: np.ndarray, is_index: bool) -> None:
    """Shards and manifest; with `is_index` only the columns that choosing reads."""
    from system.data.corpus import Shard, make_manifest, write_manifest
    from system.schema import CORPUS

    draw = np.random.default_rng(num_rows)
    text = random_text(0)
    shards = []
    for category in range(NUM_CATEGORIES):
        total = num_rows // NUM_CATEGORIES + (category < num_rows % NUM_CATEGORIES)
        cuts = -(-total // SHARD_ROWS)
        for cut in range(cuts):
            count = total * (cut + 1) // cuts - total * cut // cuts
            columns: dict[str, Any] = {
                "id": random_ids(draw, count, cut / cuts, (cut + 1) / cuts),
                "score": pa.array(draw.normal(size=count)),
            }
            if not is_index:
                sizes = lengths[draw.integers(0, len(lengths), count)]
                name = pa.scalar(f"category_{category:02d}", pa.string())
                columns |= {
                    "category": pa.repeat(name, count),
                    "source": pa.repeat(pa.scalar("generated"), count),
                    "messages": messages_of(draw, sizes, text),
                    "answer": pa.nulls(count, pa.string()),
                    "answer_pattern": pa.nulls(count, pa.string()),
                    "embedding": pa.nulls(count, CORPUS.field("embedding").type),
                }
            table = pa.table(columns)
            if not is_index:
                table = table.select(CORPUS.names).cast(CORPUS)
            path = f"category_{category:02d}/{cut:05d}.arrow"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with pyarrow.ipc.new_file(str(folder / path), table.schema) as writer:
                writer.write_table(table, max_chunksize=8192)
            shards.append(
                Shard(
                    path=path, split="train", category=f"category_{category:02d}", rows=count,
                    first_id=table["id"][0].as_py(), last_id=table["id"][-1].as_py(),
                    sha256=hashlib.sha256(path.encode()).hexdigest(),
                )
            )  # fmt: skip
    write_manifest(str(folder / "manifest.json"), make_manifest(shards))


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


def _status(name: str) -> float:
    """A value of the kernel's about this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Memory:
    """The most memory that this process holds itself."""

    def __init__(self) -> None:
        self.anon_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.anon_mib = max(self.anon_mib, _status("RssAnon"))

    def __enter__(self) -> Memory:
        """Begins to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join()


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
        "peak_mib": _status("VmHWM"),
    }
    print(json.dumps(answer))


def measure(name: str, corpus: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a contender in a process of its own."""
    out = arguments.work_dir / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, __file__, "--child", name, "--corpus", str(corpus), "--out-dir",
               str(out), "--take", str(arguments.take)]  # fmt: skip
    command += ["--index"] if arguments.index else []
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    shutil.rmtree(out, ignore_errors=True)
    if answer.returncode:
        raise SystemExit(f"{name} failed:\n{answer.stderr[-3000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def coverage_on_real_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Mean similarity of a category's rows to the nearest of the 5 % chosen, by size of block."""
    from system.config import SelectConfig
    from system.data.corpus import Corpus
    from system.data.ingest import ingest_local
    from system.load import load_config
    from system.selection import embed
    from system.selection.choose import choose_rows
    from system.selection.coverage import coverage

    work = arguments.work_dir / "real"
    shutil.rmtree(work, ignore_errors=True)
    example = str(Path(__file__).parents[2] / "configs" / "real_cpu.yaml")
    config = load_config(example, [f"data_dir={arguments.data_dir}", f"run_dir={work}"])
    ingest_local(config, str(work))
    corpus = Corpus.open(str(work / "manifest.json"))
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


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


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
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    summary = {
        "benchmark": "select",
        "take": arguments.take,
        "index": arguments.index,
        "results": results,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("datasets", "numpy", "pyarrow")},
        "commit": commit,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
