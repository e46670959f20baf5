"""The optimiser: an exact, explained mix from measured effects (HiGHS).

Names are loaded on first use, so that the command line can build its help without the solver.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from system.solve.mix import CategoryMix, GroupMix, Mix, Relaxation, SolverInfo, TargetMix
    from system.solve.nearest import nearest_mix
    from system.solve.predict import MixPredictor, Promise
    from system.solve.problem import GroupLimit, MixOptions, MixProblem
    from system.solve.regret import Regret, expected_regret
    from system.solve.solve import MixSession, MovePoint, solve_mix, sweep_move

__all__ = [
    "CategoryMix",
    "GroupLimit",
    "GroupMix",
    "Mix",
    "MixOptions",
    "MixPredictor",
    "MixProblem",
    "MixSession",
    "MovePoint",
    "Promise",
    "Regret",
    "Relaxation",
    "SolverInfo",
    "TargetMix",
    "expected_regret",
    "nearest_mix",
    "solve_mix",
    "sweep_move",
]

_HOME = {
    "CategoryMix": "mix",
    "GroupLimit": "problem",
    "GroupMix": "mix",
    "Mix": "mix",
    "MixOptions": "problem",
    "MixPredictor": "predict",
    "MixProblem": "problem",
    "MixSession": "solve",
    "MovePoint": "solve",
    "Promise": "predict",
    "Regret": "regret",
    "Relaxation": "mix",
    "SolverInfo": "mix",
    "TargetMix": "mix",
    "expected_regret": "regret",
    "nearest_mix": "nearest",
    "solve_mix": "solve",
    "sweep_move": "solve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
