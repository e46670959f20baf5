"""From tokens to hours and bytes: numbers worked out by hand."""

import dataclasses
import json
import re
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from influence_corpus import TASKS, build_inputs
from safetensors.torch import save_file

from system.config import LoraConfig, RunConfig, TagConfig
from system.config.training import Arm
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local
from system.data.lengths import DrawnLengths
from system.errors import ConfigError
from system.evaluation.arms import apportion
from system.forecast.corpus_stats import CorpusStats, from_ingested
from system.forecast.disk import ModelSize, disk_parts, free_bytes, model_size, peak_bytes
from system.forecast.hours import (
    ACTORS_START_SECONDS,
    TRAIN_START_SECONDS,
    Rate,
    Rates,
    stage_seconds,
)
from system.forecast.probe import ProbeSettings, run_probe, why_no_probe
from system.forecast.text import duration, size
from system.forecast.workload import Workload, pass_counts, workloads
from system.influence.design.cost import influence_cost
from system.influence.design.heldout import seeded_draw
from system.models.base import load_tokenizer
from system.models.chat import encode_table
from system.training.settings import TrainSettings


def config(**changes: Mapping[str, Any]) -> RunConfig:
    value: dict[str, Any] = {
        "run_dir": "runs/x",
        "sources": [{"path": "a.jsonl"}],
        "model": {"path": "builtin:tiny"},
        "influence": {"rows_per_category": 10, "dose_rows": 5, "heldout_rows": 4},
        "solve": {"budget": 30},
        "evaluate": {"test_rows": 5, "accuracy_rows": 2, "max_new_tokens": 7},
    }
    for section, fields in changes.items():
        value[section] = {**value.get(section, {}), **fields}
    return RunConfig.model_validate(value)


ROWS = {"short": 100, "long": 50}
LENGTHS = {"short": 10.0, "long": 40.0}


