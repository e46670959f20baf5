"""Solve a mix, ask what-if questions of it, sweep the trust region."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from system.errors import ConfigError, InfeasibleMixError
from system.solve.assemble import assemble_mix
from system.solve.highs import ModelInfeasibleError
from system.solve.infeasible import infeasibility
from system.solve.mix import Mix
from system.solve.model import Model, build_model, shared_rows
from system.solve.objectives import (
    Outcome,
    score_program,
    solve_fractional,
    solve_scores,
)
from system.solve.problem import MixOptions, MixProblem
from system.solve.program import Program
from system.solve.segments import solve_curved
from system.solve.whole import solve_whole


def solve_mix(problem: MixProblem, options: MixOptions) -> Mix:
    """The best mix under the options' limits, with prices and ranges.

    Exact (HiGHS, simplex; branch and bound where counts are whole or categories limited) and
    deterministic: ties go to the mix nearest the base (``tiebreak.py``).

    Raises:
        ConfigError, DataError: options and problem that do not fit together.
        InfeasibleMixError: no mix satisfies all limits; names them and the smallest relaxations.
    """
    return MixSession(problem, options).mix


class MixSession:
    """A solved mix that stays open for what-if questions.

    The base mix w0 is held fixed in every question, so the differences are what the shadow prices
    foretell. Questions about a score-per-example objective are re-solved from the last basis.
    """

    def __init__(self, problem: MixProblem, options: MixOptions) -> None:
        start = time.perf_counter()
        self._model = build_model(problem, options)
        self._program: Program | None = None
        if _is_scored(options) and self._model.curve is None:
            self._program = score_program(self._model)
        self.mix = self._solve(self._model, start)

    def what_if(
        self,
        *,
        budget: float | None = None,
        move: float | None = None,
        move_budget: float | None = None,
        supply: Mapping[str, float] | None = None,
        guard: Mapping[str, float] | None = None,
    ) -> Mix:
        """The mix if some limits were different, all else (w0 included) as it is.

        Args:
            budget: in the unit of the options; the trust region stays as wide as it was.
            move: share of the *original* budget.
            move_budget: the trust region in budget units; excludes ``move``.
            supply: category to distinct examples.
            guard: target to what it may lose.

        Raises:
            ConfigError: an unknown name or a value out of range.
            InfeasibleMixError: no mix satisfies the new limits.
        """
        start = time.perf_counter()
        old = self._model
        if move is not None and move_budget is not None:
            raise ConfigError("move and move_budget say the same thing; give one of them")
        if move is not None:
            move_budget = move * old.budget
        new_budget = old.budget if budget is None else budget
        new_move = old.move_budget if move_budget is None else move_budget
        if not (np.isfinite(new_budget) and new_budget > 0 and new_move >= 0):
            raise ConfigError(
                f"what-if needs a budget > 0 and a move >= 0, found {budget} and {move_budget}"
            )
        guard_T = old.guard_T.copy()
        for name, loss in (guard or {}).items():
            guard_T[_position(old.problem.targets, name, "target", loss)] = loss
        model = replace(
            _with_supply(old, supply or {}, max(new_budget, old.budget)),
            options=replace(old.options, move=min(new_move / new_budget, 1.0)),
            budget=float(new_budget),
            move_budget=float(new_move),
            guard_T=guard_T,
        )
        return self._solve(model, start)

    def _solve(self, model: Model, start: float) -> Mix:
        try:
            outcome = self._outcome(model)
        except ModelInfeasibleError as error:
            raise infeasibility(model) from error
        return assemble_mix(model, outcome, start=start)

    def _outcome(self, model: Model) -> Outcome:
        if model.curve is not None:
            return solve_curved(model)
        if model.options.integer or model.options.max_categories is not None:
            return solve_whole(model)
        if self._program is not None:
            _refit(self._program, model)
            return solve_scores(model, self._program)
        return solve_fractional(model)


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePoint:
    """One point of the curve of predicted gain against the share moved."""

    move: float
    """Trust region allowed, share of the budget."""
    moved: float
    """Share of the budget that the mix does move."""
    objective_gain: float
    """In the objective's own terms."""
    gain: float
    """Expected, importance-weighted."""
    gain_se: float | None
    """Standard error; None without standard errors."""
    gain_low: float | None
    """gain - 1.96 standard errors."""
    gain_high: float | None
    move_price: float | None
    worst_change: float
    """Change of the target that does worst."""
    mix: Mix


