"""Problems whose returns diminish."""

import numpy as np
from mix_reference import problem

from system.solve.problem import DoseCurve

DOSES = np.array([10.0, 30.0, 60.0])


def curved_problem(seed, *, S=4, T=4, is_concave=True, base=100.0, capped=False, **fields):
    """Random polylines through three doses either way; slopes fall where asked."""
    rng = np.random.default_rng(seed)
    slope_NTS = rng.normal(0.0, 1.0, (6, T, S)) + rng.normal(0.0, 2.0, (1, T, S))
    if is_concave:
        slope_NTS = -np.sort(-slope_NTS, axis=0)
    width_K = np.diff(DOSES, prepend=0.0)
    sides = {}
    for name, slope_KTS in (("curve_remove", slope_NTS[2::-1]), ("curve_add", slope_NTS[3:])):
        total_KTS = np.cumsum(slope_KTS * width_K[:, None, None], axis=0)
        effect_KTS = total_KTS / DOSES[:, None, None]
        dose_KS = np.repeat(DOSES[:, None], S, axis=1)
        if capped:
            dose_KS[2, 0] = dose_KS[1, 0]
            effect_KTS[2, :, 0] = effect_KTS[1, :, 0]
        se_KTS = rng.uniform(0.5, 2.0, (3, T, S)) / DOSES[:, None, None]
        sides[name] = DoseCurve(dose_KS=dose_KS, effect_KTS=effect_KTS, se_KTS=se_KTS)
    values = {
        "effect_remove_TS": sides["curve_remove"].effect_KTS[1],
        "se_TS": sides["curve_add"].se_KTS[1],
        **sides,
        **fields,
    }
    return problem(sides["curve_add"].effect_KTS[1], np.full(S, base), **values)
