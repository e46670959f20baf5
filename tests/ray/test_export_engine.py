"""Exported models load in the real vLLM engine and score there as transformers scores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_builders import SETTINGS, VOCABULARY, build_model, per_token, token_table

from system.config import LoraConfig
from system.models.base import load_model
from system.scoring.engine import Engine
from system.scoring.score import score_reference, score_tokens
from system.training.job import Ranks, run_job
from system.training.plan import build_plan, write_plan
from system.training.records import TrainJob
from system.training.settings import TrainSettings

pytestmark = pytest.mark.slow

METHODS = {"full": None, "lora": LoraConfig(rank=4)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories: the base, a full export, and one with its adapters merged."""
    root = tmp_path_factory.mktemp("exports")
    base = build_model(root / "base", 0)
    tokens = token_table(48, seed=4)
    plan = build_plan(tokens, ["one"] * 48, batch_size=8, max_length=160, packing=True)
    write_plan(str(root / "plan.arrow"), plan)
    found = {"base": base}
    for name, lora in METHODS.items():
        settings = TrainSettings(
            learning_rate=1e-2, lr_schedule="cosine", warmup_share=0.1, lora=lora
        )
        job = TrainJob(
            name=name,
            plan_uri=str(root / "plan.arrow"),
            output_uri=str(root / name),
            settings=settings,
            model_dir=base,
        )
        found[name] = run_job(job, Ranks(), torch.device("cpu")).model_uri
    return found


@pytest.fixture(scope="module")
def engine(exports: dict[str, str]) -> Engine:
    """Starts from an export itself: its configuration and tokenizer are what vLLM reads."""
    return Engine(exports["full"], SETTINGS)


@pytest.mark.parametrize("name", METHODS)
def test_an_export_scores_in_vllm_as_in_transformers(engine, exports, name):
    assert (Path(exports[name]) / "README.md").is_file()
    engine.reload(exports[name])
    tokens = token_table(24, seed=6)
    found = per_token(score_tokens(engine, tokens).table)
    expected = per_token(score_reference(load_model(exports[name]), tokens).table)
    assert np.abs(found - expected).max() < 1e-3
    base = per_token(score_reference(load_model(exports["base"]), tokens).table)
    assert np.abs(expected - base).max() > 0.05, "the training must have moved the model"
    assert load_model(exports[name]).config.vocab_size == VOCABULARY
