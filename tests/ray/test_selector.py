"""Stage `select` through actors: the same bytes for any number of them, and after a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from engine_builders import CONTEXT, build_model

from actors import selector
from actors.cluster import Cluster
from actors.stage import StageContext
from system.config import ClusterConfig, RunConfig, SelectConfig
from system.data.corpus import Corpus, make_manifest, write_manifest, write_shard
from system.errors import ConfigError
from system.models.base import load_model, load_tokenizer
from system.models.chat import encode
from system.progress import Progress
from system.rundir import RunDir, StageRecord
from system.schema import CORPUS
from system.scoring.parity import token_log_probs
from system.selection.difficulty import opening_ids
from system.selection.scores import read_scores

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS = 90
COUNTS = {"a": 30, "b": 25}
FUNCTION = """
def length(rows):
    return [float(len(turns[-1]["content"])) for turns in rows["messages"].to_pylist()]
"""


def category_rows(category: str) -> pa.Table:
    """Questions of very different length, some conversations with two answers."""
    draw = random.Random(category)
    words = ["two", "plus", "three", "capital", "name", "what", "is", "the"]
    rows = []
    for k in range(ROWS):
        turns = []
        for _ in range(1 + (k % 7 == 0)):
            asked = " ".join(draw.choices(words, k=draw.randint(1, 9)))
            answer = " ".join(draw.choices(words, k=draw.randint(1, 6)))
            turns += [
                {"role": "user", "content": f"{asked} {k}"},
                {"role": "assistant", "content": answer},
            ]
        rows.append(
            {
                "id": hashlib.sha256(f"{category}{k}".encode()).hexdigest()[:32],
                "category": category,
                "source": "s",
                "messages": turns,
                "score": float(k % 11),
                "embedding": [draw.gauss(0, 1) for _ in range(5)],
            }
        )
    rows.sort(key=lambda row: row["id"])
    return pa.Table.from_pylist(rows, schema=CORPUS)


class World:
    """A corpus and a model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_model(root / "model", 0)
        shards = []
        for category in COUNTS:
            table = category_rows(category)
            for start in range(0, ROWS, 25):
                path = f"{category}-{start}.arrow"
                part = table.slice(start, 25)
                shards.append(write_shard(str(root / "corpus"), path, part, "train", category))
        write_manifest(str(root / "corpus" / "manifest.json"), make_manifest(shards))
        stages = [
            {"name": "one", "counts": {"a": 10, "b": 20}},
            {"name": "two", "counts": {"a": 20, "b": 5}},
        ]
        (root / "curriculum.json").write_text(json.dumps({"stages": stages}))

    def context(self, attempt: str, cluster: Cluster, actors: int, **select: Any) -> StageContext:
        config = RunConfig.model_validate(
            {
                "run_dir": str(self.root),
                "sources": [{"path": "x", "score_column": "s", "embedding_column": "v"}],
                "model": {"path": "builtin:tiny", "max_length": CONTEXT},
                "solve": {"budget": 10},
                "select": select,
                "cluster": {
                    "engine_memory_gib": 0.1,
                    "num_scorers": actors,
                    "num_ingestors": actors,
                },
            }
        )
        upstream = {
            "model": record("model", {"model": "model"}),
            "tag": record("tag", {"manifest": "corpus/manifest.json"}),
            "curriculum": record("curriculum", {"curriculum": "curriculum.json"}),
        }
        return StageContext(
            config=config,
            run_dir=RunDir(str(self.root)),
            attempt=str(self.root / "attempts" / attempt),
            upstream=upstream,
            progress=Progress(is_terminal=False),
            cluster=cluster,
        )

    def files(self, attempt: str) -> dict[str, bytes]:
        folder = self.root / "attempts" / attempt
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def record(stage: str, outputs: dict[str, str]) -> StageRecord:
    return StageRecord(
        stage=stage, fingerprint="0" * 16, inputs={}, outputs=outputs, counts={}, lines=(),
        seconds=0.0, finished="", versions={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("select"))


@pytest.fixture(scope="module")
def clusters() -> Iterator[list[Cluster]]:
    """Two drivers' views of one Ray, so that one can have more actors than the other."""
    # Room for the scorers of both, and a selector beside them.
    found = [Cluster(ClusterConfig(address="local", num_cpus=6)), Cluster(ClusterConfig())]
    for cluster in found:
        cluster.connect()
    yield found
    for cluster in found:
        cluster.close_pools()
    ray.shutdown()


def by_hand(world: World, score: str) -> dict[str, float]:
    """The definitions, with transformers, one row at a time."""
    model = load_model(str(world.root / "model"))
    tokenizer = load_tokenizer(str(world.root / "model"))
    opening = opening_ids(tokenizer)
    assert tokenizer.decode(opening) == "<|im_start|>assistant\n"
    found = {}
    for category in COUNTS:
        for row in category_rows(category).to_pylist():
            encoded = encode(tokenizer, row["messages"], CONTEXT)
            mask = encoded.response_mask
            loss = -token_log_probs(model, encoded.input_ids.tolist())[mask[1:]].mean()
            if score == "ifd":
                alone, said = [], []
                for token, is_response in zip(encoded.input_ids, mask, strict=True):
                    if is_response:
                        said.append(int(token))
                    elif said:
                        alone.append(said)
                        said = []
                alone += [said] if said else []
                values = [
                    token_log_probs(model, [*opening, *part])[len(opening) - 1 :] for part in alone
                ]
                loss /= -np.concatenate(values).mean()
            found[row["id"]] = float(loss)
    return found


@pytest.mark.parametrize("score", ["loss", "ifd"])
def test_difficulty_is_its_definition_for_any_number_of_scorers(world, clusters, score):
    names = [f"{score}-{actors}" for actors in (1, 2)]
    for name, cluster, actors in zip(names, clusters, (1, 2), strict=True):
        selector.run(world.context(name, cluster, actors, method="quality", score=score))
    one, two = (world.files(name) for name in names)
    assert one == two
    assert sum(path.startswith("scores/") for path in one) == 8
    corpus = Corpus.open(str(world.root / "corpus" / "manifest.json"))
    rule = SelectConfig(method="quality", score=score)
    expected = by_hand(world, score)
    seen = 0
    for category in COUNTS:
        for shard in corpus.shards("train", category):
            table = read_scores(corpus, shard, rule, str(world.root / "attempts" / names[0]))
            ids = corpus.read_shard(shard, ["id"])["id"].to_pylist()
            wanted = np.array([expected[row_id] for row_id in ids])
            np.testing.assert_allclose(np.asarray(table["score"]), wanted, rtol=1e-4)
            behind = np.array(["ifd-not-below-one" if w >= 1 else None for w in wanted], object)
            if score == "ifd":
                assert table["reason"].to_pylist() == behind.tolist()
            seen += len(ids)
    assert seen == 2 * ROWS


def test_a_killed_stage_goes_on_with_the_scores_that_are_there(world, clusters):
    context = world.context("again", clusters[0], 1, method="quality", score="loss")
    selector.run(context)
    first = world.files("again")
    folder = Path(context.attempt)
    paths = sorted(folder.glob("scores/*.parquet"))
    for path in paths[:3]:
        path.unlink()
    (folder / "manifest.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in paths[3:]}
    selector.run(context)
    assert world.files("again") == first
    assert {path: path.stat().st_mtime_ns for path in paths[3:]} == times


RULES = {
    "cover": {"method": "facility-location", "block_rows": 16},
    "diverse": {"method": "quality+diversity", "max_similarity": 0.6},
    "model": {"method": "facility-location", "embedding": "model", "block_rows": 64},
}


@pytest.mark.parametrize("name", RULES)
def test_bytes_do_not_depend_on_the_number_of_actors(world, clusters, name):
    results = []
    for actors in (1, 2):
        given = world.context(f"{name}-{actors}", clusters[actors - 1], actors, **RULES[name])
        results.append(selector.run(given))
    assert results[0] == results[1]
    one = world.files(f"{name}-1")
    assert one == world.files(f"{name}-2")
    table = pq.read_table(world.root / "attempts" / f"{name}-1" / "parts")
    assert {c: table["category"].to_pylist().count(c) for c in COUNTS} == COUNTS
    assert results[0].lines[1].startswith(f"method {RULES[name]['method']}")
    assert not [path for path in one if path.startswith("work/")]


def test_a_users_function_runs_in_the_actors(world, clusters, tmp_path, monkeypatch):
    (tmp_path / "lengths_of_rows.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    rule = {"method": "quality", "score": "lengths_of_rows:length", "repeats": False}
    context = world.context("function", clusters[1], 2, **rule)
    result = selector.run(context)
    table = pq.read_table(Path(context.attempt, "parts"))
    chosen = {row["id"] for row in table.to_pylist() if row["category"] == "a"}
    lengths = {
        row["id"]: len(row["messages"][-1]["content"]) for row in category_rows("a").to_pylist()
    }
    left = [length for row_id, length in lengths.items() if row_id not in chosen]
    assert min(lengths[row_id] for row_id in chosen) >= max(left)
    assert "by lengths_of_rows:length, highest first" in result.lines[1]
    missing = dataclasses.replace(
        context,
        attempt=str(world.root / "attempts" / "missing"),
        config=world.context("x", clusters[1], 2, method="quality", score="not_here:f").config,
    )
    with pytest.raises(ConfigError, match="expected a module 'not_here'"):
        selector.run(missing)
