"""The influence stage on a small corpus, whose trainings can be counted and killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from influence_corpus import build_inputs, influence_config

from actors.cluster import Cluster
from actors.influence.influencer import run
from actors.stage import StageContext, StageResult
from system import storage
from system.config import RunConfig
from system.influence.estimate.matrix import EffectMatrix
from system.progress import Bar, Progress
from system.rundir import RunDir, StageRecord


def record(stage: str, output: str, path: Path) -> StageRecord:
    return StageRecord(
        stage=stage, fingerprint="f", inputs={}, outputs={output: str(path)}, counts={}, lines=(),
        seconds=0.0, finished="", versions={},
    )  # fmt: skip


class Killed(BaseException):
    """Ends the driver's loop as a signal would, wherever it is."""


class StopsAfter(Progress):
    """A bar that ends the driver after a number of finished runs, found ones included.

    -1 ends it before it starts a run.
    """

    def __init__(self, finished: int) -> None:
        super().__init__(is_terminal=False)
        self.left = finished
        self.found: int | None = None
        """Runs that were there already."""

    def bar(self, label: str, total: int) -> Bar:
        owner = self

        class Counting(Bar):
            def skip(self, amount: int) -> None:
                if owner.found is None:
                    owner.found = amount
                self.advance(amount)

            def advance(self, amount: int = 1) -> None:
                owner.left -= amount
                if owner.left < 0:
                    raise Killed

        return Counting(label, total, False)


class Trainings(Progress):
    """Counts the runs that a stage makes itself."""

    def __init__(self) -> None:
        super().__init__(is_terminal=False)
        self.finished = 0

    def bar(self, label: str, total: int) -> Bar:
        owner = self

        class Counting(Bar):
            def advance(self, amount: int = 1) -> None:
                owner.finished += amount

        return Counting(label, total, False)


class World:
    """One corpus and model, one Ray, many attempts."""

    def __init__(
        self,
        root: Path,
        build: Callable[[Path], object] = build_inputs,
        config: Callable[..., RunConfig] = influence_config,
    ) -> None:
        self.root = root
        self.config = config
        build(root)
        self.cluster = Cluster(config(root).cluster)

    def context(
        self, name: str, config: RunConfig, progress: Progress | None = None
    ) -> StageContext:
        """`name` or `name/attempt`: attempts of one name share their finished runs."""
        name, _, attempt = name.partition("/")
        return StageContext(
            config=config,
            run_dir=RunDir(str(self.root)),
            attempt=str(self.root / "attempts" / name / (attempt or "0")),
            upstream={
                "tag": record("tag", "manifest", Path("corpus/manifest.json")),
                "model": record("model", "model", Path("model")),
            },
            progress=progress or Progress(is_terminal=False),
            cluster=self.cluster,
        )

    def run(
        self,
        name: str,
        progress: Progress | None = None,
        num_tuners: int = 1,
        **influence: object,
    ) -> StageResult:
        config = self.config(self.root, **influence)
        cluster = config.cluster.model_copy(update={"num_tuners": num_tuners})
        config = config.model_copy(update={"cluster": cluster})
        return run(self.context(name, config, progress))

    def path(self, name: str, *parts: str) -> Path:
        name, _, attempt = name.partition("/")
        return self.root.joinpath("attempts", name, attempt or "0", *parts)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("influence"))
    yield world
    world.cluster.shutdown()


@pytest.fixture(scope="module")
def finished(world: World) -> StageResult:
    return world.run("whole")


def matrix(world: World, name: str, direction: str = "remove") -> EffectMatrix:
    table = storage.read_table(str(world.path(name, "matrix.parquet")))
    return EffectMatrix.from_table(table, direction=direction)
