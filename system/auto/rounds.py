"""When enough has been measured: `influence.estimator: auto`.

A round adds one replication of the design that was chosen (`system.auto.trial`).  After
each the mix is solved as the solve stage would, and its expected regret says what knowing the
effects better could still bring.  Measuring stops when that is less than the user cares for, or the
next round would break a budget.

A round measures all categories, settled ones too: the errors of all are pooled, and a run of a
weighing design speaks about all of them.
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
    """What is known after a number of replications."""

    replications: int
    trained_tokens: int
    """Of all rounds so far."""
    tuner_hours: float
    precision: float
    """Median standard error of the effect of a dose off the diagonal, nats per response token."""
    gain: float | None
    """Predicted gain of the mix; None where the effects as estimated so far allow none that keeps
    the guards (limits that contradict each other whatever the effects are refused before)."""
    regret: float | None
    """Expected regret of the mix, nats per response token; None where no draw of the effects allows
    a mix that keeps the guards."""
    regret_error: float
    """Its Monte Carlo standard error."""
    undecided: dict[str, float]
    """Category -> how far its count may still move, share of the budget; the largest five."""

    @property
    def line(self) -> str:
        """For a person."""
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
    """What the replications so far say about the mix.

    Args:
        matrices: by direction, of all replications so far.
        solve: how the mix will be solved.
        counts: train rows of each category.
        tokens: mean response tokens of an example, where the budget is in tokens.
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


def why_stop(
    rounds: list[Round], auto: AutoConfig, spent_tokens: int = 0, spent_hours: float = 0.0
) -> str | None:
    """The reason to end after the last round, or None where the next one should begin.

    Args:
        rounds: so far; their costs include what was spent before.
        auto: the limits.
        spent_tokens: of that, trained on for designs that were left.
        spent_hours: likewise.
    """
    last = rounds[-1]
    is_precise = auto.precision is None or last.precision <= auto.precision
    is_settled = last.regret is not None and last.regret <= auto.regret
    if is_settled and is_precise:
        return f"enough: the expected regret is at most auto.regret {auto.regret:g}" + (
            "" if auto.precision is None else f" and the error at most {auto.precision:g}"
        )
    if last.regret is None:
        unreached = "as far as the effects are known, no mix keeps the guards (solve.guard)"
    elif is_settled:
        unreached = f"the error is {last.precision:.4f}, auto.precision asks for {auto.precision:g}"
    else:
        unreached = (
            f"the expected regret is {last.regret:.4f}, auto.regret asks for {auto.regret:g}"
        )
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
