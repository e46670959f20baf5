"""The rounds of estimator `auto`: measures a replication, solves the mix, decides whether to stop.

    measure ──> matrices ──> judge ──> rounds.json
       ^                       │
       └── one more replication┘   until `reason_to_stop` has a reason

Each verdict is written once and read again after a restart, so that measured hours cannot change an
earlier decision.  Everything else follows from the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

from actors.stage import StageContext
from system import storage
from system.auto.rounds import Round, judge_round, reason_to_stop
from system.data.corpus import Corpus
from system.data.lengths import mean_response_tokens
from system.influence.design.design import Design
from system.influence.estimate.matrix import EffectMatrix


def measure_in_rounds(
    context: StageContext,
    planned: Design,
    measure: Callable[[Design], None],
    matrices: Callable[[Design], Mapping[str, EffectMatrix]],
    *,
    spent_tokens: int = 0,
    spent_hours: float = 0.0,
) -> tuple[list[Round], str]:
    """Measures replication after replication until there is a reason to stop.

    Args:
        context: of the influence stage.
        planned: the design with all replications that may be measured.
        measure: makes all unfinished runs of a design.
        matrices: returns the effects of a finished design, by direction.
        spent_tokens: tokens trained for designs that were tried and rejected.
        spent_hours: hours of training for them.

    Returns:
        The rounds, and the reason to stop.
    """
    config = context.config
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokens = mean_response_tokens(corpus) if config.solve.unit == "tokens" else None
    uri = storage.join(context.attempt, "rounds.json")
    recorded = storage.read_json(uri) if storage.is_whole(uri) else []
    rounds = [Round(**value) for value in recorded]
    while (
        not rounds
        or (reason := reason_to_stop(rounds, config.influence.auto, spent_tokens, spent_hours))
        is None
    ):
        count = rounds[-1].replications + 1 if rounds else config.influence.replications
        design = planned.first(count)
        measure(design)
        stats = [
            storage.read_json(storage.join(context.attempt, "units", f"{run.name}.json"))
            for run in design.all_runs
        ]
        rounds.append(
            judge_round(
                matrices(design),
                config.solve,
                corpus.counts("train"),
                tokens,
                replications=count,
                trained_tokens=spent_tokens + sum(item["trained_tokens"] for item in stats),
                tuner_hours=spent_hours + sum(item["seconds"] for item in stats) / 3600.0,
                seed=config.seed,
            )
        )
        storage.write_json(uri, [asdict(item) for item in rounds])
        context.progress.say(f"  {rounds[-1].line}")
    return rounds, reason