def stats() -> CorpusStats:
    """Two categories of rows that are all alike: 100 of 10 tokens, 50 of 40."""

    def lengths(split: str, category: str, wanted: int, seed: int) -> DrawnLengths:
        count = min(wanted, ROWS[category])
        tokens = np.full(count, LENGTHS[category])
        return DrawnLengths(ids=[], tokens=tokens, response=tokens // 2)

    return CorpusStats(
        basis="exact",
        categories=("short", "long"),
        rows=dict.fromkeys(("train", "estimate", "test"), ROWS),
        tokens=LENGTHS,
        response_tokens={"short": 2.0, "long": 6.0},
        lengths=lengths,
        heldout=lambda trained: np.repeat([10.0, 40.0], 4),
        left_out="",
        relative_error=0.0,
        questions=3,
    )


def work_of(settings: RunConfig, mix: Mapping[str, float] | None = None) -> dict[str, Workload]:
    cost = influence_cost(
        settings.influence,
        run_seed=0,
        sources=stats().categories,
        lengths=stats().lengths,
        heldout=stats().heldout,
    )
    return {item.stage: item for item in workloads(settings, stats(), cost, mix)}


def test_influence_counts_reference_and_removals():
    item = work_of(config())["influence"]
    # Two replications of 10 x 10 + 10 x 40 tokens, and those less 5 rows of either category.
    assert item.trained_tokens == 2 * (500 + (500 - 50) + (500 - 200))
    assert (item.trainings, item.models_scored) == (6, 6)
    assert item.scored_tokens == 6 * 4 * (10 + 40)
    assert item.token_equivalents == pytest.approx(2500 + 1200 / 3)


def test_train_is_the_budget_at_the_base_mix_times_the_passes():
    assert work_of(config())["train"].trained_tokens == 20 * 10 + 10 * 40
    twice = work_of(config(curriculum={"epochs": 2}))["train"]
    assert (twice.trained_tokens, twice.trained_rows) == (1200, 60)
    assert work_of(config(curriculum={"preset": "paper"}))["train"].trained_tokens == 1800


def test_a_solved_mix_takes_the_place_of_the_base():
    work = work_of(config(), {"short": 30.0, "long": 0.0})
    assert work["train"].trained_tokens == 300
    assert work["evaluate"].trained_tokens == 3 * (600 + 300 + 300)


def test_evaluation_counts_arms_seeds_and_the_two_models_that_are_there():
    item = work_of(config(evaluate={"arms": ("natural", "uniform"), "seeds": 2}))["evaluate"]
    assert (item.trainings, item.models_scored) == (4, 6)
    assert item.trained_tokens == 2 * (600 + (15 * 10 + 15 * 40))
    assert item.longest_tokens == 750
    assert item.scored_tokens == 6 * 5 * 50
    assert item.generated_tokens == 6 * 3 * 7


def test_every_mix_that_arms_are_named_after_has_its_counts():
    counts = pass_counts(config(), stats(), {"short": 30.0, "long": 0.0})
    assert set(counts) == {arm.partition("-")[0] for arm in typing.get_args(Arm)}
    assert {sum(of.values()) for of in counts.values()} == {30}
    assert 10 <= counts["random"]["short"] <= 30, "as many are moved as in the solved mix"
    assert pass_counts(config(), stats(), None)["random"] == counts["natural"]


def test_a_budget_in_tokens_becomes_examples_of_the_base_mix():
    # 100 x 2 + 50 x 6 response tokens in 150 examples: 100 of them are 30 examples.
    counts = pass_counts(config(solve={"budget": 100, "unit": "tokens"}), stats(), None)
    assert counts["natural"] == apportion(30, ROWS) == {"short": 20, "long": 10}


def test_rows_without_a_category_are_shared_out_until_they_are_tagged(tmp_path):
    base = build_inputs(tmp_path)
    shutil.rmtree(tmp_path / "corpus")
    nameless = base.sources[2].model_copy(update={"category": None})
    names = TagConfig(categories=("colour", "hue", "shape"), aliases={"colour-reworded": "hue"})
    settings = base.model_copy(update={"sources": (*base.sources[:2], nameless), "tag": names})
    ingest_local(settings, str(tmp_path / "corpus"))
    corpus = Corpus.open(str(tmp_path / "corpus" / "manifest.json"))
    untagged = corpus.num_rows("train", None)
    assert untagged > 100
    found = from_ingested(corpus, settings, tmp_path / "model")
    assert found.categories == ("colour", "hue", "shape")
    assert found.rows["train"] == {
        "colour": corpus.counts("train")["colour"] + untagged // 3,
        "hue": corpus.counts("train")["colour-reworded"] + untagged // 3,
        "shape": untagged // 3,
    }
    # Planted rows of a task are all of one length: 27, 28 and 28 tokens.
    tokens = {name: seeded_tokens(corpus, settings, name) for name in corpus.categories}
    assert found.tokens["colour"] == tokens["colour"]
    assert found.tokens["hue"] == tokens["colour-reworded"]
    assert min(tokens.values()) <= found.tokens["shape"] <= max(tokens.values())
    drawn = found.lengths("train", "hue", 10, 0).tokens
    np.testing.assert_array_equal(drawn, [tokens["colour-reworded"]] * 10)


def seeded_tokens(corpus: Corpus, settings: RunConfig, category: str) -> float:
    rows, _ = encode_table(
        corpus.sample("train", category, 30, 9), load_tokenizer(settings.model.path), 64
    )
    (length,) = {len(row) for row in rows["input_ids"].to_pylist()}
    return float(length)


def rates(train: float = 100.0, score: float = 300.0, run_seconds: float = 0.0) -> Rates:
    def rate(middle: float) -> Rate:
        return Rate(mean=middle, low=middle / 2, high=middle * 2, num_samples=3)

    return Rates(
        train=rate(train),
        score=rate(score),
        source="a test",
        is_probe=True,
        run_seconds=run_seconds,
    )


def seconds_of(settings: RunConfig, shared_cpus: int | None = None, **given: float):
    found = stage_seconds(settings, list(work_of(settings).values()), rates(**given), shared_cpus)
    return {item.stage: item for item in found}


def test_influence_takes_as_long_as_its_slower_side():
    found = seconds_of(config())["influence"]
    assert found.middle == pytest.approx(ACTORS_START_SECONDS + 2500 / 100)
    assert found.low == pytest.approx(ACTORS_START_SECONDS + 2500 / 200)
    assert found.high == pytest.approx(ACTORS_START_SECONDS + 2500 / 50)
    slow = seconds_of(config(), score=10.0)["influence"]
    assert slow.middle == pytest.approx(ACTORS_START_SECONDS + 1200 / 10)


def test_tuners_share_the_runs_and_the_last_round_may_be_half_empty():
    four = seconds_of(config(cluster={"num_tuners": 4}), run_seconds=1.0)["influence"]
    # Six runs on four tuners are two rounds of a sixth each.
    assert four.middle == pytest.approx(ACTORS_START_SECONDS + (2500 / 100 + 6) * 2 / 6)


def test_actors_on_one_machine_cannot_use_more_than_its_cpus():
    settings = config(cluster={"num_tuners": 3, "num_scorers": 3})
    found = seconds_of(settings, shared_cpus=2)["influence"]
    assert found.middle == pytest.approx(ACTORS_START_SECONDS + (2500 / 100 + 1200 / 300) / 2)


def test_finished_runs_were_timed_beside_each_other():
    settings = config(cluster={"num_tuners": 3, "num_scorers": 3})
    measured = dataclasses.replace(rates(), is_probe=False)
    found = stage_seconds(settings, [work_of(settings)["influence"]], measured, 1)
    assert found[0].middle == pytest.approx(ACTORS_START_SECONDS + 2500 / 100 / 3)


def test_training_is_shared_by_its_workers():
    found = seconds_of(config(train={"num_workers": 3}))
    assert found["train"].middle == pytest.approx(TRAIN_START_SECONDS + 600 / 100 / 3)
    evaluate = work_of(config())["evaluate"]
    scoring = (evaluate.scored_tokens + evaluate.generated_tokens) / 300
    assert found["evaluate"].middle == pytest.approx(
        TRAIN_START_SECONDS + evaluate.trained_tokens / 300 + ACTORS_START_SECONDS + scoring
    )
    one = seconds_of(config(train={"num_workers": 3}), shared_cpus=1)["train"]
    assert one.middle == pytest.approx(TRAIN_START_SECONDS + 600 / 100)


def write_model(folder: Path) -> None:
    weights = {
        "model.embed_tokens.weight": torch.zeros(10, 4),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 4),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(8),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 4),
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))


