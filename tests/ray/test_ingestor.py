"""Ingest and select through actors on two raylets: the same bytes, whatever dies on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster as RayCluster

import actors.ingestor
import system.data.ingest.plan
from actors import selector
from actors.cluster import Cluster
from actors.stage import StageContext
from system.config import (
    ClusterConfig,
    IngestConfig,
    ModelConfig,
    RunConfig,
    SolveConfig,
    SourceConfig,
)
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local
from system.errors import DataError
from system.progress import Progress
from system.rundir import RunDir, StageRecord
from system.schema import SELECTION
from system.selection.select import select_arm

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Workers cannot import test modules.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_ROWS = 6000
DRIVER = """
import json, sys
from pathlib import Path
import system.data.ingest.plan
from actors import ingestor
from actors.cluster import Cluster
from actors.stage import StageContext
from system.config import RunConfig
from system.progress import Progress
from system.rundir import RunDir

system.data.ingest.plan.BUCKET_BYTES = int(sys.argv[3])
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
cluster = Cluster(config.cluster)
context = StageContext(config=config, run_dir=RunDir(config.run_dir), attempt=sys.argv[2],
                       upstream={}, progress=Progress(False), cluster=cluster)
print(json.dumps(ingestor.run(context).counts))
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    options: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000}
    raylets = RayCluster(
        initialize_head=True, head_node_args={**options, "include_dashboard": False}
    )
    raylets.add_node(**options)
    raylets.wait_for_nodes()
    assert raylets.address
    yield raylets.address
    ray.shutdown()
    raylets.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> RunConfig:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for k in range(NUM_ROWS):
            number = draw.randrange(4000)
            row = {"prompt": f"What is {number}?", "completion": f"{number} " * 20, "t": k % 3}
            file.write(json.dumps(row if k % 50 else {"prompt": "no answer"}) + "\n")
    return RunConfig(
        run_dir=str(folder / "run"),
        data_dir=str(folder),
        sources=(SourceConfig(path="rows.jsonl", category_column="t"),),
        ingest=IngestConfig(chunk_bytes=30_000, shard_rows=200),
        model=ModelConfig(path="builtin:tiny"),
        solve=SolveConfig(budget=100),
        cluster=ClusterConfig(address=ray_address, num_ingestors=3),
    )


@pytest.fixture(scope="module")
def reference(config: RunConfig) -> Path:
    """The result of the same code in one process, without Ray."""
    attempt = Path(config.run_dir, "reference")
    ingest_local(config, str(attempt))
    return attempt


@pytest.fixture(scope="module")
def cluster(config: RunConfig) -> Iterator[Cluster]:
    cluster = Cluster(config.cluster)
    yield cluster
    cluster.close_pools()


def files(attempt: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(attempt)): path.read_bytes()
        for path in sorted(attempt.rglob("*"))
        if path.is_file()
    }


def context(config: RunConfig, cluster: Cluster, attempt: Path, **upstream: Any) -> StageContext:
    return StageContext(
        config=config,
        run_dir=RunDir(config.run_dir),
        attempt=str(attempt),
        upstream=upstream,
        progress=Progress(False),
        cluster=cluster,
    )


