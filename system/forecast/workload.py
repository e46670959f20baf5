"""Tokens that the stages of a run train, score and generate.

Influence is exact where lengths are.  What the final training and the arms of the evaluation train
on follows the mix, which is solved later: until then the base mix stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from system.config import RunConfig
from system.curriculum.plan import PAPER_PASSES
from system.evaluation.arms import apportion, move_seed, random_move
from system.forecast.known import Known
from system.influence.design.cost import LOWERED_BY, SCORED_SHARE, InfluenceCost
from system.influence.design.interventions import seed_of
from system.mix.question import base_weights
from system.tagging.choose import stratified_sizes

STAGES = ("influence", "train", "evaluate")
"""The stages whose cost is forecast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one stage has to do."""

    stage: str
    trainings: int
    trained_rows: int
    """Of the largest training."""
    trained_tokens: int
    """Forward and backward, prompts included, all trainings."""
    longest_tokens: int
    """Trained tokens of the longest training."""
    models_scored: int
    scored_rows: int
    """Rows that every scored model scores."""
    scored_tokens: int
    """Forward only, prompts included, all models."""
    generated_tokens: int
    """At most, all models; prompts are left out."""
    lowered_by: str
    """Which fields of the configuration lower it."""

    @property
    def token_equivalents(self) -> float:
        """Trained tokens plus a third of those that are scored or generated."""
        return self.trained_tokens + SCORED_SHARE * (self.scored_tokens + self.generated_tokens)


def workloads(
    config: RunConfig, known: Known, cost: InfluenceCost, mix: Mapping[str, float] | None
) -> list[Workload]:
    """The work of all stages of `STAGES`, in their order.

    Args:
        config: of the run.
        known: rows and lengths.
        cost: of the influence stage.
        mix: examples of each category in one pass, once it is solved.
    """
    passes = num_passes(config)
    mixes = pass_counts(config, known, mix)
    tokens = {name: _tokens(counts, known) * passes for name, counts in mixes.items()}
    rows = {name: sum(counts.values()) * passes for name, counts in mixes.items()}
    train = Workload(
        stage="train",
        trainings=1,
        trained_rows=rows["solved"],
        trained_tokens=tokens["solved"],
        longest_tokens=tokens["solved"],
        models_scored=0,
        scored_rows=0,
        scored_tokens=0,
        generated_tokens=0,
        lowered_by="solve.budget and curriculum.epochs lower it",
    )
    return [_influence(config, known, cost), train, _evaluate(config, known, tokens, rows)]


def num_passes(config: RunConfig) -> int:
    """How often the mix is gone through in a training."""
    if config.curriculum.preset == "paper":
        return PAPER_PASSES
    return config.curriculum.epochs


def pass_counts(
    config: RunConfig, known: Known, mix: Mapping[str, float] | None
) -> dict[str, dict[str, int]]:
    """Examples of each category in one pass: of the mixes that arms are named after.

    All are scaled to the budget as the solver does.  `solved` is the base mix until the mix is
    there, and `random`, which moves as much, is as well; each of its trainings moves elsewhere,
    this is their mean.
    """
    rows = {name: known.rows["train"][name] for name in known.categories}
    weight = dict.fromkeys(rows, 1.0)
    if config.solve.unit == "tokens":
        weight = {name: known.response_tokens.get(name, 1.0) for name in rows}
    total = sum(count * weight[name] for name, count in rows.items())
    examples = round(config.solve.budget * sum(rows.values()) / total)
    natural = apportion(examples, rows)
    limits = {name: int(count * config.solve.max_epochs) for name, count in rows.items()}
    uniform = stratified_sizes(limits, examples)
    weights = dict(zip(rows, base_weights(config.solve, tuple(rows), rows).tolist(), strict=True))
    start = uniform if config.solve.base == "uniform" else apportion(examples, weights)
    solved = start if mix is None else {name: round(count) for name, count in mix.items()}
    moved = round(sum(max(solved[name] - count, 0.0) for name, count in start.items()))
    moves = [
        random_move(start, limits, moved, move_seed(config.seed, training))
        for training in range(config.evaluate.seeds)
    ]
    random = {name: sum(move[name] for move in moves) for name in natural}
    return {
        "natural": natural,
        "uniform": uniform,
        "random": apportion(examples, random),
        "solved": solved,
    }


def _tokens(counts: Mapping[str, int], known: Known) -> int:
    return round(sum(count * known.tokens.get(name, 0.0) for name, count in counts.items()))


def _influence(config: RunConfig, known: Known, cost: InfluenceCost) -> Workload:
    influence = config.influence
    extra = influence.largest_dose if "add" in influence.directions else 0
    return Workload(
        stage="influence",
        trainings=cost.runs,
        trained_rows=len(known.categories) * (influence.rows_per_category + extra),
        trained_tokens=cost.trained_tokens,
        longest_tokens=cost.longest_run_tokens,
        models_scored=cost.scorings,
        scored_rows=cost.heldout_rows,
        scored_tokens=cost.scored_tokens,
        generated_tokens=0,
        lowered_by=LOWERED_BY,
    )


def _evaluate(
    config: RunConfig, known: Known, tokens: Mapping[str, int], rows: Mapping[str, int]
) -> Workload:
    evaluate = config.evaluate
    of_arms = [tokens[arm.partition("-")[0]] for arm in evaluate.arms]
    seed = seed_of(config.seed, "evaluate-test")
    test = [
        known.lengths("test", category, evaluate.test_rows, seed).tokens
        for category in known.categories
    ]
    # The base model and the delivered one are scored beside the arms.
    models = 2 + len(evaluate.arms) * evaluate.seeds
    return Workload(
        stage="evaluate",
        trainings=len(evaluate.arms) * evaluate.seeds,
        trained_rows=max((rows[arm.partition("-")[0]] for arm in evaluate.arms), default=0),
        trained_tokens=sum(of_arms) * evaluate.seeds,
        longest_tokens=max(of_arms, default=0),
        models_scored=models,
        scored_rows=sum(len(part) for part in test),
        scored_tokens=round(sum(float(part.sum()) for part in test)) * models,
        generated_tokens=known.questions * evaluate.max_new_tokens * models,
        lowered_by=(
            "evaluate.seeds, evaluate.arms, solve.budget and, for scoring and answers, "
            "evaluate.test_rows, evaluate.accuracy_rows and evaluate.max_new_tokens lower it"
        ),
    )
