"""Exports, tried with the trainers themselves, in an environment that is thrown away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_rows import ROWS, write_run

from system.config import TinyModelConfig
from system.examples.tiny_model import new_model, train_tokenizer
from system.selection.export import export_selection

pytestmark = [pytest.mark.slow, pytest.mark.long]

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def install(target: Path, *packages: str) -> dict[str, str]:
    """Installs packages beside this environment; the variables with which they are found."""
    uv = str(Path(sys.executable).parent / "uv")
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps",
         "--target", str(target), *packages],
        check=True,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}


def test_trl_trains_on_its_export_with_tools_in_the_syntax_of_the_template(tmp_path: Path) -> None:
    export_selection(str(write_run(tmp_path / "run")), "trl", str(tmp_path / "x"))
    tokenizer = train_tokenizer((json.dumps(row) for row in ROWS), 400, 512)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    tiny = TinyModelConfig(vocab_size=400, hidden_size=64, num_layers=2, num_heads=2)
    new_model(tiny, len(tokenizer), 512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    environment = install(tmp_path / "trl", "trl>=1.16,<1.17", "accelerate")
    done = subprocess.run(
        [sys.executable, "train.py", str(tmp_path / "model"), str(tmp_path / "out")],
        cwd=tmp_path / "x", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (state,) = (tmp_path / "out").rglob("trainer_state.json")
    (last,) = [row for row in json.loads(state.read_text())["log_history"] if "train_loss" in row]
    assert last["train_loss"] > 0
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "x/train.jsonl").read_text().splitlines()
    ]
    text = tokenizer.apply_chat_template(
        rows[1]["messages"], tools=rows[1]["tools"], tokenize=False
    )
    assert '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>' in text
