"""The forecast of an influence stage is what its plans train and its held-out rows hold."""

import typing
from pathlib import Path

import numpy as np
import pytest
from forecast_corpus import build_varied_inputs, tagged, write_benchmark
from influence_corpus import influence_config

from system.config import InfluenceConfig, RunConfig
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local
from system.data.lengths import SeededLengths
from system.errors import ConfigError, DataError
from system.influence.design.accuracy_targets import draw_accuracy_targets
from system.influence.design.cost import (
    InfluenceCost,
    check_token_limit,
    influence_cost,
    most_replications,
)
from system.influence.design.design import Design
from system.influence.design.estimators import ESTIMATORS
from system.influence.design.external_targets import read_targets
from system.influence.design.heldout import draw_targets, seeded_draw
from system.influence.design.heldout_cost import stage_heldout
from system.influence.design.interventions import (
    Schedule,
    active_rows,
    assemble_design,
    plan_replication,
)
from system.influence.measure.first_order import gradient_task
from system.models.base import load_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cost")
    build_varied_inputs(path)
    return path


def config_of(root: Path, max_length: int = 64, **influence: object) -> RunConfig:
    config = influence_config(root, **influence)
    model = config.model.model_copy(update={"max_length": max_length})
    return config.model_copy(update={"model": model})


def schedules_of(root: Path, config: RunConfig, corpus: Corpus) -> list[Schedule]:
    """As the stage makes them."""
    draw = seeded_draw(corpus, load_tokenizer(root / "model"), config.model.max_length)
    return [
        plan_replication(
            index,
            run_seed=config.seed,
            sources=corpus.categories,
            config=config.influence,
            max_length=config.model.max_length,
            draw=draw,
        )
        for index in range(most_replications(config.influence))
    ]


def planned(root: Path, config: RunConfig, corpus: Corpus) -> tuple[Design, list[int], int, int]:
    """The stage's design, the tokens of each of its runs, held-out rows and their tokens."""
    schedules = schedules_of(root, config, corpus)
    tokenizer = load_tokenizer(root / "model")
    trained = {
        name
        for schedule in schedules
        for plan in (schedule.plan, schedule.warm)
        if plan is not None
        for name in plan.table["id"].to_pylist()
    }
    external, _ = read_targets(config, "estimate", trained)
    heldout, targets, _ = draw_targets(
        run_seed=config.seed,
        sources=corpus.categories,
        num_rows=config.influence.heldout_rows,
        draw=seeded_draw(corpus, tokenizer, config.model.max_length),
        external=external,
        tokenizer=tokenizer,
        max_length=config.model.max_length,
    )
    design = assemble_design(
        run_seed=config.seed,
        config=config.influence,
        sources=corpus.categories,
        targets=targets,
        schedules=schedules,
        heldout_dropped={},
    )
    scored = sum(len(row) for row in heldout["input_ids"].to_pylist())
    tokens = []
    for run in design.all_runs:
        schedule = schedules[run.replication]
        plan = schedule.warm if run.kind == "warm" else schedule.plan
        assert plan is not None
        if run.kind == "gradient":
            doses = gradient_task(plan, design, run, 8).doses
            tokens.append(sum(int(plan.lengths(rows).sum()) for rows in doses) + scored)
            continue
        rows = np.flatnonzero(active_rows(plan, run, design))
        tokens.append(int(plan.lengths(rows).sum()))
    return design, tokens, heldout.num_rows, scored


def forecast(root: Path, config: RunConfig, corpus: Corpus) -> InfluenceCost:
    lengths = SeededLengths(corpus)
    return influence_cost(
        config.influence,
        run_seed=config.seed,
        sources=corpus.categories,
        lengths=lengths,
        heldout=stage_heldout(config, corpus, lengths, lambda: load_tokenizer(root / "model")),
    )


