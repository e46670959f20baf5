"""`instructmix check`: forecasts what a run will take: runs, tokens, hours and disk space.

    corpus_stats.py  rows and token lengths of the corpus: exact, or estimated from a sample
    workload.py      tokens that each stage trains, scores and generates
    probe.py         a short timing of training and scoring on this machine
    hours.py         tokens per second, from the probe or from finished runs, and the wall time
    disk.py          largest disk space in use at one time
    forecast.py      combines all of them, and checks them against the limits of the user
    text.py          the forecast as text

A forecast starts no Ray and changes nothing in the run directory.
"""

from system.forecast.forecast import Forecast, RunState, make_forecast
from system.forecast.text import describe

__all__ = ["Forecast", "RunState", "describe", "make_forecast"]
