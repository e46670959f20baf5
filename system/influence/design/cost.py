"""What an influence stage is going to train and score, before anything runs.

The trainings are masks on schedules whose rows a seeded draw decides, so their tokens are known as
soon as every row's length is: nothing has to be drawn, encoded or planned.  Where lengths are not
known yet, means in their place give an estimate by the same way.

A scored token counts as a third of a trained one: a backward pass costs two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from system.config import InfluenceConfig
from system.data.lengths import RowLengths
from system.errors import ConfigError
from system.influence.design.design import CategoryRows
from system.influence.design.doses import with_doses
from system.influence.design.estimators import ESTIMATORS, GRADIENT, UNSCORED, WARM, Run
from system.influence.design.interventions import (
    allocate_rows,
    asked_rows,
    draw_patterns,
    fit_dose,
    least_dose,
    seed_of,
    switched_sources,
)

SCORED_SHARE = 1.0 / 3.0
"""Trained tokens that a scored one is worth."""
LOWERED_BY = (
    "influence.replications (influence.auto.max_replications), influence.rows_per_category, "
    "influence.directions, fewer doses in influence.dose_rows and, for scoring, "
    "influence.heldout_rows lower it"
)

HeldoutLengths = Callable[[Collection[str]], np.ndarray]
"""(ids of rows that are trained on) -> [rows] tokens that scoring each held-out row takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleTokens:
    """Tokens of one category's rows in one replication, by what runs do with them."""

    base: float
    dose: float
    """Part of the base rows."""
    extra: float
    warm: float
    parts: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Several doses: rows asked -> tokens of that part of the dose and of the extra rows."""
    held: tuple[int, int] = (0, 0)
    """Rows that the largest dose and the extra rows came to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceCost:
    """The tokens and runs of a stage."""

    runs: int
    """Trainings, warm-ups and gradients included."""
    scorings: int
    replications: int
    """At most, where `auto` decides."""
    longest_run_tokens: int
    trained_tokens: int
    """Forward and backward, prompts included; those of gradients too."""
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
    heldout: HeldoutLengths,
) -> InfluenceCost:
    """The cost of all replications; of `auto`, of as many as its limits let it make.

    Where `auto` chooses a design, the others' first rounds are counted too, and of the designs the
    one that comes to most.

    Args:
        config: of the stage.
        run_seed: seed of the run.
        sources: categories, in the corpus' order.
        lengths: exact ones (`system.data.lengths.SeededLengths`) give the exact cost.
        heldout: of the rows that are scored (`system.influence.design.heldout_cost`).

    Raises:
        DataError: a category has too few rows for a dose.
    """
    inputs = (run_seed, sources, lengths, heldout)
    if config.estimator != "auto" or len(config.auto.designs) == 1:
        return _design_cost(config, *inputs)
    choices = [config.with_design(name) for name in config.auto.designs]
    firsts = [_design_cost(choice, *inputs, most=config.replications) for choice in choices]
    found = []
    for place, choice in enumerate(choices):
        others = [cost for other, cost in enumerate(firsts) if other != place]
        spent = sum(cost.trained_tokens for cost in others)
        found.append(_together(_design_cost(choice, *inputs, spent=spent), others))
    return max(found, key=lambda cost: cost.token_equivalents)


def _design_cost(
    config: InfluenceConfig,
    run_seed: int,
    sources: Sequence[str],
    lengths: RowLengths,
    heldout: HeldoutLengths,
    *,
    most: int | None = None,
    spent: int = 0,
) -> InfluenceCost:
    """The cost of one design's replications, or of the first so many.

    Args:
        config: with one design.
        run_seed: as for `influence_cost`, and so the others.
        sources: categories.
        lengths: of their rows.
        heldout: of the rows that are scored.
        most: replications; None: as many as the configuration lets it make.
        spent: tokens that count against `auto.max_tokens` already.
    """
    trained: set[str] = set()
    replications = [
        _replication(index, config, run_seed, sources, lengths, trained)
        for index in range(most_replications(config))
    ]
    totals = [sum(tokens for _, tokens in runs) for runs in replications]
    count = most or _within_budget(config, totals, spent)
    kinds = [kind for runs in replications[:count] for kind, _ in runs]
    per_run = [tokens for runs in replications[:count] for _, tokens in runs]
    rows = heldout(trained)
    # A gradient takes a pass forward and backward over the doses and over the held-out rows.
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


def _together(own: InfluenceCost, others: Sequence[InfluenceCost]) -> InfluenceCost:
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
    """Replications that the stage draws."""
    return config.auto.max_replications if config.estimator == "auto" else config.replications


def _replication(
    index: int,
    config: InfluenceConfig,
    run_seed: int,
    sources: Sequence[str],
    lengths: RowLengths,
    trained: set[str],
) -> list[tuple[str, float]]:
    """Kind and tokens of each run of a replication; adds the rows that it trains on."""
    asked = asked_rows(config)
    wanted = asked["base"] + asked["extra"] + asked["warm"]
    seed = seed_of(run_seed, "influence", index)
    tokens: dict[str, RoleTokens] = {}
    for category in sources:
        drawn = lengths("train", category, wanted, seed)
        share = fit_dose(
            allocate_rows(category, len(drawn.tokens), asked),
            drawn.response,
            config.dose_tokens,
            least_dose(asked),
        )
        tokens[category] = role_tokens(drawn.tokens, share, config.doses)
        trained.update(drawn.ids)
    patterns = draw_patterns(seed, config, len(sources))
    held = [tokens[category].held for category in sources]
    return [
        (kind, run_tokens(kind, source, tokens, patterns, config.directions, dose))
        for kind, source, dose in with_doses(
            _units(config, len(sources)),
            config.doses,
            lambda direction, source: held[source][direction == "add"],
        )
    ]


def _units(config: InfluenceConfig, num_sources: int) -> list[Run]:
    return ESTIMATORS[config.design].all_runs(
        num_sources, config.directions, config.gradient_checkpoints
    )


def _within_budget(config: InfluenceConfig, tokens: Sequence[float], spent: int) -> int:
    """How many replications `auto` may make; the first round is always made."""
    limit = config.auto.max_tokens if config.estimator == "auto" else None
    if limit is None:
        return len(tokens)
    totals = spent + np.cumsum(tokens)
    return max(config.replications, int(np.searchsorted(totals, limit, side="right")))


def role_tokens(lengths: np.ndarray, share: CategoryRows, doses: Sequence[int] = ()) -> RoleTokens:
    """Tokens of a category's drawn rows, cut as `interventions.plan_replication` cuts them.

    Args:
        lengths: [rows] tokens in the order drawn.
        share: how the rows are shared out.
        doses: rows asked of each dose, ascending; needed where there are several.
    """
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
        held=(share.dose, share.extra),
    )


def run_tokens(
    kind: str,
    source: int,
    tokens: Mapping[str, RoleTokens],
    patterns: Mapping[str, Sequence[Sequence[bool]]],
    directions: Sequence[str],
    dose: int = 0,
) -> float:
    """Tokens that one run trains on: those of the rows that its mask leaves on.

    Args:
        kind: of the run.
        source: its source or pattern.
        tokens: by category, in the order of the sources.
        patterns: of the replication (`random-design`).
        directions: whose doses a gradient is taken of.
        dose: rows asked of the dose, where there are several.
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
    """Refuses a design above `influence.max_token_equivalents`.

    Args:
        config: of the stage.
        cost: of its design.
        is_exact: whether the cost follows from the lengths of all rows.

    Raises:
        ConfigError: names both numbers and what lowers the design's.
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
