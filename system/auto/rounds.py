"""Decides when `influence.estimator: auto` has measured enough.

Each round adds one replication of the chosen design (`system.auto.trial`).  After each round the
mix is solved as the solve stage would solve it.  Its expected regret is the gain that better known
effects could still bring.  Measuring stops if the regret is below the user's limit, or if the next
round would exceed a budget.

A round measures all categories, even those whose share is settled, because errors are pooled over
all categories and a run of a weighing design informs about all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from system.auto.trial import typical_error
from system.config import AutoConfig, SolveConfig
from system.errors import InfeasibleMixError
from system.influence.estimate.matrix import EffectMatrix
from system.mix.question import mix_options, mix_problem
from system.solve import expected_regret

NUM_DRAWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The state of knowledge after a number of replications."""

    replications: int
    trained_tokens: int
    """Total of all rounds so far."""
    tuner_hours: float
    precision: float
    """Median standard error of the effect of a dose off the diagonal, nats per response token."""
    gain: float | None
    """Predicted gain of the mix; None if no mix satisfies the guards with the present effects.
    (Limits that contradict each other for any effects are refused before measuring.)"""
    regret: float | None
    """Expected regret of the mix, nats per response token; None if no draw of the effects allows a
    mix that satisfies the guards."""
    regret_error: float
    """Monte Carlo standard error of the regret."""
    undecided: dict[str, float]
    """Category -> how far its count may still move, as a share of the budget; the largest five."""

    @property
    def line(self) -> str:
        """One line of text."""
        regret = "not known" if self.regret is None else f"{self.regret:.4f} nats"
        gain = "none: no mix keeps the guards" if self.gain is None else f"{self.gain:+.4f}"
        text = (
            f"after {self.replications} replications: typical error {self.precision:.4f} nats for "
            f"a dose; predicted gain {gain}, expected regret {regret}"
        )
        names = [f"{name} ({share:.1%})" for name, share in list(self.undecided.items())[:3]]
        return text + (f"; most open: {', '.join(names)}" if names else "")


def judge_round(
    matrices: Mapping[str, EffectMatrix],
    solve: SolveConfig,
    counts: Mapping[str, int],
    tokens: Mapping[str, float] | None,
    *,
    replications: int,
    trained_tokens: int,
    tuner_hours: float,
    seed: int,
) -> Round:
    """Evaluates what the replications so far tell about the mix.

    Args:
        matrices: by direction, of all replications so far.
        solve: configuration of the mix.
        counts: train rows of each category.
        tokens: mean response tokens of an example by category, if the budget is in tokens.
        replications: so far.
        trained_tokens: so far.
        tuner_hours: so far.
        seed: of the draws.
    """
    problem = mix_problem(solve, matrices, counts, tokens)
    options = mix_options(solve, is_believed=True)
    try:
        regret = expected_regret(problem, options, num_draws=NUM_DRAWS, seed=seed)
    except InfeasibleMixError:
        regret = None
    undecided = {} if regret is None else regret.undecided
    largest = sorted(undecided.items(), key=lambda item: (-item[1], item[0]))[:5]
    return Round(
        replications=replications,
        trained_tokens=trained_tokens,
        tuner_hours=tuner_hours,
        precision=typical_error(matrices),
        gain=None if regret is None else regret.gain,
        regret=None if regret is None else regret.known_value,
        regret_error=0.0 if regret is None else regret.error,
        undecided=dict(largest),
    )


def reason_to_stop(
    rounds: list[Round], auto: AutoConfig, spent_tokens: int = 0, spent_hours: float = 0.0
) -> str | None:
    """The reason to stop after the last round, or None if the next round should begin.

    Args:
        rounds: so far; their costs include those of the rejected designs.
        auto: the limits.
        spent_tokens: tokens trained for designs that were tried and rejected.
        spent_hours: hours of training for them.
    """
    last = rounds[-1]
    is_precise = auto.precision is None or last.precision <= auto.precision
    is_settled = last.regret is not None and last.regret <= auto.regret
    if is_settled and is_precise:
        return f"enough: expected regret is at most auto.regret {auto.regret:g}" + (
            "" if auto.precision is None else f" and the error at most {auto.precision:g}"
        )
    if last.regret is None:
        unreached = "with the present effects no mix satisfies the guards (solve.guard)"
    elif is_settled:
        unreached = f"the error is {last.precision:.4f}, auto.precision asks for {auto.precision:g}"
    else:
        unreached = (
            f"the expected regret is {last.regret:.4f}, auto.regret asks for {auto.regret:g}"
        )
    # The next round costs the mean of the rounds of this design.
    more = 1.0 / last.replications
    next_tokens = last.trained_tokens + more * (last.trained_tokens - spent_tokens)
    next_hours = last.tuner_hours + more * (last.tuner_hours - spent_hours)
    if last.replications >= auto.max_replications:
        return f"auto.max_replications {auto.max_replications} reached: {unreached}"
    if auto.max_tokens is not None and next_tokens > auto.max_tokens:
        return f"the next round would exceed auto.max_tokens {auto.max_tokens:,}: {unreached}"
    if auto.max_tuner_hours is not None and next_hours > auto.max_tuner_hours:
        return (
            f"the next round would exceed auto.max_tuner_hours {auto.max_tuner_hours:g}: "
            f"{unreached}"
        )
    return None
