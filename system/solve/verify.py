"""The last look: a mix that is handed out keeps every limit."""

import numpy as np

from system.errors import StageError
from system.solve.model import Model, shared_rows

_TOLERANCE = 1e-7


def check_limits(model: Model, u_S: np.ndarray, v_S: np.ndarray, count_S: np.ndarray) -> None:
    """Check a finished mix against every limit, from the limits' own definitions.

    Raises:
        StageError: a limit is broken by more than 1e-7 of its size: a mistake in the optimiser.
    """
    size = max(float(model.base_S.sum()), 1.0)
    broken = []
    if np.any(count_S < model.lower_S - _TOLERANCE * size):
        broken.append("a lower limit")
    if np.any(count_S > model.ceiling_S + _TOLERANCE * size):
        broken.append("a supply or upper limit")
    if np.any(np.maximum(u_S, v_S) > model.cap_S + _TOLERANCE * size):
        broken.append("a cap")
    labels, rows, lower, upper = shared_rows(model)
    value = rows @ np.r_[u_S, v_S]
    slack = _TOLERANCE * np.maximum(model.budget, size)
    for label, v, low, high in zip(labels, value, lower, upper, strict=True):
        if v < low - slack or v > high + slack:
            broken.append(" ".join(label))
    guarded = np.isfinite(model.guard_T)
    if guarded.any():
        change_T = model.effects.change(u_S, v_S)
        scale_T = np.maximum(np.abs(model.effects.add_TS).max(axis=1), 1e-300) * size
        if np.any((change_T < -model.guard_T - _TOLERANCE * scale_T)[guarded]):
            broken.append("a guard")
    limit = model.options.max_categories
    if limit is not None and int((count_S > _TOLERANCE * size).sum()) > limit:
        broken.append("max_categories")
    if model.options.integer and np.any(count_S != np.round(count_S)):
        broken.append("whole numbers")
    if broken:
        raise StageError(
            f"the solved mix breaks {', '.join(broken)}; this is a mistake in the optimiser or a "
            "problem beyond double precision: report the input"
        )
