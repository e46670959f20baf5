"""The cost of an append in tokens and runs, before anything runs.

The cost of earlier runs is recorded in their files.  A new run costs the tokens of the reference
run plus its dose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from system.config import RunConfig
from system.data.corpus import Corpus
from system.data.lengths import RowLengths
from system.influence.append.append import CategoryStatus, dose_size, first_unused_rows, trained_ids
from system.influence.append.earlier import EarlierResult
from system.influence.design.accuracy_targets import answer_tokens
from system.influence.design.cost import InfluenceCost
from system.influence.design.design import InterventionRun, Replication
from system.influence.design.estimators import UNSCORED, WARM
from system.influence.design.heldout_cost import loss_heldout, question_lengths
from system.training.plan import TrainPlan


def append_cost(
    config: RunConfig,
    earlier: EarlierResult,
    corpus: Corpus,
    lengths: RowLengths,
    tokenizer: Callable[[], Any],
) -> InfluenceCost:
    """The cost of appending the categories of a corpus that an earlier result lacks.

    Args:
        config: of the run.
        earlier: the result that is appended to.
        corpus: of stage `tag`.
        lengths: of its rows; exact lengths give the exact cost.
        tokenizer: loads the tokenizer; called only if accuracy is measured.

    Raises:
        DataError: no category of the earlier result is valid, or a new one has too few rows.
    """
    status = earlier.category_status(corpus)
    before = earlier.heldout()
    columns = (before.column(name).to_pylist() for name in ("category", "input_ids"))
    gone = set(earlier.design.sources) - set(status.kept)
    longest = answer_tokens(config) if config.influence.metric == "accuracy" else 0
    old_H = [len(row) + longest for name, row in zip(*columns, strict=True) if name not in gone]
    new_H = _new_heldout(config, corpus, status, lengths, tokenizer)
    taken = set(before.column("id").to_pylist())
    trained, scored, scorings = [], 0.0, 0
    for replication in earlier.design.replications:
        plans = earlier.plans(replication.index)
        runs, earlier_scorings = _earlier_runs(earlier, replication, status, bool(len(new_H)))
        doses = _doses(earlier, replication, status, plans, taken, lengths)
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


def append_text(earlier: EarlierResult, status: CategoryStatus) -> str:
    """One line of text: what an append is going to do."""
    new = ", ".join(status.new) or "no category"
    text = f"append to influence/{earlier.name}: {new}"
    if status.stale:
        text += "; stale: " + "; ".join(f"{n} ({why})" for n, why in sorted(status.stale.items()))
    return text


def _earlier_runs(
    earlier: EarlierResult, replication: Replication, status: CategoryStatus, is_scored: bool
) -> tuple[list[float], int]:
    """Tokens of the earlier trainings that are repeated, and the number of earlier runs to score.

    An earlier run is scored again only if there are new held-out rows (`is_scored`), and is trained
    again only if its checkpoint was not kept.
    """
    sources = earlier.design.sources
    kept_runs = [
        run
        for run in earlier.design.all_runs
        if run.replication == replication.index
        and (run.source < 0 or sources[run.source] in status.kept)
    ]
    rescored = [run for run in kept_runs if run.kind not in UNSCORED] if is_scored else []
    repeated = [run for run in rescored if earlier.checkpoint(run) is None]
    if repeated or status.new:  # each of these starts from the warm-up
        warm = [run for run in kept_runs if run.kind == WARM]
        repeated += [run for run in warm if earlier.checkpoint(run) is None]
    return [earlier.training(run)["trained_tokens"] for run in repeated], len(rescored)


def _doses(
    earlier: EarlierResult,
    replication: Replication,
    status: CategoryStatus,
    plans: Mapping[str, TrainPlan],
    taken: set[str],
    lengths: RowLengths,
) -> list[float]:
    """The number of tokens in the dose of each new category."""
    asked = earlier.design.asked
    trained = trained_ids(plans, status.kept)
    dose_tokens = []
    for name in status.new:

        def ids(num_rows: int, name: str = name) -> list[str]:
            drawn = lengths("train", name, num_rows, replication.seed)
            # If only the number of rows is known, assume that none is used yet.
            return drawn.ids or [""] * len(drawn.tokens)

        places = first_unused_rows(ids, asked["dose"], trained | taken)
        dose_size(name, len(places), asked)
        num_rows = places[-1] + 1 if places else 0
        drawn = lengths("train", name, num_rows, replication.seed)
        dose_tokens.append(float(np.asarray(drawn.tokens, dtype=np.float64)[places].sum()))
    return dose_tokens


def _new_heldout(
    config: RunConfig,
    corpus: Corpus,
    status: CategoryStatus,
    lengths: RowLengths,
    tokenizer: Callable[[], Any],
) -> np.ndarray:
    """[rows] tokens to score for each held-out row of the new categories."""
    if not status.new:
        return np.zeros(0)
    if config.influence.metric == "accuracy":
        return question_lengths(config, corpus, tokenizer(), {}, status.new)
    return loss_heldout(config, status.new, lengths)(())
