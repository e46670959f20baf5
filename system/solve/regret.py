"""What not knowing the effects better costs a mix: its expected regret.

The mix is chosen on estimated effects.  Were the true ones E' known, the best mix under the same
limits would be another, and the chosen one would fall short of it by

    regret(E') = max_w  value(w; E') - value(chosen; E')            in importance-weighted nats

Averaged over what the effects may be (independent normals around the estimates, with their standard
errors) this is the expected value of perfect information (Raiffa & Schlaifer 1961, chapter 4): no
measurement, however large, can be worth more.  It is near zero both when effects are known well and
when they are not, but no plausible value of them would change the mix.
"""

from dataclasses import dataclass, replace

import numpy as np

from system.errors import ConfigError, InfeasibleMixError
from system.solve.mix import Mix
from system.solve.model import build_model
from system.solve.problem import DoseCurve, MixOptions, MixProblem
from system.solve.solve import solve_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """The expected regret of a mix, in importance-weighted nats per response token."""

    gain: float
    """Expected gain of the mix over the base at the estimated effects."""
    value: float
    """Mean over the draws, >= 0; NaN where none of them allows any mix."""
    error: float
    """Monte Carlo standard error of `value`."""
    undecided: dict[str, float]
    """Category -> mean distance of its best count under a draw from its chosen count, as a share of
    the budget; categories that no draw moves are left out."""
    num_infeasible: int = 0
    """Draws under which no mix satisfies the guards together with the other limits: left out."""

    @property
    def known_value(self) -> float | None:
        """`value`, None where it is not known."""
        return None if np.isnan(self.value) else self.value


def expected_regret(
    problem: MixProblem, options: MixOptions, *, num_draws: int = 100, seed: int = 0
) -> Regret:
    """The expected regret of the mix that `solve_mix` chooses, counts taken as fractional.

    Args:
        problem: with standard errors.
        options: those of the mix; whoever knows the effects needs no robust objective, so draws are
            judged by `concave` (`linear` where adding and removing have one slope).
        num_draws: draws of the effects.
        seed: of the draws; equal seeds give equal answers.

    Raises:
        ConfigError: the problem has no standard errors; otherwise as `solve_mix`.
    """
    if num_draws < 1:
        raise ConfigError(f"the expected regret needs at least one draw, found {num_draws}")
    if problem.se_TS is None:
        raise ConfigError("the expected regret needs standard errors of the effects (--stderr)")
    options = replace(options, integer=False)
    chosen = solve_mix(problem, options)
    is_concave = _is_two_sided(problem) or problem.curve_add is not None
    known = replace(options, objective="concave" if is_concave else "linear")
    counts_S, base_S = _counts(chosen)
    regrets, distance_S = [], np.zeros(len(counts_S))
    rng = np.random.default_rng(seed)
    for _ in range(num_draws):
        drawn = _draw(problem, rng)
        try:
            best = solve_mix(drawn, known)
        except InfeasibleMixError:
            continue
        change_T = build_model(drawn, known).effects.change(
            np.maximum(counts_S - base_S, 0.0), np.maximum(base_S - counts_S, 0.0)
        )
        regrets.append(best.expected_gain - float(problem.importance_T @ change_T))
        distance_S += np.abs(_counts(best)[0] - counts_S)
    lengths_S = np.ones(len(counts_S))
    if options.unit == "tokens" and problem.tokens_S is not None:
        lengths_S = problem.tokens_S
    used = len(regrets)
    share_S = distance_S / max(used, 1) * lengths_S / chosen.budget
    return Regret(
        gain=chosen.expected_gain,
        # Guards may hold the best mix of a draw back where the chosen one, not knowing it, moved.
        value=max(float(np.mean(regrets)), 0.0) if used else float("nan"),
        error=float(np.std(regrets, ddof=1) / np.sqrt(used)) if used > 1 else 0.0,
        num_infeasible=num_draws - used,
        undecided={
            name: float(share)
            for name, share in zip(problem.categories, share_S, strict=True)
            if share > 0
        },
    )


def _is_two_sided(problem: MixProblem) -> bool:
    remove_TS = problem.effect_remove_TS
    return remove_TS is not None and not np.array_equal(remove_TS, problem.effect_add_TS)


def _draw(problem: MixProblem, rng: np.random.Generator) -> MixProblem:
    """The problem with effects that could be the true ones."""
    assert problem.se_TS is not None
    if problem.curve_add is not None and problem.curve_remove is not None:
        return replace(
            problem,
            curve_add=_drawn_curve(problem.curve_add, rng),
            curve_remove=_drawn_curve(problem.curve_remove, rng),
        )
    shape = problem.effect_add_TS.shape
    add_TS = problem.effect_add_TS + problem.se_TS * rng.standard_normal(shape)
    if not _is_two_sided(problem):
        return replace(problem, effect_add_TS=add_TS, effect_remove_TS=None)
    assert problem.effect_remove_TS is not None
    se_TS = problem.se_TS if problem.se_remove_TS is None else problem.se_remove_TS
    remove_TS = problem.effect_remove_TS + se_TS * rng.standard_normal(shape)
    return replace(problem, effect_add_TS=add_TS, effect_remove_TS=remove_TS)


def _drawn_curve(curve: DoseCurve, rng: np.random.Generator) -> DoseCurve:
    noise_KTS = curve.se_KTS * rng.standard_normal(curve.se_KTS.shape)
    return replace(curve, effect_KTS=curve.effect_KTS + noise_KTS)


def _counts(mix: Mix) -> tuple[np.ndarray, np.ndarray]:
    """[S] counts of the mix and of its base."""
    return (
        np.array([item.count for item in mix.categories]),
        np.array([item.base for item in mix.categories]),
    )
