"""The tag stage on a real Ray and engine: everything tagged, nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from engine_builders import CONTEXT, build_model

from actors.cluster import Cluster
from actors.pool import ActorSpec
from actors.stage import StageContext
from actors.tagger import run
from system.config import ClusterConfig, RunConfig
from system.data.corpus import Corpus, make_manifest, write_manifest, write_shard
from system.errors import DataError
from system.progress import Progress
from system.rundir import RunDir, StageRecord
from system.schema import CORPUS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS = {"math": "add", "Code": "print", "code": "loop", None: "sing"}
"""Category -> word of its instructions."""


def rows_of(category: str | None, word: str, split: str, count: int) -> pa.Table:
    turns = [
        [{"role": "user", "content": f"{word} {n} {split}"}, {"role": "assistant", "content": "ok"}]
        for n in range(count)
    ]
    return pa.table(
        {
            "id": [f"{word}{split}{n:020d}"[-32:].rjust(32, "0") for n in range(count)],
            "category": [category] * count,
            "source": ["s"] * count,
            "messages": turns,
            "answer": [None] * count,
            "answer_pattern": [None] * count,
            "score": [None] * count,
            "embedding": [None] * count,
        },
        schema=CORPUS,
    )


class World:
    """A corpus, a model and one local Ray for all tests of this module."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_model(root / "model", 0)
        shards = []
        for place, (category, word) in enumerate(ROWS.items()):
            for split, count in (("train", 300), ("estimate", 20), ("test", 20)):
                name = f"{place}-{split}.arrow"
                rows = rows_of(category, word, split, count)
                shards.append(write_shard(str(root / "corpus"), name, rows, split, category))
        manifest = make_manifest(shards, read=1360, kept=1360)
        write_manifest(str(root / "corpus" / "manifest.json"), manifest)
        self.cluster = Cluster(ClusterConfig(address="local", num_cpus=1))

    def context(
        self,
        attempt: str,
        manifest: str = "corpus/manifest.json",
        cluster: Cluster | None = None,
        *,
        min_train_rows: int = 32,
        accuracy_rows: int = 30,
    ) -> StageContext:
        config = RunConfig.model_validate(
            {
                "run_dir": str(self.root),
                "sources": [{"path": "unused.jsonl"}],
                "model": {"path": "builtin:tiny", "max_length": CONTEXT},
                "solve": {"budget": 10},
                "ingest": {"min_train_rows": min_train_rows},
                "tag": {"accuracy_rows": accuracy_rows},
                "cluster": {"engine_memory_gib": 0.1},
            }
        )
        upstream = {
            "ingest": record("ingest", {"manifest": manifest}),
            "model": record("model", {"model": "model"}),
        }
        return StageContext(
            config=config,
            run_dir=RunDir(str(self.root)),
            attempt=str(self.root / "attempts" / attempt),
            upstream=upstream,
            progress=Progress(is_terminal=False),
            cluster=cluster or self.cluster,
        )

    def path(self, attempt: str, *parts: str) -> Path:
        return self.root.joinpath("attempts", attempt, *parts)


class IdleCluster(Cluster):
    """Hands out the pool, but lets it start nothing."""

    def __init__(self, world: World) -> None:
        super().__init__(ClusterConfig())
        self._world = world

    def pool(self, spec: ActorSpec) -> Any:
        pool = self._world.cluster.pool(spec)

        class Idle:
            def __getattr__(self, name: str) -> Any:
                assert name not in ("submit", "map"), "a finished block was computed again"
                return getattr(pool, name)

        return Idle()


