"""What other stages and `check` do about an append: answers, budget, token counts."""

from dataclasses import replace

import pytest
import ray
from append_corpus import FOURTH, Grown, design_at, matrices, source
from influence_corpus import TASKS

from actors.influence.precheck import check_before_influence
from actors.overview import describe_plan
from actors.stage import StageContext
from actors.token_counter import measured_manifest
from system import storage
from system.data.corpus import Corpus, Manifest, make_manifest, moved_shards
from system.data.lengths import SeededLengths, copy_lengths, measure_shard
from system.errors import ConfigError
from system.influence.append.append_cost import append_cost
from system.models.base import load_tokenizer
from system.rundir import RunDir, fingerprint


@pytest.mark.parametrize("has_answers", [True, False])
def test_a_new_category_has_a_row_of_answers_only_where_it_has_answers(tmp_path, has_answers):
    run = Grown(tmp_path, metric="accuracy", max_new_tokens=4)
    old = [source(task, has_answers=True) for task in TASKS]
    run.prepare(*old, source(FOURTH, has_answers=has_answers))
    tokenizer = load_tokenizer(run.output("model", "model"))
    cost = append_cost(
        run.config, run.earlier(), run.corpus(), SeededLengths(run.corpus()), lambda: tokenizer
    )
    uri = RunDir(run.config.run_dir).attempt_uri("influence", run.measure())
    design = design_at(uri)
    assert FOURTH in design.sources
    assert (FOURTH in [target.name for target in design.targets]) == has_answers
    heldout = storage.read_table(storage.join(uri, "heldout.arrow"))
    assert cost.heldout_rows == heldout.num_rows
    # Without questions of its own the category needs its column alone.
    assert cost.runs == (2 * 5 if has_answers else 2)
    whole = matrices(run, uri)["remove"]
    assert whole.effect_TS.shape == (3 + has_answers, 4)
    assert whole.appended_TS[:, design.sources.index(FOURTH)].all()


def test_check_shows_the_append_and_run_holds_it_to_the_budget(tmp_path):
    run = Grown(tmp_path)
    run.prepare(*map(source, (*TASKS, FOURTH)))
    sources = (*run.config.sources, source("size-two", "size-split"))
    unread = run.config.model_copy(update={"sources": sources})
    assert "known after the stage tag" in describe_plan(unread).text
    plan = describe_plan(run.config)
    assert f"append to influence/{run.first}: {FOURTH}" in plan.text
    cost = plan.forecast.cost
    assert cost is not None and cost.runs == 2 * 5
    assert f"{cost.trained_tokens:,} tokens trained" in plan.text

    def within(limit: int) -> StageContext:
        influence = run.config.influence.model_copy(update={"max_token_equivalents": limit})
        config = run.config.model_copy(update={"influence": influence})
        attempt = RunDir(config.run_dir).attempt_uri("influence", "try")
        return replace(run.context(attempt), config=config)

    check_before_influence(within(int(cost.token_equivalents) + 1))
    with pytest.raises(ConfigError, match="Nothing was trained"):
        check_before_influence(within(int(cost.token_equivalents) - 1))


def test_rows_that_were_tokenised_before_are_not_again(tmp_path):
    """A category more leaves the shards of the others as they are: their lengths are found."""
    run = Grown(tmp_path)

    def context(attempt: str) -> StageContext:
        return replace(run.context(str(tmp_path / "tags" / attempt)), appends_to=None)

    def manifest(attempt: str) -> Manifest:
        corpus = Corpus.open(run.output("ingest", "manifest"))
        return make_manifest(moved_shards(corpus, context(attempt).attempt))

    tokenizer = load_tokenizer(run.output("model", "model"))
    corpus = Corpus.open(run.output("ingest", "manifest"))
    for shard in corpus.manifest.shards:
        measure_shard(corpus, shard, context("first").attempt, tokenizer, 64)
    first = measured_manifest(context("first"), manifest("first"))
    again = measured_manifest(context("second"), manifest("second"))
    assert again.details == first.details and again.counts == first.counts
    before = {shard.sha256 for shard in corpus.manifest.shards}
    run.prepare(*map(source, (*TASKS, FOURTH)))
    after = Corpus.open(run.output("ingest", "manifest")).manifest.shards
    assert {s.sha256 for s in after if s.category != FOURTH} == before

    def known(attempt: str) -> set[str | None]:
        shared = [context("x").shared_uri, fingerprint(context("x").model_identity)]
        found = [
            shard.category
            for shard in after
            if copy_lengths(shard, storage.join(*shared), context(attempt).attempt) is not None
        ]
        return set(found)

    assert known("third") == set(TASKS), "another ingest, the same model"
    model = run.config.model.model_copy(update={"max_length": 63})
    anew = run.config.influence.model_copy(update={"append": False})
    run.config = run.config.model_copy(update={"model": model, "influence": anew})
    run.model()
    assert known("fourth") == set(), "what was cut elsewhere has other lengths"
    assert not ray.is_initialized()