@pytest.mark.parametrize("directions", [("add",), ("remove",), ("add", "remove")], ids="-".join)
@pytest.mark.parametrize("estimator", ["retrain", "branch", "random-design", "gradient"])
def test_the_forecast_equals_the_plans_of_the_stage(root, estimator, directions):
    config = config_of(
        root, estimator=estimator, directions=directions, replications=3, rows_per_category=40
    )
    corpus = tagged(root, config)
    cost = forecast(root, config, corpus)
    design, tokens, heldout_rows, scored = planned(root, config, corpus)
    assert cost.runs == len(design.all_runs) == len(tokens)
    assert cost.trained_tokens == sum(tokens)
    if estimator != "gradient":
        assert cost.longest_run_tokens == max(tokens)
    scorings = sum(run.kind not in ("warm", "gradient") for run in design.all_runs)
    assert (cost.scorings, cost.heldout_rows) == (scorings, heldout_rows)
    assert cost.scored_tokens == scored * scorings
    assert cost.token_equivalents == pytest.approx(sum(tokens) + scored * scorings / 3)


@pytest.mark.parametrize("estimator", ["retrain", "branch", "random-design", "gradient"])
def test_it_does_for_doses_by_tokens(root, estimator):
    config = config_of(
        root, estimator=estimator, directions=("add", "remove"), dose_rows=20, dose_tokens=36
    )
    corpus = tagged(root, config)
    design, tokens, _, _ = planned(root, config, corpus)
    doses = design.dose_rows("remove")
    assert 8 < doses.max() < 20, "every response has three tokens"
    within = (design.dose_tokens("remove") <= 36) | (doses == 8)
    assert within.all()
    assert forecast(root, config, corpus).trained_tokens == sum(tokens)


def test_it_does_where_truncation_takes_rows_away(root):
    config = config_of(root, max_length=40)
    corpus = tagged(root, config)
    assert corpus.manifest.rejected["no-response-token"] > 0
    assert any(shard.lengths for shard in corpus.manifest.shards)
    cost = forecast(root, config, corpus)
    _, tokens, _, _ = planned(root, config, corpus)
    assert cost.trained_tokens == sum(tokens)


def test_it_does_where_a_category_has_too_few_rows_for_what_was_asked(root):
    config = config_of(
        root,
        estimator="branch",
        directions=("add", "remove"),
        rows_per_category=100,
        dose_rows=60,
        warm_rows_per_category=50,
    )
    corpus = tagged(root, config)
    cost = forecast(root, config, corpus)
    design, tokens, _, _ = planned(root, config, corpus)
    rows = design.replications[0].rows.values()
    assert any(row.base < 100 and row.warm_reused > 0 for row in rows), "this case is the point"
    assert cost.trained_tokens == sum(tokens)