def sweep_move(problem: MixProblem, options: MixOptions, moves: Sequence[float]) -> list[MovePoint]:
    """Predicted gain, with its band, for each trust region in ``moves`` (shares of the budget).

    Counts are fractional even where the options ask for whole ones: a curve needs no rounding.
    Moves at which no mix satisfies the other limits (groups, ``max_categories``) have no point.

    The prediction is linear in the measured effects and errs on the bright side: the mix is chosen
    on the same numbers. The band covers their standard errors only.

    Raises:
        ConfigError: a move outside [0, 1]; otherwise as ``solve_mix``.
    """
    if not moves:
        return []
    for move in moves:
        replace(options, move=move)
    found: dict[float, Mix] = {}
    try:
        session = MixSession(problem, replace(options, move=max(moves), integer=False))
        # From the widest on: where one trust region is too narrow, so are all narrower ones.
        for move in sorted(set(moves), reverse=True):
            found[move] = session.what_if(move=move)
    except InfeasibleMixError:
        pass
    return [_move_point(move, found[move]) for move in moves if move in found]


def _move_point(move: float, mix: Mix) -> MovePoint:
    se = mix.expected_gain_se
    return MovePoint(
        move=float(move),
        moved=mix.moved,
        objective_gain=mix.gain,
        gain=mix.expected_gain,
        gain_se=se,
        gain_low=None if se is None else mix.expected_gain - 1.96 * se,
        gain_high=None if se is None else mix.expected_gain + 1.96 * se,
        move_price=mix.move_price,
        worst_change=min(t.change for t in mix.targets),
        mix=mix,
    )


def _is_scored(options: MixOptions) -> bool:
    if options.integer or options.max_categories is not None:
        return False
    budgeted = options.objective == "robust" and options.uncertainty == "budget"
    return options.objective != "max-min" and not budgeted


def _with_supply(model: Model, supply: Mapping[str, float], most: float) -> Model:
    """The model with other supplies of some categories; w0 stays, so less may force moves."""
    ceiling_S, is_supply_S = model.ceiling_S.copy(), model.is_supply_S.copy()
    for name, stock in supply.items():
        j = _position(model.problem.categories, name, "category", stock)
        upper = np.inf if model.problem.upper_S is None else float(model.problem.upper_S[j])
        usable = stock * model.options.max_epochs
        ceiling_S[j], is_supply_S[j] = min(usable, upper), usable <= upper
    up_S = np.minimum(ceiling_S - model.base_S, model.cap_S)
    up_S = np.minimum(up_S, np.ceil(2.0 * most / model.length_S))
    forced_S = np.maximum(model.base_S - ceiling_S, 0.0)
    if np.any(forced_S > model.down_S):
        raise InfeasibleMixError(
            "the smaller supply asks for more examples to leave a category than its lower limit or "
            "cap allows"
        )
    return replace(
        model,
        ceiling_S=ceiling_S,
        is_supply_S=is_supply_S,
        up_S=np.maximum(up_S, 0.0),
        must_remove_S=forced_S,
    )


def _refit(program: Program, model: Model) -> None:
    """Give the bounds of ``model`` to a program built for another; its rows and basis stay."""
    S = model.num_sources
    program.set_column_bounds(
        np.r_[np.zeros(S), model.must_remove_S], np.r_[model.up_S, model.down_S]
    )
    labels, _, lower, upper = shared_rows(model)
    ends = {label: (low, high) for label, low, high in zip(labels, lower, upper, strict=True)}
    position = {name: i for i, name in enumerate(model.problem.targets)}
    lower_R, upper_R = program.row_lower_R.copy(), program.row_upper_R.copy()
    for row, label in enumerate(program.labels):
        if label in ends:
            lower_R[row], upper_R[row] = ends[label]
        elif label[0] == "guard":
            lower_R[row] = -model.guard_T[position[label[1]]]
    program.set_row_bounds(lower_R, upper_R)


def _position(names: tuple[str, ...], name: str, what: str, value: float) -> int:
    if name not in names:
        raise ConfigError(f"unknown {what} {name!r}; known: {list(names)[:8]}")
    if not value >= 0:
        raise ConfigError(f"the value for {what} {name!r} must be >= 0, found {value}")
    return names.index(name)