def test_the_size_of_a_model_is_read_from_its_headers(tmp_path):
    write_model(tmp_path)
    assert model_size(tmp_path, None) == ModelSize(parameters=40 + 32 + 8 + 64, adapted=None)
    lora = LoraConfig(rank=2, targets=("q_proj",))
    assert model_size(tmp_path, lora).adapted == 2 * (8 + 4)


MODEL = ModelSize(parameters=1000, adapted=None)


def sizes_of(settings: RunConfig, model: ModelSize = MODEL, done: tuple[str, ...] = ()):
    parts = disk_parts(settings, model, None, num_categories=2, train_rows=30)
    return {part.name: part.size_bytes for part in parts}, peak_bytes(parts, done)


def test_disk_holds_the_largest_of_what_passes_and_all_that_stays():
    sizes, peak = sizes_of(config(evaluate={"arms": ("natural",), "seeds": 2}))
    assert sizes == {
        "3 intervention checkpoints": 12_000,  # one tuner, two of one scorer
        "3 training checkpoints with optimiser": 36_000,
        "the trained model": 4_000,
        "2 models of arms and 2 checkpoints": 8_000 + 24_000,
    }
    assert peak == 36_000 + 4_000 + 32_000
    _, left = sizes_of(config(evaluate={"arms": ("natural",), "seeds": 2}), done=("train",))
    assert left == 32_000


