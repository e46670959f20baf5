"""The input of the report: all outputs of a run, read once.

Outputs are found through the records of the stages; those of stages that have not run are None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from system import storage
from system.curriculum.records import Curriculum
from system.data.corpus import Manifest, read_manifest
from system.errors import ConfigError, DataError
from system.influence.estimate.comparison import Comparison, compare_runs
from system.influence.estimate.matrix import EffectMatrix
from system.rundir import RunDir, StageRecord
from system.solve.mix import Mix
from system.stages import STAGE_FOLDERS
from system.taxonomy.records import Taxonomy


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """Results of the influence stage."""

    matrices: dict[str, EffectMatrix]
    """Direction (`add`, `remove`) -> effects per example, measured at the largest dose."""
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results of the evaluate stage."""

    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Everything that the report shows, as the stages wrote it."""

    run_dir: str
    config: dict[str, Any]
    """The resolved configuration of the last `run`."""
    records: dict[str, StageRecord]
    """Finished stages in the order of the pipeline, without the stage `report`."""
    corpus: Manifest | None
    """The corpus after tagging, or after ingest if tagging has not run."""
    tagging: dict[str, Any] | None
    """Accuracy of tagging; None if it was not measured."""
    influence: Influence | None
    mix: Mix | None
    sweep: list[dict[str, Any]] | None
    """Predicted gain at several shares that may move: `system.solve.solve.MovePoint` as JSON."""
    taxonomy: Taxonomy | None
    curriculum: Curriculum | None
    training: list[dict[str, Any]] | None
    """One record per optimiser step, in order."""
    evaluation: Evaluation | None
    comparisons: tuple[Comparison, ...] = ()
    """Comparisons with other runs that measured the same effects (`--compare`)."""

    @classmethod
    def open(cls, run_dir_uri: str, compare: Sequence[str] = ()) -> RunView:
        """Reads a run directory.

        Args:
            run_dir_uri: the run.
            compare: run directories whose effects are compared with those of this run.

        Raises:
            ConfigError: there is no run directory, or a compared run has no measured effects.
            DataError: an output that a record names cannot be read, or compared runs have too few
                categories in common.
        """
        run_dir = RunDir(run_dir_uri)
        config_uri = storage.join(run_dir.uri, "config.json")
        if not storage.exists(config_uri):
            raise ConfigError(
                f"{run_dir_uri}: expected a run directory, found no config.json in it; check the "
                "path, or create a run with `instructmix run CONFIG`"
            )
        by_stage = {
            stage: run_dir.read_record(folder)
            for stage, folder in STAGE_FOLDERS.items()
            if stage != "report"
        }
        records = {stage: record for stage, record in by_stage.items() if record is not None}
        outputs = _Outputs(run_dir, records)
        return cls(
            run_dir=run_dir.uri,
            config=storage.read_json(config_uri),
            records=records,
            corpus=outputs.manifest("tag") or outputs.manifest("ingest"),
            tagging=outputs.json("tag", "accuracy"),
            influence=outputs.influence(),
            mix=outputs.mix(),
            sweep=outputs.json("solve", "sweep"),
            taxonomy=outputs.taxonomy(),
            curriculum=outputs.curriculum(),
            training=outputs.json_lines("train", "metrics"),
            evaluation=outputs.evaluation(),
            comparisons=tuple(compare_runs(run_dir.uri, other) for other in compare),
        )


class _Outputs:
    """Reads outputs by stage and name; the result is None if the stage has not run."""

    def __init__(self, run_dir: RunDir, records: dict[str, StageRecord]) -> None:
        self.run_dir = run_dir
        self.records = records

    def uri(self, stage: str, output: str) -> str | None:
        """URI of an output."""
        record = self.records.get(stage)
        return None if record is None else self.run_dir.output_uri(record, output)

    def json(self, stage: str, output: str) -> Any:
        """A JSON output."""
        uri = self.uri(stage, output)
        return None if uri is None else storage.read_json(uri)

    def json_lines(self, stage: str, output: str) -> list[dict[str, Any]] | None:
        """An output with one JSON value per line."""
        uri = self.uri(stage, output)
        if uri is None:
            return None
        rows = []
        for number, line in enumerate(storage.read_bytes(uri).splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"{uri}, line {number}: expected JSON, found something else ({error}); run "
                    f"the stage {stage} again with --redo {stage}"
                ) from error
        return rows

    def manifest(self, stage: str) -> Manifest | None:
        """The corpus that a stage wrote."""
        uri = self.uri(stage, "manifest")
        return None if uri is None else read_manifest(uri)

    def influence(self) -> Influence | None:
        """Matrices of all directions, and the summary."""
        uri = self.uri("influence", "matrix")
        if uri is None:
            return None
        table = storage.read_table(uri)
        return Influence(
            matrices={
                direction: EffectMatrix.from_table(table, direction=direction, where=uri)
                for direction in _directions(table)
            },
            summary=self.json("influence", "summary"),
        )

    def mix(self) -> Mix | None:
        """The solved mix."""
        uri = self.uri("solve", "mix")
        return None if uri is None else Mix.from_json(storage.read_bytes(uri).decode())

    def taxonomy(self) -> Taxonomy | None:
        """Dependencies and levels."""
        content = self.json("curriculum", "taxonomy")
        return None if content is None else Taxonomy.from_json(content)

    def curriculum(self) -> Curriculum | None:
        """Stages and their counts."""
        content = self.json("curriculum", "curriculum")
        return None if content is None else Curriculum.from_json(content)

    def evaluation(self) -> Evaluation | None:
        """Losses, differences and accuracies."""
        summary = self.json("evaluate", "summary")
        return None if summary is None else Evaluation(summary=summary)


def _directions(table: pa.Table) -> list[str]:
    return sorted(set(table.column("direction").to_pylist()), reverse=True)
