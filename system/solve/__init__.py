"""The optimiser: an exact, explained mix from measured effects (HiGHS)."""

from system.solve.mix import CategoryMix, GroupMix, Mix, Relaxation, SolverInfo, TargetMix
from system.solve.problem import GroupLimit, MixOptions, MixProblem
from system.solve.solve import MixSession, MovePoint, solve_mix, sweep_move

__all__ = [
    "CategoryMix",
    "GroupLimit",
    "GroupMix",
    "Mix",
    "MixOptions",
    "MixProblem",
    "MixSession",
    "MovePoint",
    "Relaxation",
    "SolverInfo",
    "TargetMix",
    "solve_mix",
    "sweep_move",
]
