"""Small inputs for ingest tests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from system import storage
from system.config import IngestConfig, ModelConfig, RunConfig, SolveConfig, SourceConfig
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local

LENIENT = {"min_train_rows": 1, "min_heldout_rows": 1, "max_rejected_share": 1.0}

BROKEN = [
    (b'{"prompt": "q", "completion": ', "bad-json"),
    (b'{"prompt": "\xff", "completion": "a"}', "bad-utf8"),
    (b'{"prompt": "\\ud800", "completion": "a"}', "bad-utf8"),
    ({"prompt": "q"}, "missing-field"),
    ({"prompt": "q", "completion": "  "}, "empty-turn"),
    ({"prompt": "q\x07", "completion": "a"}, "control-characters"),
    ({"prompt": "q" * 5000, "completion": "a"}, "too-long"),
]


def run_config(data_dir: Path, *sources: SourceConfig, **ingest: Any) -> RunConfig:
    return RunConfig(
        run_dir=str(data_dir / "run"),
        data_dir=str(data_dir),
        sources=sources or (SourceConfig(path="rows.jsonl"),),
        ingest=IngestConfig(**{**LENIENT, **ingest}),
        model=ModelConfig(path="builtin:tiny"),
        solve=SolveConfig(budget=100),
    )


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {k} plus {k}?", "completion": f"It is {2 * k}."}
        for k in range(start, start + count)
    ]


def messy_rows(seed: int, count: int = 400) -> list:
    """Good rows, repeats, broken rows and blank lines in random order."""
    draw = random.Random(seed)
    rows: list = []
    for k in range(count):
        kind = draw.random()
        if kind < 0.7 or not rows:
            rows.append({**numbered(1, k)[0], "task": draw.choice("ab")})
        elif kind < 0.85:
            rows.append(draw.choice(rows))
        elif kind < 0.95:
            rows.append(draw.choice(BROKEN)[0])
        else:
            rows.append(b"")
    return rows


def chained_rows(chains: int, links: int, words: int = 300) -> list[dict[str, str]]:
    """Chains of rows, each near to the one before it (similarity 0.8) and to no other."""
    draw = random.Random(1)
    rows = []
    for chain in range(chains):
        text = [f"c{chain}w{draw.randrange(10**6)}" for _ in range(words)]
        for link in range(links):
            rows.append({"prompt": " ".join(text), "completion": "ok"})
            changed = range(link * words // links, link * words // links + words // 11)
            text = [f"x{link}w{draw.randrange(10**6)}" if k in changed else word
                    for k, word in enumerate(text)]  # fmt: skip
    return rows


class Ingested:
    """A finished ingest, read back."""

    def __init__(self, config: RunConfig, attempt: Path) -> None:
        self.attempt = attempt
        self.manifest = ingest_local(config, str(attempt))
        self.corpus = Corpus.open(str(attempt / "manifest.json"))

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for split in ("train", "estimate", "test"):
            for category in (*self.corpus.categories, None):
                for table in self.corpus.iter_tables(split, category):
                    found += [{**row, "split": split} for row in table.to_pylist()]
        return found

    def turns(self) -> list[list[tuple[str, str]]]:
        return [[(m["role"], m["content"]) for m in row["messages"]] for row in self.rows()]

    def rejected(self) -> list[dict[str, Any]]:
        return pq.read_table(self.attempt / "rejected").to_pylist()

    def duplicates(self) -> list[dict[str, Any]]:
        return pq.read_table(self.attempt / "duplicates").to_pylist()

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.attempt)): path.read_bytes()
            for path in sorted(self.attempt.rglob("*"))
            if path.is_file()
        }


def ingest(tmp_path: Path, *sources: SourceConfig, **settings: Any) -> Ingested:
    attempt = tmp_path / "attempt"
    storage.delete(str(attempt))
    return Ingested(run_config(tmp_path, *sources, **settings), attempt)
