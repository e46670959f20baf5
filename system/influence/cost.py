"""What an influence stage is going to train and score, before anything runs.

The trainings are masks on schedules whose rows a seeded draw decides, so their tokens are known as
soon as every row's length is: nothing has to be drawn, encoded or planned.  Where lengths are not
known yet, means in their place give an estimate by the same way.

A scored token counts as a third of a trained one: a backward pass costs two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from system.config import InfluenceConfig
from system.data.lengths import RowLengths
from system.errors import ConfigError
from system.influence.design import CategoryRows
from system.influence.estimators import ESTIMATORS, UNSCORED
from system.influence.interventions import (
    allocate_rows,
    asked_rows,
    draw_patterns,
    seed_of,
    switched_sources,
)

SCORED_SHARE = 1.0 / 3.0
"""Trained tokens that a scored one is worth."""
LOWERED_BY = (
    "influence.replications, influence.rows_per_category, influence.directions and, for scoring, "
    "influence.heldout_rows lower it"
)

External = Callable[[Collection[str]], np.ndarray]
"""(ids of rows that are trained on) -> [rows] tokens of all rows of `influence.targets`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleTokens:
    """Tokens of one category's rows in one replication, by what runs do with them."""

    base: float
    dose: float
    """Part of the base rows."""
    extra: float
    warm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceCost:
    """The tokens and runs of a stage."""

    runs: int
    """Trainings, warm-ups included."""
    scorings: int
    longest_run_tokens: int
    trained_tokens: int
    """Forward and backward, prompts included."""
    heldout_rows: int
    """Of all targets; each scoring scores all of them."""
    scored_tokens: int
    """Forward only, prompts included."""

    @property
    def token_equivalents(self) -> float:
        """Trained tokens plus a third of the scored ones."""
        return self.trained_tokens + SCORED_SHARE * self.scored_tokens


def influence_cost(
    config: InfluenceConfig,
    *,
    run_seed: int,
    sources: Sequence[str],
    lengths: RowLengths,
    external: External | None = None,
) -> InfluenceCost:
    """The cost of all replications.

    Args:
        config: of the stage.
        run_seed: seed of the run.
        sources: categories, in the corpus' order.
        lengths: exact ones (`system.data.lengths.SeededLengths`) give the exact cost.
        external: lengths of targets that no source owns.

    Raises:
        DataError: a category has too few rows for a dose.
    """
    asked = asked_rows(config)
    wanted = asked["base"] + asked["extra"] + asked["warm"]
    runs = ESTIMATORS[config.estimator].runs(len(sources), config.directions)
    trained: set[str] = set()
    per_run: list[float] = []
    for index in range(config.replications):
        seed = seed_of(run_seed, "influence", index)
        tokens: dict[str, RoleTokens] = {}
        for category in sources:
            drawn = lengths("train", category, wanted, seed)
            tokens[category] = role_tokens(
                drawn.tokens, allocate_rows(category, len(drawn.tokens), asked)
            )
            trained.update(drawn.ids)
        patterns = draw_patterns(seed, config, len(sources))
        per_run += [run_tokens(kind, source, tokens, patterns) for kind, source in runs]
    heldout_seed = seed_of(run_seed, "influence", "heldout")
    heldout = [
        lengths("estimate", category, config.heldout_rows, heldout_seed).tokens
        for category in sources
    ]
    if external is not None:
        heldout.append(external(trained))
    rows = np.concatenate([np.asarray(part, dtype=np.float64) for part in heldout])
    scorings = config.replications * sum(kind not in UNSCORED for kind, _ in runs)
    return InfluenceCost(
        runs=len(per_run),
        scorings=scorings,
        longest_run_tokens=round(max(per_run)),
        trained_tokens=round(sum(per_run)),
        heldout_rows=len(rows),
        scored_tokens=round(float(rows.sum()) * scorings),
    )


def role_tokens(lengths: np.ndarray, share: CategoryRows) -> RoleTokens:
    """Tokens of a category's drawn rows, cut as `interventions.plan_replication` cuts them.

    Args:
        lengths: [rows] tokens in the order drawn.
        share: how the rows are shared out.
    """
    split = share.base + share.extra
    fresh = lengths[split : split + share.warm - share.warm_reused]
    return RoleTokens(
        base=float(lengths[: share.base].sum()),
        dose=float(lengths[: share.dose].sum()),
        extra=float(lengths[share.base : split].sum()),
        warm=float(fresh.sum() + lengths[: share.warm_reused].sum()),
    )


def run_tokens(
    kind: str,
    source: int,
    tokens: Mapping[str, RoleTokens],
    patterns: Mapping[str, Sequence[Sequence[bool]]],
) -> float:
    """Tokens that one run trains on: those of the rows that its mask leaves on.

    Args:
        kind: of the run.
        source: its source or pattern.
        tokens: by category, in the order of the sources.
        patterns: of the replication (`random-design`).
    """
    if kind == "warm":
        return sum(part.warm for part in tokens.values())
    base = sum(part.base for part in tokens.values())
    direction, switched = switched_sources(kind, source, list(tokens), patterns)
    if direction == "add":
        return base + sum(tokens[name].extra for name in switched)
    return base - sum(tokens[name].dose for name in switched)


def check_max_tokens(
    config: InfluenceConfig, cost: InfluenceCost, *, is_exact: bool = True
) -> None:
    """Refuses a design above `influence.max_tokens`.

    Args:
        config: of the stage.
        cost: of its design.
        is_exact: whether the cost follows from the lengths of all rows.

    Raises:
        ConfigError: names both numbers and what lowers the design's.
    """
    if config.max_tokens is None or cost.token_equivalents <= config.max_tokens:
        return
    about = "" if is_exact else "about "
    raise ConfigError(
        f"influence.max_tokens is {config.max_tokens:,}, but this design takes "
        f"{about}{cost.token_equivalents:,.0f} token equivalents: {cost.trained_tokens:,} tokens "
        f"trained in {cost.runs} runs, and a third of {cost.scored_tokens:,} scored ones "
        f"({config.estimator}, {config.replications} replications). {LOWERED_BY}; or raise "
        "influence.max_tokens. Nothing was trained."
    )
