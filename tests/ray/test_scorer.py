"""Scorer actors behind a pool: weights by path, typed errors, the same numbers after a death."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from engine_builders import SETTINGS, build_model, per_token, token_table

from actors.cluster import Cluster
from actors.pool import ActorPool, ActorSpec, wait_any
from actors.scorer import Scorer
from system.config import ClusterConfig
from system.errors import ConfigError, ModelError
from system.models.base import load_model
from system.scoring.score import Scored, score_reference

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [build_model(root / f"m{seed}", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def pool(model_dirs: list[str]) -> Iterator[ActorPool]:
    cluster = Cluster(ClusterConfig(address="local", num_cpus=1))
    try:
        yield cluster.pool(
            ActorSpec(name="scorer", actor_class=Scorer, args=(model_dirs[0], SETTINGS))
        )
    finally:
        cluster.shutdown()


def ask(pool: ActorPool, method: str, *args: object) -> object:
    ((_, value),) = pool.map({"unit": args}, method)
    return value


def scores(pool: ActorPool, weights: str | None) -> np.ndarray:
    scored = ask(pool, "score", weights, token_table(30, seed=4))
    assert isinstance(scored, Scored)
    assert scored.rejected == {}
    return per_token(scored.table)


def expected(model_dir: str) -> np.ndarray:
    return per_token(score_reference(load_model(model_dir), token_table(30, seed=4)).table)


def test_one_actor_scores_under_whatever_weights_it_is_given(pool, model_dirs):
    base, other = expected(model_dirs[0]), expected(model_dirs[1])
    assert np.abs(base - other).min() > 1e-3
    for weights, wanted in (
        (None, base), (model_dirs[1], other), (None, base), (model_dirs[0], base),
    ):  # fmt: skip
        np.testing.assert_allclose(scores(pool, weights), wanted, rtol=0, atol=1e-4)


def test_weights_written_anew_under_the_same_path_are_loaded_again(pool, model_dirs, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(model_dirs[0], checkpoint)
    np.testing.assert_allclose(scores(pool, str(checkpoint)), expected(model_dirs[0]), atol=1e-4)
    shutil.rmtree(checkpoint)
    shutil.copytree(model_dirs[1], checkpoint)
    np.testing.assert_allclose(scores(pool, str(checkpoint)), expected(model_dirs[1]), atol=1e-4)


def test_rows_in_the_object_store_arrive_as_a_table(pool):
    reference = ray.put(token_table(30, seed=4))
    scored = ask(pool, "score", None, reference)
    assert isinstance(scored, Scored)
    assert scored.table.num_rows == 30


def test_a_checkpoint_that_is_gone_is_a_model_error_and_the_actor_goes_on(pool, tmp_path: Path):
    before = scores(pool, None)
    with pytest.raises(ModelError, match="safetensors"):
        scores(pool, str(tmp_path))
    np.testing.assert_array_equal(scores(pool, None), before)


def test_choices_and_answers_come_back_in_order(pool):
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7]]
    found = ask(pool, "choose", None, prompts, [[10], [11, 12]])
    assert isinstance(found, np.ndarray)
    assert found.shape == (3, 2)
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    answers = ask(pool, "generate", None, prompts, 5, [])
    assert answers.failures == {} and len(answers.texts) == 3
    assert answers.texts[0] == answers.texts[2] != answers.texts[1]


def test_a_scorer_killed_in_the_middle_of_a_call_changes_no_number(pool, model_dirs):
    calm = scores(pool, model_dirs[1])
    rows = token_table(30, seed=4)
    pool.submit("killed", "score", model_dirs[1], rows)
    (actor,) = [actor for _, actor in pool._in_flight.values()]
    ray.kill(actor)
    (done,) = wait_any([pool])
    assert done.key == "killed"
    np.testing.assert_array_equal(per_token(done.value.table), calm)


def test_too_little_memory_for_one_row_says_which_setting_to_raise(pool, model_dirs):
    starved = dataclasses.replace(SETTINGS, memory_gib=1e-5, self_test=False)
    small = ActorPool(
        ActorSpec(name="small", actor_class=Scorer, args=(model_dirs[0], starved), num_cpus=0.0)
    )
    try:
        with pytest.raises(ConfigError, match=r"cluster\.engine_memory_gib"):
            scores(small, None)
    finally:
        small.close()
