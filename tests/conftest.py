"""Property tests try the same cases in every run, so that a change is judged by what it changed.

INSTRUCTMIX_NEW_CASES=1 pytest tests/unit tries new ones.
"""

import os

from hypothesis import settings

# Ray gives its workers a low priority. Beside another test they would wait for the CPU too long.
os.environ.setdefault("RAY_worker_niceness", "0")
# No deadline: how fast a machine is says nothing about what is tested.
settings.register_profile("same-cases", derandomize=True, deadline=None)
settings.register_profile("new-cases", deadline=None)
settings.load_profile("new-cases" if os.environ.get("INSTRUCTMIX_NEW_CASES") else "same-cases")
