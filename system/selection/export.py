"""`instructmix export`: writes the selected examples for another trainer, in training order.

The trainer must not shuffle the rows, or the curriculum is lost.  So the files that come with the
rows (dataset_info.json, a configuration snippet) switch shuffling off in the trainer's settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from system import storage
from system.errors import ConfigError
from system.rundir import RunDir
from system.schema import SELECTION, check_table
from system.stages import STAGE_FOLDERS


def export_selection(run_dir_uri: str, trainer: str, out: str | None) -> str:
    """Writes the selected examples and returns the output directory.

    Args:
        run_dir_uri: a run whose stage `select` is finished.
        trainer: `hf`, `trl`, `llama-factory` or `axolotl`.
        out: output directory; None: `export/<trainer>` in the run directory, which must be local.

    Raises:
        ConfigError: stage `select` is not finished, or the output directory is not empty.
    """
    run_dir = RunDir(run_dir_uri)
    record = run_dir.read_record(STAGE_FOLDERS["select"])
    if record is None:
        raise ConfigError(
            f"{run_dir_uri}: expected a finished stage `select`, found none; run "
            "`instructmix run CONFIG --until select` first"
        )
    manifest = storage.read_json(run_dir.output_uri(record, "manifest"))
    folder = run_dir.output_uri(record, "selection")
    target = Path(storage.absolute(out or storage.join(run_dir.uri, "export", trainer)))
    # Files of an earlier export would mix with the new ones without anyone noticing.
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: expected a new or empty directory for the export")
    target.mkdir(parents=True, exist_ok=True)
    files = [storage.join(folder, item["path"]) for item in manifest["files"]]
    match trainer:
        case "hf":
            _write_hf(files, target)
        case "trl":
            _write_lines(target / "train.jsonl", (_messages(row) for row in _rows(files)))
        case "llama-factory":
            _write_llama_factory(files, target)
        case "axolotl":
            _write_axolotl(files, target)
        case _:
            raise ConfigError(
                "export: expected a format among hf, trl, llama-factory and axolotl, found "
                f"{trainer!r}"
            )
    return str(target)


def _tables(files: list[str]) -> Iterator[pa.Table]:
    for uri in files:
        yield check_table(storage.read_table(uri), SELECTION, uri)


def _rows(files: list[str]) -> Iterator[dict[str, Any]]:
    for table in _tables(files):
        for batch in table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{k: v for k, v in turn.items() if v is not None} for turn in row["messages"]]
    return {"messages": turns} | {name: row[name] for name in ("category", "stage", "id")}


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with storage.atomic_output(str(path)) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _write_hf(files: list[str], target: Path) -> None:
    """A directory for `datasets.load_from_disk`."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset(pa.concat_tables(_tables(files))).save_to_disk(str(target))


def _write_llama_factory(files: list[str], target: Path) -> None:
    roles = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    rows = (
        {
            "conversations": [
                {"from": roles[m["role"]], "value": m["content"]} for m in row["messages"]
            ],
            "category": row["category"],
            "stage": row["stage"],
        }
        for row in _rows(files)
    )
    _write_lines(target / "instructmix.jsonl", rows)
    info = {
        "instructmix": {
            "file_name": "instructmix.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations"},
        }
    }
    storage.write_json(str(target / "dataset_info.json"), info)
    _write_yaml(
        target / "train.yaml",
        {"dataset": "instructmix", "dataset_dir": ".", "disable_shuffling": True},
    )


def _write_axolotl(files: list[str], target: Path) -> None:
    _write_lines(target / "train.jsonl", (_messages(row) for row in _rows(files)))
    _write_yaml(
        target / "axolotl.yaml",
        {
            "datasets": [
                {"path": "train.jsonl", "ds_type": "json", "type": "chat_template"},
            ],
            "shuffle_merged_datasets": False,
            "curriculum_sampling": True,
            # Packing samplers draw their own order.
            "sample_packing": False,
        },
    )


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    storage.write_bytes(str(path), yaml.safe_dump(value, sort_keys=False).encode())
