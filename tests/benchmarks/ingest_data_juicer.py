"""Data-Juicer's run of `bench_ingest.py`, in an environment where it is installed.

    python -m venv /tmp/dj && /tmp/dj/bin/pip install py-data-juicer "ray[default]" aiohttp av

Loads the JSONL files, normalises question and answer (line ends, NFC, white space around them) with
a mapper, removes exact duplicates with `document_deduplicator`, exports JSONL: its default
executor, its defaults besides the number of processes.  No ids, splits or categories.
"""

import argparse
import json
import resource
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path


def normalise_sample(sample):
    """Question and answer in normal form, and `text`, by which duplicates are found."""
    for name in ("prompt", "completion"):
        text = sample[name].replace("\r\n", "\n").replace("\r", "\n")
        sample[name] = unicodedata.normalize("NFC", text).rstrip().lstrip("\n")
    sample["text"] = f"{sample['prompt']}\x1f{sample['completion']}"
    return sample


def main() -> None:
    """Runs the recipe; prints how many rows were read, and what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, required=True)
    arguments = parser.parse_args()

    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    recipe = {
        "project_name": "ingest",
        "dataset_path": str(arguments.input),
        "export_path": str(arguments.work_dir / "out.jsonl"),
        "work_dir": str(arguments.work_dir),
        "np": arguments.processes,
        "text_keys": "prompt",
        "process": [
            {"python_file_mapper": {
                "file_path": str(Path(__file__).resolve()), "function_name": "normalise_sample",
            }},
            {"document_deduplicator": {"text_key": "text"}},
        ],
    }  # fmt: skip
    path = arguments.work_dir / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    DefaultExecutor(init_configs(["--config", str(path)])).run()
    kept = sum(1 for _ in (arguments.work_dir / "out.jsonl").open("rb"))
    rows = sum(1 for part in arguments.input.glob("*.jsonl") for _ in part.open("rb"))
    answer = {"rows": rows, "kept": kept, "version": version("py-data-juicer"), **used()}
    # Data-Juicer has made its log of `sys.stdout`.
    print(json.dumps(answer), file=sys.__stdout__)


def used() -> dict[str, float]:
    """What this process and its children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "peak_mib": max(usage.ru_maxrss for usage in usages) / 1024,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
    }


if __name__ == "__main__":
    main()
