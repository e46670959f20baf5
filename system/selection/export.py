"""`instructmix export`: writes the selected examples for another trainer, in training order.

The other trainer must neither shuffle the rows, or the curriculum is lost, nor learn the prompts.
So a script or a configuration with these settings comes with the rows.  Tools and tool calls are
written in the fields that each trainer documents.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from system import disk, storage
from system.errors import ConfigError
from system.rundir import RunDir
from system.schema import SELECTION, check_table
from system.selection.tool_columns import Structured, structured
from system.stages import STAGE_FOLDERS

_RESULTS_BORDER = "\n</tool_response>\n<tool_response>\n"
"""Between the results of parallel calls in one `observation` turn, as LLaMA-Factory's converter of
OpenAI messages joins them; its `sharegpt` format takes no two such turns in a row."""
_NO_TURN_MARKS = (
    "{count} examples have turns that are marked to have no loss. This trainer has no "
    "such mark and would learn them. Leave the examples out, or use axolotl."
)
_TEXT_BESIDE_CALLS = (
    "{count} turns hold text and tool calls. This format has no place for both, so calls "
    "stay in the text, as a line of JSON."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What `export_selection` has written."""

    path: str
    """The output directory."""
    remarks: tuple[str, ...]
    """What the format cannot express, with the number of examples or turns."""


def export_selection(run_dir_uri: str, trainer: str, out: str | None) -> Exported:
    """Writes the selected examples for a trainer.

    Args:
        run_dir_uri: a run whose stage `select` is finished.
        trainer: `hf`, `trl`, `llama-factory` or `axolotl`.
        out: output directory; None: `export/<trainer>` in the run directory, which must be local.

    Raises:
        ConfigError: the format is unknown, stage `select` is not finished, or the output directory
            is not empty.
    """
    if trainer not in _WRITERS:
        raise ConfigError(
            f"export: expected a format among {', '.join(_WRITERS)}, found {trainer!r}"
        )
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
    files = [storage.join(folder, item["path"]) for item in manifest["files"]]
    lost: Counter[str] = Counter()
    # An export that fails must not leave a directory that looks like one.
    unfinished = Path(disk.temporary_name(str(target)))
    try:
        unfinished.mkdir(parents=True)
        _WRITERS[trainer](files, unfinished, lost)
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    remarks = tuple(text.format(count=count) for text, count in lost.items())
    return Exported(path=str(target), remarks=remarks)


def _tables(files: list[str]) -> Iterator[pa.Table]:
    for uri in files:
        yield check_table(storage.read_table(uri), SELECTION, uri)


def _rows(files: list[str]) -> Iterator[dict[str, Any]]:
    for table in _tables(files):
        for batch in table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


def _write_hf(files: list[str], target: Path, lost: Counter[str]) -> None:
    """A directory for `datasets.load_from_disk`, with the columns of SELECTION."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset(pa.concat_tables(_tables(files))).save_to_disk(str(target))


def _write_trl(files: list[str], target: Path, lost: Counter[str]) -> None:
    def lines() -> Iterator[dict[str, Any]]:
        for row in _rows(files):
            chat = structured(row["messages"])
            _count_marks(chat, lost)
            for message in chat.messages:
                message.pop("train", None)
            yield {"messages": chat.messages, "tools": chat.tools or None} | _labels(row)

    _write_lines(target / "train.jsonl", lines())
    storage.write_bytes(str(target / "train.py"), _TRL_SCRIPT.encode())


_TRL_SCRIPT = '''"""Fine-tuning with TRL: rows in the order of the file, loss on responses alone.

    python train.py MODEL [OUTPUT_DIR]
