"""Solve a mix: first the optimum and its prices, then the optimum nearest the base."""

import time

import numpy as np

from system.solve.assemble import assemble_mix
from system.solve.explain import read_prices, read_ranges
from system.solve.mix import Mix
from system.solve.model import Model, build_model, new_program
from system.solve.problem import MixOptions, MixProblem
from system.solve.program import Program
from system.solve.row_generation import GuardCuts, solve_with_cuts
from system.solve.tiebreak import nearest_optimum


def solve_mix(problem: MixProblem, options: MixOptions) -> Mix:
    """The best mix under the options' limits, with prices and ranges.

    Exact (HiGHS, simplex; branch and bound where counts are whole or categories limited) and
    deterministic: ties go to the mix nearest the base (``tiebreak.py``).

    Raises:
        ConfigError, DataError: options and problem that do not fit together.
        InfeasibleMixError: no mix satisfies all limits; names them and the smallest relaxations.
    """
    start = time.perf_counter()
    model = build_model(problem, options)
    return _solve_linear(model, start)


def linear_program(model: Model) -> tuple[Program, GuardCuts]:
    """The program of every objective that is a score per example: linear, concave, robust box."""
    program = new_program(model, cost_C=np.r_[model.score_add_S, -model.score_remove_S])
    return program, GuardCuts(model, -model.guard_T)


def _solve_linear(model: Model, start: float) -> Mix:
    program, guards = linear_program(model)
    point = solve_with_cuts(program, guards)
    prices = read_prices(model, program, point)
    ranges = read_ranges(model, program, point)
    nearest = nearest_optimum(model, program, point, [guards])
    return assemble_mix(
        model,
        x_C=nearest.x_C,
        gain=nearest.objective,
        prices=prices,
        ranges=ranges,
        start=start,
        iterations=program.iterations,
        rows=len(program.labels),
    )
