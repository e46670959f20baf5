import hashlib
from pathlib import Path

import numpy as np
import pytest
from influence_corpus import TASKS, build_inputs

from system.config import InfluenceConfig, LoraConfig, RunConfig
from system.data.corpus import Corpus
from system.errors import ModelError
from system.influence.design.design import InterventionRun
from system.influence.design.heldout import seeded_draw
from system.influence.design.interventions import (
    Schedule,
    active_rows,
    assemble_design,
    plan_replication,
)
from system.influence.measure.proxy import ProxyModel
from system.models.base import load_tokenizer
from system.training.settings import TrainSettings


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("proxy")
    build_inputs(path)
    return path


@pytest.fixture(scope="module")
def config(root: Path) -> RunConfig:
    from influence_corpus import influence_config

    return influence_config(root)


@pytest.fixture(scope="module")
def schedule(root: Path, config: RunConfig) -> Schedule:
    corpus = Corpus.open(str(root / "corpus" / "manifest.json"))
    draw = seeded_draw(corpus, load_tokenizer(root / "model"), 64)
    return plan_replication(
        0, run_seed=3, sources=TASKS, config=config.influence, max_length=64, draw=draw
    )


def proxy(root: Path) -> ProxyModel:
    return ProxyModel(str(root / "model"), device="cpu", trust_remote_code=False)


def settings(config: RunConfig, lora: LoraConfig | None = None) -> TrainSettings:
    influence = config.influence.model_copy(update={"lora": lora})
    return TrainSettings.from_influence(influence, config.model, 11)


def mask(schedule: Schedule, kind: str, source: int = -1) -> np.ndarray:
    design = assemble_design(
        run_seed=3,
        config=InfluenceConfig(),
        sources=TASKS,
        targets=(),
        schedules=[schedule],
        heldout_dropped={},
    )
    return active_rows(
        schedule.plan, InterventionRun(replication=0, kind=kind, source=source), design
    )


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_a_run_gives_the_same_bits_whatever_the_actor_did_before(
    root, config, schedule, tmp_path, lora
):
    tuning = settings(config, lora)
    fresh, used = proxy(root), proxy(root)
    used.tune(schedule.plan, mask(schedule, "remove", 1), tuning)
    for model, name in ((fresh, "fresh"), (used, "used")):
        model.tune(schedule.plan, mask(schedule, "remove", 0), tuning)
        model.save(str(tmp_path / name))
    assert weights(tmp_path / "fresh") == weights(tmp_path / "used")
    used.tune(schedule.plan, mask(schedule, "reference"), tuning)
    used.save(str(tmp_path / "reference"))
    assert weights(tmp_path / "reference") != weights(tmp_path / "used")


def test_masked_rows_are_not_trained_on(root, config, schedule):
    model = proxy(root)
    reference = model.tune(schedule.plan, mask(schedule, "reference"), settings(config))
    removed = model.tune(schedule.plan, mask(schedule, "remove", 2), settings(config))
    tokens = schedule.replication.dose_tokens["remove"]["size"]
    assert reference.trained_labels - removed.trained_labels == tokens
    assert reference.last_loss < reference.first_loss


def test_a_saved_start_is_continued_from_memory_and_from_disk_alike(
    root, config, schedule, tmp_path
):
    tuning = settings(config)
    warm = proxy(root)
    warm.tune(schedule.plan, mask(schedule, "reference"), tuning)
    warm.save(str(tmp_path / "warm"))
    for name in ("one", "two"):
        other = proxy(root)
        for _ in range(2):  # the second time the start comes from memory
            other.tune(schedule.plan, mask(schedule, "remove", 0), tuning, str(tmp_path / "warm"))
            other.save(str(tmp_path / name))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    cold = proxy(root)
    cold.tune(schedule.plan, mask(schedule, "remove", 0), tuning)
    cold.save(str(tmp_path / "cold"))
    assert weights(tmp_path / "cold") != weights(tmp_path / "one")


def test_saving_replaces_what_was_there(root, config, schedule, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "left-over.safetensors").write_bytes(b"half a file")
    model = proxy(root)
    model.save(str(tmp_path / "run"))
    assert not (tmp_path / "run" / "left-over.safetensors").exists()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_start_without_weights_is_named(root, config, schedule, tmp_path):
    with pytest.raises(ModelError, match="weights of a warm-up run"):
        proxy(root).tune(
            schedule.plan, mask(schedule, "reference"), settings(config), str(tmp_path / "nothing")
        )
