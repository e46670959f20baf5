"""A run directory with as many finished stages as a test of `check` needs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from forecast_corpus import build_varied_inputs
from influence_corpus import influence_config

from actors.pipeline import STAGES, stage_inputs
from system import storage
from system.cli import main
from system.data.corpus import Corpus, make_manifest, moved_shards, write_manifest
from system.data.ingest.ingest import ingest_local
from system.data.lengths import SeededLengths, measure_shard, without_unusable
from system.influence.design.cost import InfluenceCost, influence_cost
from system.influence.design.heldout_cost import loss_heldout
from system.models.base import load_tokenizer
from system.rundir import RunDir, StageRecord, fingerprint


class Run:
    """A run directory whose first stages are done, as `run` leaves them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_varied_inputs(root)
        self.config = influence_config(root)
        self.records: dict[str, StageRecord] = {}

    def commit(self, name: str, outputs: dict[str, str], fill: Callable[[str], None]) -> None:
        stage = next(stage for stage in STAGES if stage.name == name)
        inputs = stage_inputs(stage, self.config, self.records)
        attempt = fingerprint(inputs)
        run_dir = RunDir(self.config.run_dir)
        uri = run_dir.attempt_uri(stage.folder, attempt)
        Path(uri).mkdir(parents=True)
        fill(uri)
        self.records[name] = StageRecord(
            stage=name, fingerprint=attempt, inputs=inputs, counts={}, lines=(), seconds=1.0,
            outputs={key: f"{stage.folder}/{attempt}/{path}" for key, path in outputs.items()},
            finished="", versions={},
        )  # fmt: skip
        run_dir.commit(stage.folder, self.records[name])

    def ingest(self) -> None:
        def fill(uri: str) -> None:
            ingest_local(self.config, uri)

        self.commit("ingest", {"manifest": "manifest.json"}, fill)

    def model(self) -> None:
        def fill(uri: str) -> None:
            shutil.copytree(self.root / "model", Path(uri) / "model")

        self.commit("model", {"model": "model"}, fill)

    def tag(self) -> None:
        corpus = Corpus.open(self.output("ingest", "manifest"))
        tokenizer = load_tokenizer(self.output("model", "model"))

        def fill(uri: str) -> None:
            found = [
                measure_shard(corpus, shard, uri, tokenizer, self.config.model.max_length)
                for shard in corpus.manifest.shards
            ]
            manifest = make_manifest(
                moved_shards(corpus, uri), read=corpus.manifest.read, kept=corpus.manifest.kept
            )
            write_manifest(storage.join(uri, "manifest.json"), without_unusable(manifest, found))

        self.commit("tag", {"manifest": "manifest.json"}, fill)

    def output(self, stage: str, name: str) -> str:
        return RunDir(self.config.run_dir).output_uri(self.records[stage], name)

    def cost(self) -> InfluenceCost:
        corpus = Corpus.open(self.output("tag", "manifest"))
        lengths = SeededLengths(corpus)
        return influence_cost(
            self.config.influence,
            run_seed=self.config.seed,
            sources=corpus.categories,
            lengths=lengths,
            heldout=loss_heldout(self.config, corpus.categories, lengths),
        )

    def check(self, *arguments: str) -> int:
        path = self.root / "config.json"
        path.write_text(json.dumps(self.config.model_dump(mode="json")))
        return main(["check", str(path), *arguments])
