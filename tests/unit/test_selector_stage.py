"""Stage `select` as a whole, its actors' own objects called in this process instead of through Ray.

tests/ray/test_selector.py runs it with Ray and the real engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from selection_world import corpus_of, rows

from actors import selector
from actors.cluster import Cluster
from actors.pool import ActorSpec
from actors.stage import StageContext
from system.config import RunConfig
from system.errors import DataError
from system.progress import Progress
from system.rundir import RunDir, StageRecord

RULES: dict[str, dict[str, Any]] = {
    "random": {},
    "quality": {"method": "quality"},
    "function": {"method": "quality", "score": "stage_scores:length", "order": "lowest"},
    "diverse": {"method": "quality+diversity", "max_similarity": 0.3, "order": "lowest"},
    "cover": {"method": "facility-location", "block_rows": 16},
    "column": {"method": "facility-location", "embedding": "column", "block_rows": 64},
}
FUNCTION = """
def length(rows):
    return [float(len(turns[-1]["content"])) for turns in rows["messages"].to_pylist()]
"""


class DriverKilledError(Exception):
    """The driver dies."""


class HerePool:
    """Does the units in this process, last ones first, until it is killed."""

    def __init__(self, spec: ActorSpec, cluster: HereCluster) -> None:
        self._actor = spec.actor_class(*spec.args)
        self._cluster = cluster

    def map(self, units: Mapping[Any, tuple[Any, ...]], method: str) -> Iterator[tuple[Any, Any]]:
        for key, args in reversed(units.items()):
            self._cluster.use_up_one()
            yield key, getattr(self._actor, method)(*args)


class HereCluster(Cluster):
    def __init__(self, num_units: int | None = None) -> None:
        self.left = num_units
        self.done = 0

    def use_up_one(self) -> None:
        if self.left is not None and self.done >= self.left:
            raise DriverKilledError
        self.done += 1

    def pool(self, spec: ActorSpec) -> Any:
        return HerePool(spec, self)

    def close_pool(self, name: str) -> None:
        pass


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stage")
    words = ["lion", "tiger", "sum", "city", "river"]
    tables = []
    for place, category in enumerate("ab"):
        texts = [" ".join(words[: 1 + k % 5] + [words[k % 3]] * (k % 4)) for k in range(50)]
        vectors = [[float(k % 7), 1.0, float(k % 3)] for k in range(50)]
        scores = [float(k % 9) for k in range(50)]
        scores[7] = float("nan")
        tables.append(
            rows(50, category=category, start=100 * place, score=scores, vectors=vectors,
                 texts=texts)
        )  # fmt: skip
    for size in (15, 50):
        corpus_of(root / f"corpus-{size}", size, *tables)
    stages = [
        {"name": "one", "counts": {"a": 10, "b": 20}},
        {"name": "two", "counts": {"a": 20, "b": 5}},
    ]
    (root / "curriculum.json").write_text(json.dumps({"stages": stages}))
    (root / "stage_scores.py").write_text(FUNCTION)
    return root


def context(root: Path, name: str, cluster: Cluster, size: int, **select: Any) -> StageContext:
    config = RunConfig.model_validate(
        {
            "run_dir": str(root), "solve": {"budget": 10},
            "sources": [{"path": "x", "score_column": "s", "embedding_column": "v"}],
            "model": {"path": "builtin:tiny"}, "select": select,
        }
    )  # fmt: skip
    outputs = {
        "tag": {"manifest": f"corpus-{size}/manifest.json"},
        "curriculum": {"curriculum": "curriculum.json"},
    }
    return StageContext(
        config=config,
        run_dir=RunDir(str(root)),
        attempt=str(root / name),
        upstream={
            stage: StageRecord(
                stage=stage, fingerprint="0" * 16, inputs={}, outputs=found, counts={}, lines=(),
                seconds=0.0, finished="", versions={},
            )
            for stage, found in outputs.items()
        },
        progress=Progress(is_terminal=False),
        cluster=cluster,
    )  # fmt: skip


def files(root: Path, name: str, below: str = "") -> dict[str, bytes]:
    found = {str(p.relative_to(root / name)): p for p in (root / name).rglob("*") if p.is_file()}
    return {path: p.read_bytes() for path, p in sorted(found.items()) if path.startswith(below)}


@pytest.mark.parametrize("rule", RULES)
def test_a_stage_killed_on_its_way_ends_with_the_same_bytes(root, rule, monkeypatch):
    monkeypatch.chdir(root)
    calm = HereCluster()
    result = selector.run(context(root, f"{rule}-calm", calm, 15, **RULES[rule]))
    expected = files(root, f"{rule}-calm")
    for num_units in range(0, calm.done, 3):
        name = f"{rule}-{num_units}"
        with pytest.raises(DriverKilledError):
            selector.run(context(root, name, HereCluster(num_units), 15, **RULES[rule]))
        assert "manifest.json" not in files(root, name)
        rest = HereCluster()
        assert selector.run(context(root, name, rest, 15, **RULES[rule])) == result
        assert files(root, name) == expected
    other = selector.run(context(root, f"{rule}-other", HereCluster(), 50, **RULES[rule]))
    assert other == result
    assert files(root, f"{rule}-other", "parts/") == files(root, f"{rule}-calm", "parts/")


def test_the_record_says_how_rows_were_chosen_and_what_was_left_out(root):
    rule = {**RULES["diverse"], "max_quarantined_share": 0.1}
    done = context(root, "told", HereCluster(), 15, **rule)
    result = selector.run(done)
    assert result.counts["method"] == {
        "method": "quality+diversity", "score": "column", "order": "lowest",
        "embedding": "tf-idf", "max_similarity": 0.3, "repeats": True,
        "max_quarantined_share": 0.1,
    }  # fmt: skip
    found = result.counts["categories"]
    assert {name: item["quarantined"] for name, item in found.items()} == {
        name: {"score-not-finite": 1} for name in "ab"
    }
    assert all(item["notes"]["too-similar"] > 0 for item in found.values())
    assert "quarantined 2 (score-not-finite 2)" in result.lines[1]
    assert "similarity on tf-idf at most 0.3; too-similar" in result.lines[1]
    listed = pq.read_table(Path(done.attempt, "quarantined.parquet"))
    assert listed.num_rows == 2
    assert result.counts["repeats"]
    refused = context(root, "refused", HereCluster(), 15, **rule, repeats=False)
    with pytest.raises(DataError, match=r"select\.repeats is false"):
        selector.run(refused)
    strict = context(root, "strict", HereCluster(), 15, method="quality", max_quarantined_share=0.0)
    with pytest.raises(DataError, match="2 of 100 train rows have no usable score or vector"):
        selector.run(strict)
