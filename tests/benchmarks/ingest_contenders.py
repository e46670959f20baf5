"""What `bench_ingest.py` compares: the same rows, read, normalised and written, by each contender.

`instructmix` does more than the others: exact deduplication, shards by category with digests, a
manifest with exact counts.  The others run this project's own `normalise` (fast already) row by
row: normalised messages, content id, split.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Contender = Callable[[list[Path], Path, int], int]
"""Input files, output folder, worker processes -> rows that came out, duplicates counted."""


def instructmix(files: list[Path], out: Path, processes: int, **settings: Any) -> int:
    """This project: in this process, or in Ray actors."""
    if processes == 1:
        from system.data.ingest.ingest import ingest_local

        return ingest_local(_config(files, out, **settings), str(out / "attempt")).read
    return _on_ray(_config(files, out, "local", processes, **settings), out)


def instructmix_near(files: list[Path], out: Path, processes: int) -> int:
    """With near-deduplication."""
    return instructmix(files, out, processes, deduplicate="near")


def instructmix_raylets(files: list[Path], out: Path, processes: int) -> int:
    """So many raylets on this machine, one actor with one CPU on each."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
    raylets = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(processes - 1):
        raylets.add_node(**node)
    raylets.wait_for_nodes()
    read = _on_ray(_config(files, out, raylets.address, processes), out)
    ray.shutdown()
    raylets.shutdown()
    return read


def _config(
    files: list[Path], out: Path, address: str = "local", processes: int = 1, **settings: Any
) -> Any:
    from system.config import ClusterConfig, IngestConfig, ModelConfig, RunConfig, SolveConfig
    from system.config import SourceConfig as Source

    return RunConfig(
        run_dir=str(out),
        sources=(Source(path=str(files[0].parent / "*.jsonl"), category_column="task"),),
        ingest=IngestConfig(min_train_rows=1, min_heldout_rows=1, **settings),
        model=ModelConfig(path="builtin:tiny"),
        solve=SolveConfig(budget=100),
        cluster=ClusterConfig(address=address, num_ingestors=processes, num_cpus=processes),
    )


def _on_ray(config: Any, out: Path) -> int:
    from actors import ingestor
    from actors.cluster import Cluster
    from actors.stage import StageContext
    from system.progress import Progress
    from system.rundir import RunDir

    cluster = Cluster(config.cluster)
    context = StageContext(
        config=config,
        run_dir=RunDir(config.run_dir),
        attempt=str(out / "attempt"),
        upstream={},
        progress=Progress(False),
        cluster=cluster,
    )
    read = ingestor.run(context).counts["read"]
    cluster.shutdown()
    return read


def _normalised(prompt: str, completion: str) -> dict[str, Any]:
    from system.data.rows.conversation import normalise, split_of

    found = normalise([("user", prompt), ("assistant", completion)], 200_000)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(found.roles, found.contents, strict=True)
    ]
    return {"id": found.id, "messages": messages, "split": split_of(found.prompt_hash, 0.1, 0.1)}


def _normalised_row(row: dict[str, Any]) -> dict[str, Any]:
    return _normalised(row["prompt"], row["completion"])


def _normalised_batch(batch: Any) -> dict[str, Any]:
    rows = [
        _normalised(prompt, completion)
        for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
    ]
    return {name: [row[name] for row in rows] for name in ("id", "messages", "split")}


def _datasets(files: list[Path], out: Path, processes: int, batched: bool) -> int:
    import datasets

    datasets.disable_progress_bars()
    workers = processes if processes > 1 else None
    loaded = datasets.load_dataset(
        "json",
        data_files=[str(path) for path in files],
        split="train",
        cache_dir=str(out / "cache"),
        num_proc=workers,
    )
    mapped = loaded.map(
        _normalised_batch if batched else _normalised_row,
        batched=batched,
        remove_columns=["prompt", "completion"],
        num_proc=workers,
    )
    mapped.save_to_disk(str(out / "saved"), num_proc=workers)
    return len(mapped)


def datasets_map(files: list[Path], out: Path, processes: int) -> int:
    """`load_dataset("json")`, `.map` row by row, `save_to_disk`."""
    return _datasets(files, out, processes, batched=False)


def datasets_batched(files: list[Path], out: Path, processes: int) -> int:
    """The same with `batched=True`."""
    return _datasets(files, out, processes, batched=True)


def ray_data(files: list[Path], out: Path, processes: int) -> int:
    """`read_json`, `map_batches` of the same function, `write_parquet`."""
    import pyarrow.dataset
    import ray

    ray.init(
        address="local", num_cpus=processes, include_dashboard=False, log_to_driver=False,
        _temp_dir=os.environ.get("RAY_TMPDIR", "/tmp/bench-ray"),
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    mapped = ray.data.read_json([str(path) for path in files], lines=True).map_batches(
        lambda batch: {**_normalised_batch(batch), "task": batch["task"]}
    )
    mapped.write_parquet(str(out / "saved"))
    ray.shutdown()
    return pyarrow.dataset.dataset(str(out / "saved")).count_rows()


CONTENDERS: dict[str, Contender] = {
    "instructmix": instructmix,
    "instructmix-near": instructmix_near,
    "instructmix-raylets": instructmix_raylets,
    "datasets-map": datasets_map,
    "datasets-batched": datasets_batched,
    "ray-data": ray_data,
}


def uses_ray(name: str, processes: int) -> bool:
    """Whether the contender's work is done in processes that are not its children."""
    is_on_ray = name in ("ray-data", "instructmix-raylets")
    return is_on_ray or (name.startswith("instructmix") and processes > 1)
