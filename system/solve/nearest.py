"""The mix nearest the base: what is left to choose when the measured effects are not believed."""

from dataclasses import replace

import numpy as np

from system.solve.mix import Mix
from system.solve.problem import MixOptions, MixProblem
from system.solve.solve import solve_mix


def nearest_mix(problem: MixProblem, options: MixOptions) -> Mix:
    """The base mix, or where it breaks a limit a mix that moves as little as the limits allow.

    ``options.move`` is not used. Guards are left out where something must move: they are limits on
    effects that are not believed. Among mixes of equal move the objective decides, and predictions
    are made with the effects as measured; a note says how much moved and why.

    Raises:
        ConfigError, DataError, InfeasibleMixError: as ``solve_mix``.
    """
    silent = replace(
        problem,
        effect_add_TS=np.zeros_like(problem.effect_add_TS),
        effect_remove_TS=None,
        se_TS=None,
        se_remove_TS=None,
        identifiable_TS=None,
        curve_add=None,
        curve_remove=None,
        guard_T=None,
    )
    limits = replace(options, objective="linear", guard=None, guard_nats=None, move=1.0)
    # Without effects every mix within the limits is optimal, and ties go to the nearest.
    least = solve_mix(silent, limits).moved
    if least == 0.0:
        return solve_mix(problem, replace(options, move=0.0))
    mix = solve_mix(
        replace(problem, guard_T=None),
        replace(options, guard=None, guard_nats=None, move=min(least * (1.0 + 1e-9), 1.0)),
    )
    note = (
        f"the base mix breaks a limit (groups or max_categories), so {mix.moved:.2%} of the budget "
        "moved, the least that the limits allow; guards were left out"
    )
    return replace(mix, notes=(note, *mix.notes))