def test_actors_write_the_bytes_of_a_single_process(config, cluster, reference, tmp_path):
    result = actors.ingestor.run(context(config, cluster, tmp_path / "a"))
    assert files(tmp_path / "a") == files(reference)
    counts = result.counts
    assert counts["read"] == NUM_ROWS
    assert counts["read"] == counts["kept"] + counts["duplicates"] + sum(
        counts["rejected"].values()
    )
    assert counts["rejected"] == {"missing-field": NUM_ROWS // 50}
    assert all((tmp_path / "a" / path).exists() for path in result.outputs.values())
    again = actors.ingestor.run(context(config, cluster, tmp_path / "a"))
    assert again == result


class _DyingIngestor(actors.ingestor.Ingestor):
    """Dies in the middle of its work, the first time it gets some of the units."""

    def do(self, step: str, unit: Any) -> Any:
        if step == "read":
            self._maybe_die(step, unit)
        outcome = super().do(step, unit)
        if step == "reduce":
            self._maybe_die(step, unit.index)
        return outcome

    def _maybe_die(self, what: str, index: int) -> None:
        marker = Path(self._plan.attempt + f".died-{what}-{index}")
        if index % 7 == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_actors_cost_nothing_but_time(config, cluster, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(actors.ingestor, "Ingestor", _DyingIngestor)
    actors.ingestor.run(context(config, cluster, tmp_path / "a"))
    assert files(tmp_path / "a") == files(reference)
    assert len(list(tmp_path.glob("a.died-read-*"))) > 3
    assert len(list(tmp_path.glob("a.died-reduce-*"))) > 0


def test_a_bad_input_keeps_its_error_through_an_actor(config, cluster, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "no known shape"}\n')
    bad = config.model_copy(update={"sources": (SourceConfig(path=str(tmp_path / "x.jsonl")),)})
    with pytest.raises(DataError, match=r"unknown format.*\['text'\]"):
        actors.ingestor.run(context(bad, cluster, tmp_path / "a"))
    assert not (tmp_path / "a" / "manifest.json").exists()


@pytest.mark.parametrize("phase", ["chunks", "buckets"])
def test_a_killed_driver_goes_on_where_it_was(config, reference, tmp_path, phase, monkeypatch):
    config_path = tmp_path / "config.json"
    config_path.write_text(config.model_dump_json())
    attempt = tmp_path / "attempt"
    # Many buckets make the second phase long enough to be hit.
    bucket_bytes = 15_000
    command = [sys.executable, "-c", DRIVER, str(config_path), str(attempt), str(bucket_bytes)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = attempt / "work" / phase
    deadline = time.monotonic() + 400
    while len(list(done.glob("*.json"))) < 3:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (attempt / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert finished
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(answer.stdout.splitlines()[-1])["read"] == NUM_ROWS
    monkeypatch.setattr(system.data.ingest.plan, "BUCKET_BYTES", bucket_bytes)
    ingest_local(config, str(tmp_path / "whole"))
    assert files(attempt) == files(tmp_path / "whole")
    one = Corpus.open(str(attempt / "manifest.json"))
    other = Corpus.open(str(reference / "manifest.json"))
    for category in other.categories:
        tables = [pa.concat_tables(c.iter_tables("train", category)) for c in (one, other)]
        assert tables[0].equals(tables[1])


def test_selection_through_actors_is_the_arm_in_memory(config, cluster, reference, tmp_path):
    curriculum = {
        "stages": [
            {"name": "early", "size": 500, "counts": {"0": 300, "1": 200, "2": 0}},
            {"name": "late", "size": 2500, "counts": {"0": 900, "1": 800, "2": 800}},
        ]
    }
    run_dir = Path(config.run_dir)
    (run_dir / "curriculum.json").write_text(json.dumps(curriculum))
    given = context(
        config,
        cluster,
        tmp_path / "a",
        tag=_record("tag", {"manifest": "reference/manifest.json"}),
        curriculum=_record("curriculum", {"curriculum": "curriculum.json"}),
    )
    result = selector.run(given)
    table = pq.read_table(tmp_path / "a" / result.outputs["selection"]).cast(SELECTION)
    corpus = Corpus.open(str(reference / "manifest.json"))
    counts = {"0": 1200, "1": 1000, "2": 800}
    assert table.equals(select_arm(corpus, counts, config.seed, curriculum=curriculum))
    assert result.counts["rows"] == 3000
    assert selector.run(given) == result
    manifest = json.loads((tmp_path / "a" / result.outputs["manifest"]).read_text())
    assert [item["rows"] for item in manifest["files"]] == [3000]
    assert sum(manifest["repeats"].values()) == result.counts["rows"] - len(
        set(table["id"].to_pylist())
    )


def _record(stage: str, outputs: dict[str, str]) -> StageRecord:
    return StageRecord(
        stage=stage,
        fingerprint="0" * 16,
        inputs={},
        outputs=outputs,
        counts={},
        lines=(),
        seconds=0.0,
        finished="",
        versions={},
    )
