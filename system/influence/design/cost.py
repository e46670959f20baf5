"""The cost of an influence stage in tokens and runs, before anything runs.

Intervention runs are masks on schedules, and a seeded draw decides the rows of a schedule.  So the
cost follows from the lengths of the rows: nothing has to be encoded or planned.  If the lengths are
not known yet, mean lengths give an estimate with the same code.  `check` and the token limit of
the stage use these numbers.

A scored token costs a third of a trained one, because a backward pass costs two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from system.config import InfluenceConfig
from system.data.lengths import RowLengths
from system.errors import ConfigError
from system.influence.design.design import CategoryRows
from system.influence.design.doses import at_every_dose
from system.influence.design.estimators import ESTIMATORS, GRADIENT, UNSCORED, WARM, Run
from system.influence.design.interventions import (
    allocate_rows,
    draw_patterns,
    fit_dose,
    minimum_dose,
    requested_rows,
    seed_of,
    switched_sources,
)

SCORED_SHARE = 1.0 / 3.0
"""Cost of scoring one token, in trained tokens."""
LOWERED_BY = (
    "influence.replications (influence.auto.max_replications), influence.rows_per_category, "
    "influence.directions, fewer doses in influence.dose_rows and, for scoring, "
    "influence.heldout_rows lower it"
)

HeldoutLengths = Callable[[Collection[str]], np.ndarray]
"""(ids of the rows that are trained on) -> [rows] tokens to score for each held-out row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleTokens:
    """Tokens of one category's rows in one replication, by the role of the rows."""

    base: float
    dose: float
    """Included in `base`."""
    extra: float
    warm: float
    parts: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """With several doses: requested rows of a dose -> (tokens to remove, tokens to add)."""
    largest_rows: tuple[int, int] = (0, 0)
    """Actual rows of the largest dose: (to remove, to add)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceCost:
    """The tokens and runs of an influence stage."""

    runs: int
    """Trainings, including warm-ups and gradient passes."""
    scorings: int
    replications: int
    """With `auto`: the largest number that it may make."""
    longest_run_tokens: int
    trained_tokens: int
    """Forward and backward, including prompts and gradient passes."""
    heldout_rows: int
    """Of all targets together; each scoring scores all of them."""
    scored_tokens: int
    """Forward only, prompts included."""

    @property
    def token_equivalents(self) -> float:
        """Trained tokens plus a third of the scored tokens."""
        return self.trained_tokens + SCORED_SHARE * self.scored_tokens


def influence_cost(
    config: InfluenceConfig,
    *,
    run_seed: int,
    sources: Sequence[str],
    lengths: RowLengths,
    heldout: HeldoutLengths,
) -> InfluenceCost:
    """The cost of all replications; with `auto`, of as many as its limits allow.

    If `auto` chooses between designs, the result is an upper bound: the most expensive choice,
    plus the first rounds of all other designs.

    Args:
        config: of the stage.
        run_seed: seed of the run.
        sources: categories, in the order of the corpus.
        lengths: row lengths; exact ones (`system.data.lengths.SeededLengths`) give the exact cost.
        heldout: lengths of the held-out rows (`system.influence.design.heldout_cost`).

    Raises:
        DataError: a category has too few rows for a dose.
    """
    inputs = (run_seed, sources, lengths, heldout)
    if config.estimator != "auto" or len(config.auto.designs) == 1:
        return _design_cost(config, *inputs)
    choices = [config.with_design(name) for name in config.auto.designs]
    first_rounds = [_design_cost(choice, *inputs, count=config.replications) for choice in choices]
    totals = []
    for place, choice in enumerate(choices):
        others = [cost for other, cost in enumerate(first_rounds) if other != place]
        spent = sum(cost.trained_tokens for cost in others)
        totals.append(_sum_of_costs(_design_cost(choice, *inputs, spent=spent), others))
    return max(totals, key=lambda cost: cost.token_equivalents)


def _design_cost(
    config: InfluenceConfig,
    run_seed: int,
    sources: Sequence[str],
    lengths: RowLengths,
    heldout: HeldoutLengths,
    *,
    count: int | None = None,
    spent: int = 0,
) -> InfluenceCost:
    """The cost of the replications of one design.

    Args:
        config: with one design.
        run_seed: as for `influence_cost`.
        sources: as for `influence_cost`.
        lengths: as for `influence_cost`.
        heldout: as for `influence_cost`.
        count: number of replications; None: as many as the configuration allows.
        spent: tokens that already count against `auto.max_tokens`.
    """
    trained: set[str] = set()
    replications = [
        _replication(index, config, run_seed, sources, lengths, trained)
        for index in range(most_replications(config))
    ]
    totals = [sum(tokens for _, tokens in runs) for runs in replications]
    count = count or _within_budget(config, totals, spent)
    kinds = [kind for runs in replications[:count] for kind, _ in runs]
    per_run = [tokens for runs in replications[:count] for _, tokens in runs]
    rows = heldout(trained)
    # A gradient run makes a forward and backward pass over its doses and over the held-out rows.
    differentiated = sum(kind == GRADIENT for kind in kinds)
    scorings = sum(kind not in UNSCORED for kind in kinds)
    return InfluenceCost(
        runs=len(per_run),
        scorings=scorings,
        replications=count,
        longest_run_tokens=round(max(per_run)),
        trained_tokens=round(sum(per_run) + float(rows.sum()) * differentiated),
        heldout_rows=len(rows),
        scored_tokens=round(float(rows.sum()) * scorings),
    )


def _sum_of_costs(own: InfluenceCost, others: Sequence[InfluenceCost]) -> InfluenceCost:
    every = [own, *others]
    return InfluenceCost(
        runs=sum(cost.runs for cost in every),
        scorings=sum(cost.scorings for cost in every),
        replications=own.replications,
        longest_run_tokens=max(cost.longest_run_tokens for cost in every),
        trained_tokens=sum(cost.trained_tokens for cost in every),
        heldout_rows=own.heldout_rows,
        scored_tokens=sum(cost.scored_tokens for cost in every),
    )


def most_replications(config: InfluenceConfig) -> int:
    """The number of replications that the stage draws: all that it may need."""
    return config.auto.max_replications if config.estimator == "auto" else config.replications


def _replication(
    index: int,
    config: InfluenceConfig,
    run_seed: int,
    sources: Sequence[str],
    lengths: RowLengths,
    trained: set[str],
) -> list[tuple[str, float]]:
    """(kind, tokens) of each run of a replication; adds the ids of its rows to `trained`."""
    requested = requested_rows(config)
    num_rows = requested["base"] + requested["extra"] + requested["warm"]
    seed = seed_of(run_seed, "influence", index)
    tokens: dict[str, RoleTokens] = {}
    for category in sources:
        drawn = lengths("train", category, num_rows, seed)
        share = fit_dose(
            allocate_rows(category, len(drawn.tokens), requested),
            drawn.response,
            config.dose_tokens,
            minimum_dose(requested),
        )
        tokens[category] = role_tokens(drawn.tokens, share, config.doses)
        trained.update(drawn.ids)
    patterns = draw_patterns(seed, config, len(sources))
    largest = [tokens[category].largest_rows for category in sources]
    return [
        (kind, run_tokens(kind, source, tokens, patterns, config.directions, dose))
        for kind, source, dose in at_every_dose(
            _units(config, len(sources)),
            config.doses,
            lambda direction, source: largest[source][direction == "add"],
        )
    ]


def _units(config: InfluenceConfig, num_sources: int) -> list[Run]:
    return ESTIMATORS[config.design].all_runs(
        num_sources, config.directions, config.gradient_checkpoints
    )


def _within_budget(config: InfluenceConfig, tokens: Sequence[float], spent: int) -> int:
    """How many replications `auto` may make; it always makes the first round."""
    limit = config.auto.max_tokens if config.estimator == "auto" else None
    if limit is None:
        return len(tokens)
    totals = spent + np.cumsum(tokens)
    return max(config.replications, int(np.searchsorted(totals, limit, side="right")))


def role_tokens(lengths: np.ndarray, share: CategoryRows, doses: Sequence[int] = ()) -> RoleTokens:
    """Tokens of a category's drawn rows by role.

    Args:
        lengths: [rows] tokens, in the order in which the rows were drawn.
        share: how many rows have which role.
        doses: requested rows of each dose, ascending; only used with several doses.
    """
    # Must cut the rows as `interventions.plan_replication` does, or the cost is not exact.
    split = share.base + share.extra
    extra = lengths[share.base : split]
    fresh = lengths[split : split + share.warm - share.warm_reused]
    return RoleTokens(
        base=float(lengths[: share.base].sum()),
        dose=float(lengths[: share.dose].sum()),
        extra=float(extra.sum()),
        warm=float(fresh.sum() + lengths[: share.warm_reused].sum()),
        parts={
            dose: (float(lengths[: min(dose, share.dose)].sum()), float(extra[:dose].sum()))
            for dose in doses
        },
        largest_rows=(share.dose, share.extra),
    )


def run_tokens(
    kind: str,
    source: int,
    tokens: Mapping[str, RoleTokens],
    patterns: Mapping[str, Sequence[Sequence[bool]]],
    directions: Sequence[str],
    dose: int = 0,
) -> float:
    """Tokens that one run trains on: those of the rows that are active in its mask.

    Args:
        kind: of the run.
        source: index of its source or pattern.
        tokens: by category, in the order of the sources.
        patterns: of the replication (`random-design`).
        directions: a gradient run differentiates the doses of these directions.
        dose: requested rows of the dose; 0 with a single dose.
    """
    if kind == WARM:
        return sum(part.warm for part in tokens.values())
    if kind == GRADIENT:
        roles = ["extra" if direction == "add" else "dose" for direction in directions]
        return sum(getattr(part, role) for part in tokens.values() for role in roles)
    base = sum(part.base for part in tokens.values())
    direction, switched = switched_sources(kind, source, list(tokens), patterns)
    doses = [
        tokens[name].parts[dose] if dose else (tokens[name].dose, tokens[name].extra)
        for name in switched
    ]
    if direction == "add":
        return base + sum(extra for _, extra in doses)
    return base - sum(removed for removed, _ in doses)


def check_token_limit(
    config: InfluenceConfig, cost: InfluenceCost, *, is_exact: bool = True
) -> None:
    """Refuses a design that costs more than `influence.max_token_equivalents`.

    Args:
        config: of the stage.
        cost: of its design.
        is_exact: False if the cost is an estimate from mean lengths.

    Raises:
        ConfigError: the cost is above the limit.
    """
    limit = config.max_token_equivalents
    if limit is None or cost.token_equivalents <= limit:
        return
    about = "" if is_exact else "about "
    raise ConfigError(
        f"influence.max_token_equivalents is {limit:,}, but this design takes "
        f"{about}{cost.token_equivalents:,.0f}: {cost.trained_tokens:,} tokens trained in "
        f"{cost.runs} runs, and a third of {cost.scored_tokens:,} scored ones "
        f"({config.estimator}, {cost.replications} replications). {LOWERED_BY}; or raise "
        "influence.max_token_equivalents. Nothing was trained."
    )
