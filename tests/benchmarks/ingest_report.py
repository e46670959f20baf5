"""`ingest.md` from what `bench_ingest.py` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BAR = 3.0
OURS, THEIRS = "instructmix", "datasets-map"
TITLES = {
    "instructmix": "instructmix",
    "instructmix-near": "instructmix, near-duplicates too",
    "instructmix-raylets": "instructmix, Ray actors, one on each of as many raylets",
    "datasets-map": '`load_dataset("json")`, `.map`, `save_to_disk`',
    "datasets-batched": "the same, `batched=True`",
    "ray-data": "Ray Data: `read_json`, `map_batches`, `write_parquet`",
    "data-juicer": "Data-Juicer {version}: mapper, `document_deduplicator`",
}


def write_report(path: Path, record: dict[str, Any]) -> None:
    """Writes the page."""
    hardware, runs = record["hardware"], record["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    loads = [run["load"] for run in runs]
    lines = [
        "# Ingest against what else one could use",
        "",
        "Written by `bench_ingest.py`, whose head says how it measures. "
        f"{record['rows']:,} rows made of",
        f"the real rows of `configs/real_cpu.yaml` ({record['input_mib']:.0f} MiB of JSONL in 8 "
        f"files, {record['duplicates']:.0%} exact repeats). Everyone",
        "reads, normalises and writes; instructmix also deduplicates exactly, splits, writes "
        "shards by",
        "category with digests, flushes them to disk and checks that the counts add up. The other",
        "frameworks run this project's `normalise` row by row; Data-Juicer a mapper of its own, "
        "its exact",
        "deduplication, no ids and no splits. With two processes instructmix runs in Ray actors.",
        "",
        f"commit: {record['commit']}.  machine: {hardware['cpu']}, {hardware['cores']} cores, "
        f"load {min(loads):.0f} to {max(loads):.0f}.  versions: {versions}.",
        "",
        "*rows/s*: once it runs; *start*: the whole of a run on "
        f"{record['few']:,} rows; *all*: the whole of a run on",
        "all rows; *rows/s of CPU*: per second of processor time, user and system, which is the "
        "steadier",
        "number on a machine that others use too. Medians of the runs, smallest and largest in "
        "brackets;",
        "*times*: how many times as fast instructmix is, by the medians. *peak memory*: resident, "
        "pages of",
        "mapped files included; *own*: what the process holds itself, sampled.",
    ]
    for run in runs:
        run["mib_per_second"] = run["rows_per_second"] * record["input_mib"] / record["rows"]
    for processes in sorted({run["processes"] for run in runs}):
        lines += _table(processes, [run for run in runs if run["processes"] == processes])
    lines += ["", *_verdict(runs)]
    path.write_text("\n".join(lines) + "\n")


def _table(processes: int, runs: Sequence[dict[str, Any]]) -> list[str]:
    title = "One process" if processes == 1 else f"{processes} processes"
    lines = [
        "",
        f"## {title}",
        "",
        "| | runs | rows/s | times | MiB/s | rows/s of CPU | times | start | all | peak memory "
        "| own |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = [run for run in runs if run["contender"] == OURS]
    for name in TITLES:
        own = [run for run in runs if run["contender"] == name]
        if not own:
            continue
        cells = [
            TITLES[name].format(version=own[0].get("version", "")),
            str(len(own)),
            _spread(own, "rows_per_second", "{:,.0f}"),
            _times(ours, own, "rows_per_second"),
            _spread(own, "mib_per_second", "{:.0f}"),
            _spread(own, "rows_per_cpu_second", "{:,.0f}"),
            _times(ours, own, "rows_per_cpu_second"),
            _spread(own, "start_seconds", "{:.1f} s"),
            _spread(own, "seconds", "{:.1f} s"),
            "-" if _is_on_ray(own[0]) else f"{max(run['peak_mib'] for run in own):,} MiB",
            "-"
            if _is_on_ray(own[0]) or not _values(own, "anon_mib")
            else f"{max(_values(own, 'anon_mib')):,.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _is_on_ray(run: dict[str, Any]) -> bool:
    """Ray's workers are nobody's children, so neither their time nor their memory is known."""
    is_on_ray = run["contender"] in ("ray-data", "instructmix-raylets")
    return is_on_ray or (run["contender"] == OURS and run["processes"] > 1)


def _values(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [run[key] for run in runs if key in run]


def _spread(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    values = _values(runs, key)
    if not values:
        return "-"
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    low, high = (form.format(value).removesuffix(" s") for value in (min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def _times(ours: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], key: str) -> str:
    mine, others = _values(ours, key), _values(own, key)
    if not mine or not others or ours == own:
        return "-"
    return f"{statistics.median(mine) / statistics.median(others):.1f}"


def _verdict(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The bar, beside what was seen: round by round, by time and by processor time."""
    lines = [f"Asked: at least {BAR:.0f} times the rows/s of row-by-row `.map`.", ""]
    for processes in sorted({run["processes"] for run in runs}):
        own = [run for run in runs if run["processes"] == processes]
        mine, others = ([r for r in own if r["contender"] == name] for name in (OURS, THEIRS))
        for key, unit in (("rows_per_second", "time"), ("rows_per_cpu_second", "processor time")):
            ratios = [
                one / two
                for one, two in zip(_values(mine, key), _values(others, key), strict=False)
            ]
            if ratios:
                word = "reached" if min(ratios) >= BAR else "**not reached in every round**"
                found = ", ".join(f"{ratio:.1f}" for ratio in ratios)
                what = "1 process" if processes == 1 else f"{processes} processes"
                lines.append(f"- {what}, by {unit}: {found} times, round by round: {word}")
    return lines