def record(stage: str, outputs: dict[str, str]) -> StageRecord:
    return StageRecord(
        stage=stage, fingerprint="f", inputs={}, outputs=outputs, counts={}, lines=(),
        seconds=0.0, finished="", versions={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("tag"))
    yield world
    world.cluster.shutdown()


@pytest.fixture(scope="module")
def tagged(world: World) -> Corpus:
    result = run(world.context("first"))
    assert result.counts["tagged"] == 340
    assert result.counts["renamed"] == 340
    return Corpus.open(str(world.path("first", "manifest.json")))


def all_rows(corpus: Corpus) -> dict[str, tuple[str, str]]:
    """Id -> (category by its shard, split); the column must say the same."""
    found = {}
    for shard in corpus.manifest.shards:
        table = corpus.read_shard(shard)
        assert set(table["category"].to_pylist()) == {shard.category}
        assert table["id"].to_pylist() == sorted(table["id"].to_pylist())
        for row_id in table["id"].to_pylist():
            assert row_id not in found
            found[row_id] = (str(shard.category), shard.split)
    return found


def all_rows_of_ingest(world: World) -> dict[str, tuple[str, str]]:
    return all_rows(Corpus.open(str(world.root / "corpus" / "manifest.json")))


def test_every_row_ends_in_one_named_category_and_keeps_its_split(world, tagged):
    before = all_rows_of_ingest(world)
    after = all_rows(tagged)
    assert after.keys() == before.keys()
    assert {category for category, _ in after.values()} == {"Code", "math"}
    for row_id, (category, split) in before.items():
        assert after[row_id][1] == split
        if category in ("math", "Code"):
            assert after[row_id][0] == category
        elif category == "code":
            assert after[row_id][0] == "Code"
    assert tagged.categories == ("Code", "math")
    assert tagged.manifest.untagged == {"train": 0, "estimate": 0, "test": 0}


def test_shards_that_did_not_change_are_taken_over_not_copied(world, tagged):
    for category in ("math", "Code"):
        paths = [shard.path for shard in tagged.shards("train", category) if shard.rows == 300]
        assert any(path.startswith("../../corpus/") for path in paths)


def test_accuracy_is_measured_on_equal_numbers_of_known_rows(world, tagged):
    accuracy = json.loads(world.path("first", "accuracy.json").read_text())
    assert accuracy["rows"] == 30
    assert set(accuracy["recall"]) == {"Code", "math"}
    assert sum(sum(row.values()) for row in accuracy["confusion"].values()) == 30
    assert accuracy["accuracy"]["low"] <= accuracy["accuracy"]["value"]


def test_a_stage_that_died_after_its_blocks_computes_nothing_again(world, tagged):
    manifest = world.path("first", "manifest.json").read_bytes()
    world.path("first", "manifest.json").unlink()
    world.path("first", "accuracy.json").unlink()
    run(world.context("first", cluster=IdleCluster(world)))
    assert world.path("first", "manifest.json").read_bytes() == manifest


def test_only_a_lost_block_is_computed_again_and_comes_out_the_same(world, tagged):
    blocks = sorted(world.path("first", "blocks").glob("shard-*.parquet"))
    assert len(blocks) == 4
    before = blocks[1].read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in blocks}
    blocks[1].unlink()
    run(world.context("first"))
    assert blocks[1].read_bytes() == before
    changed = [path for path in blocks if path.stat().st_mtime_ns != stamps[path]]
    assert changed == [blocks[1]]


def test_where_every_row_has_a_category_the_corpus_passes_through_untouched(world):
    whole = Corpus.open(str(world.root / "corpus" / "manifest.json")).manifest
    kept = [shard for shard in whole.shards if shard.category in ("math", "Code")]
    write_manifest(str(world.root / "corpus" / "tagged.json"), make_manifest(kept))
    context = world.context("through", "corpus/tagged.json", accuracy_rows=0)
    result = run(context)
    assert "tags" not in result.outputs
    passed = Corpus.open(str(world.path("through", "manifest.json")))
    assert [shard.sha256 for shard in passed.manifest.shards] == [shard.sha256 for shard in kept]
    assert all_rows(passed).keys() <= all_rows_of_ingest(world).keys()
    assert json.loads(world.path("through", "accuracy.json").read_text()) is None


def test_a_category_with_too_few_rows_is_an_error_that_names_it(world):
    context = world.context("few", "corpus/tagged.json", accuracy_rows=0, min_train_rows=301)
    with pytest.raises(DataError, match=r"301 train rows.*'math': 300"):
        run(context)
