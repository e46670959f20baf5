"""The small planted corpus as stage `tag` leaves it: with the length of every row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from influence_corpus import TASKS, build_inputs

from system.config import RunConfig
from system.data.corpus import Corpus, write_manifest
from system.data.ingest.ingest import ingest_local
from system.data.lengths import measure_shard, without_unusable
from system.models.base import load_tokenizer


def build_varied_inputs(root: Path) -> None:
    """As `build_inputs`, but with rows of many lengths: the planted ones are all alike."""
    config = build_inputs(root)
    shutil.rmtree(root / "corpus")
    for task in TASKS:
        path = root / "data" / f"{task}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["instruction"] += " please" * (number % 11)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest_local(config, str(root / "corpus"))


def tagged(root: Path, config: RunConfig) -> Corpus:
    """Measures `corpus/` for the configuration's max_length into a manifest beside the old one."""
    corpus = Corpus.open(str(root / "corpus" / "manifest.json"))
    tokenizer = load_tokenizer(root / "model")
    # Lengths are named by the shard alone: another max_length needs another directory.
    attempt = root / f"tags-{config.model.max_length}"
    if not attempt.exists():
        attempt.mkdir()
        (attempt / "shards").symlink_to(root / "corpus" / "shards")
    found = [
        measure_shard(corpus, shard, str(attempt), tokenizer, config.model.max_length)
        for shard in corpus.manifest.shards
    ]
    uri = str(attempt / "manifest.json")
    write_manifest(uri, without_unusable(corpus.manifest, found))
    return Corpus.open(uri)


def write_benchmark(root: Path, corpus: Corpus) -> str:
    """A file of rows for `influence.targets`; half of them are rows of the corpus."""
    lines = []
    for task in TASKS[:2]:
        for messages in corpus.sample("train", task, 6, 1)["messages"].to_pylist():
            lines.append({"prompt": messages[0]["content"], "completion": messages[1]["content"]})
    lines += [
        {"prompt": f"{line['prompt']} {number}", "completion": line["completion"]}
        for number, line in enumerate(lines)
    ]
    path = root / "data" / "benchmark.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.name
