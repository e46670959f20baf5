"""The input of `bench_ingest.py`: as many rows as wanted, made of real ones."""

from __future__ import annotations

import gzip
import json
import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DUPLICATE_SHARE = 0.02
NUM_FILES = 8


def real_rows(data_dir: Path) -> list[dict[str, str]]:
    """Prompt, completion and task of the rows of `configs/real_cpu.yaml`'s five files.

    Rows that ingest would reject are left out, so that every contender has the same to do.
    """
    from system.data.rows.conversation import RowRejected, normalise

    rows = []
    for row in _all_rows(data_dir):
        try:
            normalise([("user", row["prompt"]), ("assistant", row["completion"])], 200_000)
        except RowRejected:
            continue
        rows.append(row)
    return rows


def _all_rows(data_dir: Path) -> Iterator[dict[str, str]]:
    with gzip.open(data_dir / "p3.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield {name: row[name] for name in ("prompt", "completion", "task")}
    with (data_dir / "gsm8k.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield _row(row["question"], row["answer"], "math")
    for name, task in (("code_alpaca", "code"), ("toolformer", "tool use")):
        for row in _array(data_dir / f"{name}.json"):
            parts = [part for part in (row["instruction"], row.get("input")) if part]
            yield _row("\n\n".join(parts), row["output"], task)
    for row in _array(data_dir / "roleplay_sharegpt.json"):
        asked, said = row["conversations"][:2]
        yield _row(asked["value"], said["value"], "roleplay")


def _array(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def _row(prompt: str, completion: str, task: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, "task": task}


def write_rows(folder: Path, data_dir: Path, num_rows: int, seed: int = 0) -> list[Path]:
    """Writes the rows as JSONL files; some rows are repeats of earlier ones.

    Where more rows are wanted than there are, further copies get a number in front of the prompt,
    so that they are different rows.
    """
    folder.mkdir(parents=True)
    known = real_rows(data_dir)
    draw = random.Random(seed)
    order: list[int] = []
    rows, numbers = array("q"), array("q")  # texts would not fit in memory
    for number in range(num_rows):
        if number and draw.random() < DUPLICATE_SHARE:
            earlier = draw.randrange(number)
            rows.append(rows[earlier])
            numbers.append(numbers[earlier])
            continue
        if not order:
            order = list(range(len(known)))
            draw.shuffle(order)
        rows.append(order.pop())
        numbers.append(number if number >= len(known) else -1)
    size = -(-num_rows // NUM_FILES)
    paths = [folder / f"part-{part}.jsonl" for part in range(-(-num_rows // size))]
    for part, path in enumerate(paths):
        with path.open("w", encoding="utf-8") as file:
            span = slice(part * size, (part + 1) * size)
            for row, number in zip(rows[span], numbers[span], strict=True):
                file.write(_line(known[row], number))
    return paths


def _line(row: dict[str, str], number: int) -> str:
    if number >= 0:
        row = {**row, "prompt": f"{number}. {row['prompt']}"}
    return json.dumps(row, ensure_ascii=False) + "\n"
