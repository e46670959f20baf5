"""What the measured effects promise for any counts, solved or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from system.solve.model import build_model
from system.solve.problem import MixOptions, MixProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A predicted gain."""

    value: float
    se: float | None
    """Of the effects it is made of; None where these have no errors."""


class MixPredictor:
    """Gains by the slopes (or curves) with which a mix is solved, without its pessimism.

    ``counts`` are moves from the base mix w0, however large: what lies beyond the limits of the
    solver, as equal shares mostly do, extrapolates.  For the solved mix the gain is its own
    ``expected_gain``.
    """

    def __init__(self, problem: MixProblem, options: MixOptions) -> None:
        self._model = build_model(problem, options)
        effects = self._model.effects
        self._is_two_sided = self._model.curve is not None or not np.array_equal(
            effects.nominal_add_TS, effects.nominal_remove_TS
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """What effects were measured on."""
        return self._model.problem.targets

    def gain(
        self,
        counts: Sequence[Mapping[str, float]],
        against: Sequence[Mapping[str, float]],
        weights: Mapping[str, float],
    ) -> Promise:
        """Predicted gain of some counts over others, weighted over targets.

        The error takes sources as independent and the errors of one source on all targets as in
        step, like that of a solved mix.  What both mixes move alike cancels.  Where adding and
        removing were measured apart, their errors add up.

        Args:
            counts: category -> examples of one pass; of several, the mean of their gains.
            against: the same for the other mix.
            weights: target -> weight; targets left out do not count.
        """
        problem, effects = self._model.problem, self._model.effects
        weight_T = np.array([weights.get(name, 0.0) for name in problem.targets])
        add_S, remove_S, value = self._model.zeros(), self._model.zeros(), 0.0
        for sign, mixes in ((1.0, counts), (-1.0, against)):
            for mix in mixes:
                u_S, v_S = self._moves(mix)
                change_T = effects.change(u_S, v_S, nominal=True)
                value += sign * float(weight_T @ change_T) / len(mixes)
                add_S += sign * u_S / len(mixes)
                remove_S -= sign * v_S / len(mixes)
        if problem.se_TS is None:
            return Promise(value=value, se=None)
        se_remove_TS = problem.se_TS if problem.se_remove_TS is None else problem.se_remove_TS
        add_S, remove_S = add_S * (weight_T @ problem.se_TS), remove_S * (weight_T @ se_remove_TS)
        if self._is_two_sided:
            add_S, remove_S = np.abs(add_S), np.abs(remove_S)
        return Promise(value=value, se=float(np.linalg.norm(add_S + remove_S)))

    def _moves(self, counts: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        names = self._model.problem.categories
        count_S = np.array([counts[name] for name in names], dtype=np.float64)
        move_S = count_S - self._model.base_S
        return np.maximum(move_S, 0.0), np.maximum(-move_S, 0.0)
