"""What an append is going to train and score, before anything runs.

Earlier runs say themselves what they took; a new run takes the reference run's tokens and its dose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from system.config import RunConfig
from system.data.corpus import Corpus
from system.data.lengths import RowLengths
from system.influence.append.append import Holding, dose_size, trained_ids, undrawn
from system.influence.append.earlier import Earlier
from system.influence.design.accuracy_targets import answer_tokens
from system.influence.design.cost import InfluenceCost
from system.influence.design.design import InterventionRun, Replication
from system.influence.design.estimators import UNSCORED, WARM
from system.influence.design.heldout_cost import loss_heldout, question_lengths
from system.training.plan import TrainPlan


def append_cost(
    config: RunConfig,
    earlier: Earlier,
    corpus: Corpus,
    lengths: RowLengths,
    tokenizer: Callable[[], Any],
) -> InfluenceCost:
    """The cost of appending the categories of a corpus that an earlier result lacks.

    Args:
        config: of the run.
        earlier: what is appended to.
        corpus: of stage `tag`.
        lengths: of its rows; exact ones give the exact cost.
        tokenizer: loads it; called where answers are measured.

    Raises:
        DataError: nothing of the earlier result holds, or a new category has too few rows.
    """
    holding = earlier.holding(corpus)
    before = earlier.heldout()
    columns = (before.column(name).to_pylist() for name in ("category", "input_ids"))
    gone = set(earlier.design.sources) - set(holding.kept)
    longest = answer_tokens(config) if config.influence.metric == "accuracy" else 0
    old_H = [len(row) + longest for name, row in zip(*columns, strict=True) if name not in gone]
    new_H = _new_heldout(config, corpus, holding, lengths, tokenizer)
    taken = set(before.column("id").to_pylist())
    trained, scored, scorings = [], 0.0, 0
    for replication in earlier.design.replications:
        plans = earlier.plans(replication.index)
        runs, earlier_scorings = _earlier_runs(earlier, replication, holding, bool(len(new_H)))
        doses = _doses(earlier, replication, holding, plans, taken, lengths)
        reference = InterventionRun(replication=replication.index, kind="reference", source=-1)
        base = earlier.training(reference)["trained_tokens"]
        trained += [*runs, *(base + dose for dose in doses)]
        scored += earlier_scorings * float(new_H.sum())
        scored += len(doses) * (sum(old_H) + float(new_H.sum()))
        scorings += earlier_scorings + len(doses)
    return InfluenceCost(
        runs=len(trained),
        scorings=scorings,
        replications=len(earlier.design.replications),
        longest_run_tokens=round(max(trained, default=0)),
        trained_tokens=round(sum(trained)),
        heldout_rows=len(old_H) + len(new_H),
        scored_tokens=round(scored),
    )


def append_text(earlier: Earlier, holding: Holding) -> str:
    """What an append is going to do, for people."""
    new = ", ".join(holding.new) or "no category"
    text = f"append to influence/{earlier.name}: {new}"
    if holding.stale:
        text += "; stale: " + "; ".join(f"{n} ({why})" for n, why in sorted(holding.stale.items()))
    return text


def _earlier_runs(
    earlier: Earlier, replication: Replication, holding: Holding, is_scored: bool
) -> tuple[list[float], int]:
    """Tokens of the earlier trainings to repeat, and how many earlier runs are scored again."""
    sources = earlier.design.sources
    kept_runs = [
        run
        for run in earlier.design.all_runs
        if run.replication == replication.index
        and (run.source < 0 or sources[run.source] in holding.kept)
    ]
    rescored = [run for run in kept_runs if run.kind not in UNSCORED] if is_scored else []
    repeated = [run for run in rescored if earlier.checkpoint(run) is None]
    if repeated or holding.new:  # each of these starts from the warm-up
        warm = [run for run in kept_runs if run.kind == WARM]
        repeated += [run for run in warm if earlier.checkpoint(run) is None]
    return [earlier.training(run)["trained_tokens"] for run in repeated], len(rescored)


def _doses(
    earlier: Earlier,
    replication: Replication,
    holding: Holding,
    plans: Mapping[str, TrainPlan],
    taken: set[str],
    lengths: RowLengths,
) -> list[float]:
    """Tokens of the dose of each new category."""
    asked = earlier.design.asked
    trained = trained_ids(plans, holding.kept)
    found = []
    for name in holding.new:

        def ids(wanted: int, name: str = name) -> list[str]:
            drawn = lengths("train", name, wanted, replication.seed)
            # Where only the number of rows is known, none is taken.
            return drawn.ids or [""] * len(drawn.tokens)

        places = undrawn(ids, asked["dose"], trained | taken)
        dose_size(name, len(places), asked)
        wanted = places[-1] + 1 if places else 0
        drawn = lengths("train", name, wanted, replication.seed)
        found.append(float(np.asarray(drawn.tokens, dtype=np.float64)[places].sum()))
    return found


def _new_heldout(
    config: RunConfig,
    corpus: Corpus,
    holding: Holding,
    lengths: RowLengths,
    tokenizer: Callable[[], Any],
) -> np.ndarray:
    """[rows] tokens that scoring each held-out row of the new categories takes."""
    if not holding.new:
        return np.zeros(0)
    if config.influence.metric == "accuracy":
        return question_lengths(config, corpus, tokenizer(), {}, holding.new)
    return loss_heldout(config, holding.new, lengths)(())
