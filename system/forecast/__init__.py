"""What a run is going to take, before it starts: runs, tokens, hours, disk.

    known.py     what there is to compute from: exact lengths, or a sample, or nothing yet
    workload.py  tokens that the stages train, score and generate
    probe.py     a short measurement of the proxy's training and scoring on this machine
    rates.py     tokens per second: of the probe, or of runs that this run directory has
    hours.py     from tokens and rates to wall time
    disk.py      what lies on the disk at once
    forecast.py  all of it; budgets       text.py  as lines for people

It starts no Ray and changes nothing in the run directory.
"""

from system.forecast.forecast import Forecast, Found, make_forecast
from system.forecast.text import describe

__all__ = ["Forecast", "Found", "describe", "make_forecast"]