@pytest.mark.parametrize("estimator", ["retrain", "branch"])
@pytest.mark.parametrize("most", [20, 100], ids=["rows for all", "rows for fewer"])
def test_the_runs_of_all_doses_are_counted(root, estimator, most):
    config = config_of(
        root,
        estimator=estimator,
        directions=("add", "remove"),
        rows_per_category=most,
        dose_rows=[9, most // 2, most - 1, most],
    )
    corpus = tagged(root, config)
    cost = forecast(root, config, corpus)
    design, tokens, _, scored = planned(root, config, corpus)
    whole = 2 * (1 + (estimator == "branch") + 2 * 4 * len(design.sources))
    assert cost.runs == len(design.all_runs) == len(tokens)
    assert (cost.runs == whole) == (most == 20), "doses that come to the same rows are one run"
    assert cost.trained_tokens == sum(tokens)
    assert cost.longest_run_tokens == max(tokens)
    assert cost.scored_tokens == scored * cost.scorings
    assert cost.scorings == sum(run.kind != "warm" for run in design.all_runs)


def test_rows_of_further_targets_that_are_trained_on_do_not_count(root):
    corpus = tagged(root, config_of(root))
    path = write_benchmark(root, corpus)
    config = config_of(root, targets={"benchmark": path}, heldout_rows=20)
    cost = forecast(root, config, corpus)
    _, _, heldout_rows, scored = planned(root, config, corpus)
    assert heldout_rows < 3 * 20 + 20, "some rows of the benchmark are trained on"
    assert cost.heldout_rows == heldout_rows
    assert cost.scored_tokens == scored * cost.scorings


def test_answers_count_at_their_longest_beside_their_prompts(root):
    config = config_of(root, metric="accuracy", heldout_rows=10, max_new_tokens=7)
    source = config.sources[0].model_copy(update={"answer_pattern": "(.+)"})
    config = config.model_copy(update={"sources": (source, *config.sources[1:])})
    ingest_local(config, str(root / "answers" / "corpus"))
    (root / "answers" / "model").symlink_to(root / "model")
    corpus = tagged(root / "answers", config)
    cost = forecast(root, config, corpus)
    questions, targets, _ = draw_accuracy_targets(
        run_seed=config.seed,
        corpus=corpus,
        num_rows=10,
        max_prompt_tokens=64 - 7,
        external={},
        tokenizer=load_tokenizer(root / "model"),
    )
    assert [target.name for target in targets] == ["colour"]
    prompts = sum(len(row) for row in questions["input_ids"].to_pylist())
    assert cost.heldout_rows == questions.num_rows == 10
    assert cost.scored_tokens == cost.scorings * (prompts + 10 * 7)


def test_auto_is_counted_at_the_most_that_its_limits_let_it_measure(root):
    one = {"designs": ["random-design"], "max_replications": 4}
    rounds: dict[str, typing.Any] = {"estimator": "auto", "auto": one, "replications": 2}
    config = config_of(root, **rounds)
    corpus = tagged(root, config)
    cost = forecast(root, config, corpus)
    design, tokens, _, _ = planned(root, config, corpus)
    assert (cost.replications, cost.runs) == (4, len(design.all_runs))
    assert cost.trained_tokens == sum(tokens)
    of_three = sum(tokens[: 3 * len(tokens) // 4])
    for limit, replications in ((of_three, 3), (of_three - 1, 2), (1, 2)):
        rounds["auto"] = one | {"max_tokens": limit}
        capped = forecast(root, config_of(root, **rounds), corpus)
        assert capped.replications == replications
    assert capped.trained_tokens == sum(tokens[: len(tokens) // 2])


def test_a_choice_of_designs_is_counted_with_the_first_rounds_of_all(root):
    def cost(*designs: str, most: int = 4, limit: int | None = None) -> InfluenceCost:
        auto = {"designs": designs, "max_replications": most, "max_tokens": limit}
        config = config_of(root, estimator="auto", auto=auto, replications=2)
        return forecast(root, config, tagged(root, config))

    alone = {name: cost(name) for name in ("branch", "random-design")}
    first = {name: cost(name, most=2) for name in alone}
    both = cost("branch", "random-design")
    totals = {
        name: alone[name].token_equivalents + first[other].token_equivalents
        for name, other in (("branch", "random-design"), ("random-design", "branch"))
    }
    assert both.token_equivalents == pytest.approx(max(totals.values()))
    most = max(totals, key=lambda name: totals[name])
    other = next(name for name in alone if name != most)
    assert both.runs == alone[most].runs + first[other].runs
    assert both.replications == 4
    spent = sum(part.trained_tokens for part in first.values())
    for more, replications in ((-1, 2), (0, 2)):
        capped = cost("branch", "random-design", limit=spent + more)
        assert capped.replications == replications
        assert capped.trained_tokens == spent


def test_too_few_rows_for_a_dose_are_found_as_the_stage_finds_them(root):
    config = config_of(root, rows_per_category=4000, dose_rows=200)
    with pytest.raises(DataError, match=r"lower influence\.rows_per_category"):
        forecast(root, config, tagged(root, config))


def test_every_estimator_of_the_configuration_says_its_runs():
    names = typing.get_args(InfluenceConfig.model_fields["estimator"].annotation)
    assert set(names) - {"auto"} == set(ESTIMATORS)


COST = InfluenceCost(
    runs=8,
    scorings=8,
    replications=2,
    longest_run_tokens=200,
    trained_tokens=1500,
    heldout_rows=30,
    scored_tokens=900,
)


def test_a_design_at_the_limit_is_taken_and_one_above_it_is_refused():
    config = InfluenceConfig(max_token_equivalents=1800)
    check_token_limit(config, COST)
    smaller = config.model_copy(update={"max_token_equivalents": 1799})
    with pytest.raises(ConfigError, match=r"1,799, but this design takes 1,800: .*replications"):
        check_token_limit(smaller, COST)
    check_token_limit(InfluenceConfig(), COST)