"""

import sys
from pathlib import Path

import torch
from datasets import Features, Json, List, Value, load_dataset
from trl import SFTConfig, SFTTrainer

# Json keeps every message as it is: without it, all messages would get the keys of all others.
features = Features(
    {
        "messages": List(Json()),
        "tools": Json(),
        "category": Value("string"),
        "stage": Value("string"),
        "id": Value("string"),
    }
)
rows = load_dataset(
    "json", data_files=str(Path(__file__).parent / "train.jsonl"), features=features, split="train"
)
settings = SFTConfig(
    output_dir=sys.argv[2] if len(sys.argv) > 2 else "model",
    num_train_epochs=1,
    train_sampling_strategy="sequential",  # the order is the curriculum
    shuffle_dataset=False,
    packing=False,  # packing would change the order
    assistant_only_loss=True,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
)
SFTTrainer(
    model=sys.argv[1],
    args=settings,
    train_dataset=rows.select_columns(["messages", "tools"]),
).train()
'''


def _write_llama_factory(files: list[str], target: Path, lost: Counter[str]) -> None:
    def lines() -> Iterator[dict[str, Any]]:
        for row in _rows(files):
            chat = structured(row["messages"])
            _count_marks(chat, lost)
            turns = _sharegpt(chat, row["messages"], lost)
            tools = json.dumps(chat.tools, ensure_ascii=False) if chat.tools else ""
            yield {"conversations": turns, "tools": tools} | _labels(row)

    _write_lines(target / "instructmix.jsonl", lines())
    info = {
        "instructmix": {
            "file_name": "instructmix.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "tools": "tools"},
        }
    }
    storage.write_json(str(target / "dataset_info.json"), info)
    settings = {
        "stage": "sft",
        "dataset": "instructmix",
        "dataset_dir": ".",
        "disable_shuffling": True,
        "train_on_prompt": False,
        "mask_history": False,
    }
    _write_yaml(target / "train.yaml", settings)


def _sharegpt(
    chat: Structured, stored: list[dict[str, Any]], lost: Counter[str]
) -> list[dict[str, str]]:
    """Turns with `from` and `value`; results of parallel calls are one turn."""
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    texts = [turn["content"] for turn in stored]
    turns: list[dict[str, str]] = []
    for message, text in zip(chat.messages, texts[len(texts) - len(chat.messages) :], strict=True):
        name, value = names[message["role"]], message["content"]
        calls = message.get("tool_calls")
        if calls and value:
            lost[_TEXT_BESIDE_CALLS] += 1
            value = text
        elif calls:
            functions = [call["function"] for call in calls]
            listed = functions if len(functions) > 1 else functions[0]
            name, value = "function_call", json.dumps(listed, ensure_ascii=False)
        if message.get("reasoning_content"):
            value = f"<think>\n{message['reasoning_content']}\n</think>\n\n{value}"
        if turns and name == turns[-1]["from"] == "observation":
            turns[-1]["value"] += _RESULTS_BORDER + value
        else:
            turns.append({"from": name, "value": value})
    return turns


def _write_axolotl(files: list[str], target: Path, lost: Counter[str]) -> None:
    def lines() -> Iterator[dict[str, Any]]:
        for row in _rows(files):
            chat = structured(row["messages"])
            for call in (c for message in chat.messages for c in message.get("tool_calls", ())):
                # As text: a column of objects would get the keys of all calls in all rows.
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                call["function"] = {**call["function"], "arguments": arguments}
            yield {"messages": chat.messages, "tools": chat.tools or None} | _labels(row)

    _write_lines(target / "train.jsonl", lines())
    settings = {
        "datasets": [
            {
                "path": "train.jsonl",
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "field_tools": "tools",
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
                "message_field_training": "train",
            },
        ],
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        # Packing samplers draw their own order.
        "sample_packing": False,
    }
    _write_yaml(target / "axolotl.yaml", settings)


_WRITERS: Mapping[str, Callable[[list[str], Path, Counter[str]], None]] = {
    "hf": _write_hf,
    "trl": _write_trl,
    "llama-factory": _write_llama_factory,
    "axolotl": _write_axolotl,
}


def _count_marks(chat: Structured, lost: Counter[str]) -> None:
    if any(message.get("train") is False for message in chat.messages):
        lost[_NO_TURN_MARKS] += 1


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("category", "stage", "id")}


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with storage.atomic_output(str(path)) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    storage.write_bytes(str(path), yaml.safe_dump(value, sort_keys=False).encode())
