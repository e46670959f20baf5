"""A small but whole job: four categories of generated tasks, a model of 100,000 parameters."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from system.stages import STAGE_FOLDERS

ROOT = Path(__file__).parents[2]
ROWS = 160


def write_data(folder: Path) -> None:
    """Four categories in three formats; some rows without a category, one row is broken; and a
    target that no source owns."""
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(2 * ROWS)]
    addition = [
        {"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)}
        for a, b in sums[:ROWS]
    ]
    (folder / "addition.json").write_text(json.dumps(addition))
    words = [_word(draw) for _ in range(3 * ROWS)]
    lines = [
        {"question": f"Spell {w} backward.", "answer": w[::-1], "topic": "spelling"}
        for w in words[:ROWS]
    ] + [
        {"question": f"How many letters has {w}?", "answer": str(len(w)), "topic": "counting"}
        for w in words[ROWS : 2 * ROWS]
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "words.jsonl").write_text(text + "{not json\n")
    chats = [
        {
            "conversations": [
                {"from": "human", "value": f"Hello, I am {w}."},
                {"from": "gpt", "value": f"Hello {w}."},
                {"from": "human", "value": "What is my name?"},
                {"from": "gpt", "value": f"Your name is {w}."},
            ]
        }
        for w in words[2 * ROWS :]
    ]
    (folder / "chat.json").write_text(json.dumps(chats))
    untagged = [{"prompt": f"Add {a} and {b}.", "completion": str(a + b)} for a, b in sums[ROWS:]]
    (folder / "untagged.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in untagged[: ROWS // 8])
    )
    longer = [(draw.randint(100, 999), draw.randint(100, 999)) for _ in range(ROWS // 4)]
    lines = [f"How much is {a} and {b}?,{a + b}" for a, b in longer]
    (folder / "long_sums.csv").write_text("\n".join(["question,answer", *lines]) + "\n")


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("abdefgiklmnoprstu") for _ in range(draw.randint(3, 7)))


def job_config(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """Writes data and configuration below the folder and returns the configuration's path."""
    write_data(folder / "data")
    value: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data_dir": str(folder / "data"),
        "sources": [
            {"path": "addition.json", "category": "addition"},
            {"path": "words.jsonl", "category_column": "topic", "answer_column": "answer"},
            {"path": "chat.json", "category": "chat"},
            {"path": "untagged.jsonl"},
        ],
        "ingest": {"estimate_share": 0.15, "test_share": 0.15, "min_train_rows": 48},
        "model": {
            "path": "builtin:tiny",
            "max_length": 96,
            "tiny": {
                "vocab_size": 400,
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 2,
                "warmup_tokens": 12_000,
            },
        },
        "tag": {"accuracy_rows": 40},
        "influence": {
            "rows_per_category": 48,
            "dose_rows": 48,
            "heldout_rows": 12,
            "replications": 2,
            "learning_rate": 2.0e-3,
            "targets": {"long sums": {"path": "long_sums.csv", "answer_column": "answer"}},
        },
        "solve": {"budget": 200, "importance": "uniform", "move": 0.2},
        "curriculum": {"num_stages": 2, "bootstrap": 20},
        "train": {"batch_size": 16, "learning_rate": 2.0e-3, "checkpoint_every": 4},
        "evaluate": {"seeds": 2, "test_rows": 12, "accuracy_rows": 4, "max_new_tokens": 8},
        "cluster": {"num_cpus": 3, "num_tuners": 2, "engine_memory_gib": 0.25},
    }
    for section, fields in changes.items():
        value[section] = {**value[section], **fields}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def command(*arguments: str) -> list[str]:
    """The command line of instructmix, with this interpreter."""
    return [sys.executable, "-m", "system.cli", *arguments]


def environment(store: Path | None = None) -> dict[str, str]:
    """Of a run in a test: Ray's processes are not niced, so that a loaded machine is no excuse.

    Args:
        store: what `teststore://` is kept in, where it is used.
    """
    found = {**os.environ, "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)}
    if store is not None:
        found["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent / "store")
        found["INSTRUCTMIX_TESTSTORE"] = str(store)
    return found


def run_job(
    *arguments: str, timeout: float = 1200, store: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs instructmix to its end."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(store),
        cwd=ROOT,
        check=False,
    )


def results(run_dir: Path) -> dict[str, Any]:
    """What must not depend on accidents, of the stages that are done: every number."""
    mix = json.loads((run_dir / "mix/mix.json").read_text())
    del mix["solver"]["seconds"]
    found: dict[str, Any] = {
        "mix": mix,
        "matrix": pq.read_table(run_dir / "influence/matrix.parquet").to_pylist(),
        "curriculum": json.loads((run_dir / "curriculum/curriculum.json").read_text()),
    }
    if (run_dir / "selection/record.json").exists():
        found["selection"] = pq.read_table(run_dir / "selection/parts").to_pylist()
    if (run_dir / "train/record.json").exists():
        found["weights"] = (run_dir / "train/model/model.safetensors").read_bytes()
        found["losses"] = pq.read_table(run_dir / "eval/losses.parquet").to_pylist()
    return found


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """A run from raw files to the report."""

    config: Path
    output: subprocess.CompletedProcess[str]
    results: dict[str, Any]
    """As they were then: tests go on in the same directory."""

    @classmethod
    def of(cls, config: Path, output: subprocess.CompletedProcess[str]) -> WholeRun:
        """The run that a command has just made."""
        assert output.returncode == 0, output.stdout + output.stderr
        return cls(config=config, output=output, results=results(config.parent / "run"))

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return self.config.parent / "run"

    def begin_another(self, folder: Path, *stages: str) -> Path:
        """The configuration of the same job on the same data with a run directory below another
        folder, where these stages are done."""
        for stage in stages:
            done = STAGE_FOLDERS[stage]
            shutil.copytree(self.run_dir / done, folder / "run" / done, symlinks=True)
        value = yaml.safe_load(self.config.read_text())
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(value | {"run_dir": str(folder / "run")}))
        return path

    def assert_same(self, run_dir: Path, but: str = "") -> None:
        """Another run has the same results, as far as it went; one of them may differ."""
        other = {name: value for name, value in results(run_dir).items() if name != but}
        assert {name: self.results[name] for name in other} == other