def test_kept_checkpoints_are_all_runs_and_warm_ups_stay():
    sizes, peak = sizes_of(config(influence={"estimator": "branch", "keep_checkpoints": True}))
    assert sizes["8 intervention checkpoints"] == 8 * 4_000  # 2 x (warm, reference, 2 removals)
    assert peak >= 8 * 4_000 + 36_000 + 4_000


def test_adapters_are_checkpointed_alone_and_exported_merged():
    sizes, _ = sizes_of(config(model={"dtype": "bfloat16"}), ModelSize(parameters=1000, adapted=50))
    assert sizes["3 training checkpoints with optimiser"] == 3 * 3 * 50 * 4
    assert sizes["the trained model"] == 2_000


def test_free_space_is_that_of_the_first_directory_that_is_there(tmp_path):
    assert free_bytes(str(tmp_path / "not" / "yet")) > 0
    assert free_bytes("s3://bucket/run") is None


def test_numbers_are_written_for_people():
    assert [duration(s) for s in (3.4, 119, 600, 7100, 36_000)] == [
        "3 s", "119 s", "10 min", "118 min", "10.0 h",
    ]  # fmt: skip
    assert [size(n) for n in (5, 2048, 3 * 2**20, 2**40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "1.0 TiB",
    ]


def test_a_rate_goes_by_all_tokens_and_all_seconds():
    even = Rate.of([(40, 10), (10, 10), (20, 10), (30, 10), (50, 10)])
    assert even == Rate(mean=3, low=2, high=4, num_samples=5)
    # One piece in ten times the time: it weighs what it takes, and the mean leaves the quartiles.
    slow = Rate.of([(100, 10), (100, 10), (100, 10), (100, 10), (100, 100)])
    assert slow.mean == pytest.approx(500 / 140)
    assert (slow.low, slow.high) == (slow.mean, 10)


def test_a_probe_measures_the_model_in_steps_that_the_rows_allow(tmp_path):
    settings = build_inputs(tmp_path)
    draw = seeded_draw(
        Corpus.open(str(tmp_path / "corpus" / "manifest.json")),
        load_tokenizer(tmp_path / "model"),
        64,
    )
    rows, _ = draw("train", TASKS[0], 40, 0)
    training = TrainSettings.from_influence(settings.influence, settings.model, 0)
    probe = ProbeSettings(
        num_threads=1,
        trains_on_gpu=False,
        scores_on_gpu=False,
        batch_size=8,
        max_length=64,
        trust_remote_code=False,
    )
    threads = torch.get_num_threads()
    found = run_probe(tmp_path / "model", rows, training, probe)
    assert torch.get_num_threads() == threads
    assert found.is_probe and re.search("steps of [1-8] rows", found.source)
    assert found.train.num_samples >= 3 and found.score.num_samples >= 3
    assert 0 < found.train.low <= found.train.mean <= found.train.high
    assert 0 < found.score.low <= found.score.mean <= found.score.high
    few = run_probe(tmp_path / "model", rows.slice(0, 10), training, probe)
    assert re.search("steps of [12] rows", few.source) and few.train.num_samples >= 3
    model_dir = tmp_path / "model"
    assert why_no_probe(model_dir, 4, training, probe) == ""
    assert "has 3 usable ones" in why_no_probe(model_dir, 3, training, probe)
    if not torch.cuda.is_available():
        on_gpu = dataclasses.replace(probe, trains_on_gpu=True)
        assert "this machine has none" in why_no_probe(model_dir, 40, training, on_gpu)


def test_arms_are_counted_from_the_chosen_base():
    natural = pass_counts(config(), stats(), None)
    own = pass_counts(config(solve={"budget": 30, "base": {"short": 1.0}}), stats(), None)
    assert own["solved"] == {"short": 30, "long": 0}
    even = pass_counts(config(solve={"budget": 30, "base": "uniform"}), stats(), None)
    assert even["solved"] == even["uniform"] == {"short": 15, "long": 15}
    assert set(natural) == set(own)
    with pytest.raises(ConfigError, match=r"solve\.base names \['no such'\]"):
        pass_counts(config(solve={"budget": 30, "base": {"no such": 1.0}}), stats(), None)
