"""Ingest against what people use today, on real rows, side by side in one run.

    python tests/benchmarks/bench_ingest.py --data-dir DIR --work-dir /tmp/bench --out ingest.json \
        --processes 1 2 [--only ... data-juicer --data-juicer-python /other/venv/bin/python]
    python tests/benchmarks/bench_ingest.py --out ingest.json --report ingest.md

`DIR` holds the five files of `configs/real_cpu.yaml`.  Each contender (`ingest_contenders.py`) runs
in a fresh process on the same JSONL files, with the same number of worker processes, and writes to
disk.  The seconds are those of the whole process.  Every contender also reads a file of
`--few` rows: what that takes is its start (imports, the start of Ray, worker processes), and

    rows/s = (rows - few) / (seconds for all - seconds for few)

is what it does once it runs; the same with processor time (user and system, all processes) says
more on a machine that others use too.  (Ray's workers do not show in it, so it is left out there.)
Memory: `anon` is what the contender's first process holds itself (peak of RssAnon, sampled every
20 ms); `peak` is the kernel's maximum resident size, in which pages of mapped files count as well.
The contenders take turns in every round.  A run adds its rounds to those that are in `--out`
already, where rows and commit are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conditions import ROOT, Memory, commit, hardware, last_json, run_contender, versions
from ingest_contenders import CONTENDERS, uses_ray
from ingest_data_juicer import used
from ingest_rows import DUPLICATE_SHARE, write_rows

DATA_JUICER = "data-juicer"
PACKAGES = ("datasets", "pyarrow", "ray", "msgspec")


def run_child(arguments: argparse.Namespace) -> None:
    """One contender; prints what it says of itself as JSON."""
    files = sorted(arguments.input.glob("*.jsonl"))
    with Memory() as memory:
        rows = CONTENDERS[arguments.child](files, arguments.work_dir, arguments.processes[0])
    print(json.dumps({"rows": rows, **used(), "anon_mib": memory.anon_mib}))


def measure(
    name: str, processes: int, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs a contender in a process of its own on the files in the folder."""
    out = arguments.work_dir / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    options = ["--input", str(folder), "--work-dir", str(out), "--processes", str(processes)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    if name == DATA_JUICER:
        script = str(Path(__file__).with_name("ingest_data_juicer.py"))
        python = str(arguments.data_juicer_python)
        printed = run_contender(name, [script, *options], environment, python)
    else:
        environment["PYTHONPATH"] = str(ROOT)
        printed = run_contender(name, [__file__, "--child", name, *options], environment)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return {**last_json(printed), "seconds": seconds}


def measure_round(
    arguments: argparse.Namespace, folders: dict[int, Path]
) -> Iterator[dict[str, Any]]:
    """Every contender once, with each number of processes, on few and on all rows."""
    for processes in arguments.processes:
        for name in arguments.only:
            few, full = (measure(name, processes, folders[rows], arguments) for rows in folders)
            for rows, run in zip(folders, (few, full), strict=True):
                if run["rows"] != rows:
                    raise SystemExit(f"{name}: expected {rows} rows, found {run['rows']}")
            num_rows = full["rows"] - few["rows"]
            found = {
                "contender": name,
                "processes": processes,
                "start_seconds": round(few["seconds"], 2),
                "seconds": round(full["seconds"], 2),
                "rows_per_second": round(num_rows / (full["seconds"] - few["seconds"])),
                "peak_mib": round(full["peak_mib"]),
                **({"anon_mib": round(full["anon_mib"])} if "anon_mib" in full else {}),
                "load": hardware()["load"][0],
            }
            if not uses_ray(name, processes):
                cpu_seconds = full["cpu_seconds"] - few["cpu_seconds"]
                found["rows_per_cpu_second"] = round(num_rows / cpu_seconds)
            found |= {key: full[key] for key in full if key == "version"}
            print(found, flush=True)
            yield found


def inputs(arguments: argparse.Namespace) -> dict[int, Path]:
    """Number of rows -> folder of files: the few, then all."""
    folders = {
        rows: arguments.work_dir / f"rows-{rows}" for rows in (arguments.few, arguments.rows)
    }
    for rows, folder in folders.items():
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            write_rows(partial, arguments.data_dir, rows)
            partial.rename(folder)
    return folders


def summary(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of this run without its rounds; those of equal runs before it are taken over."""
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl")) / 2**20
    record = {
        "benchmark": "ingest",
        "rows": arguments.rows,
        "few": arguments.few,
        "input_mib": round(size, 1),
        "duplicates": DUPLICATE_SHARE,
        "hardware": hardware(),
        "versions": versions(*PACKAGES),
        "commit": commit(),
        "runs": [],
    }
    if arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        if all(before[key] == record[key] for key in ("rows", "few", "commit")):
            return before
    return record


def main() -> None:
    """Makes the input, runs all contenders in turn, writes the results, writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--few", type=int, default=5_000)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    names = [*CONTENDERS, DATA_JUICER]
    parser.add_argument("--only", nargs="+", choices=names, default=list(CONTENDERS))
    parser.add_argument("--data-juicer-python", type=Path)
    parser.add_argument("--report", type=Path, help="write the table of --out, measure nothing")
    parser.add_argument("--child", choices=list(CONTENDERS))
    parser.add_argument("--input", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    if arguments.report:
        from ingest_report import write_report

        write_report(arguments.report, json.loads(arguments.out.read_text()))
        return
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    folders = inputs(arguments)
    record = summary(arguments, folders[arguments.rows])
    for _ in range(arguments.rounds):
        for run in measure_round(arguments, folders):
            record["runs"].append(run)
            if arguments.out:
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
