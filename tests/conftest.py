"""Property tests try the same cases in every run, so that a change is judged by what it changed.

INSTRUCTMIX_NEW_CASES=1 pytest tests/unit tries new ones.
"""

import os

from hypothesis import settings

settings.register_profile("same-cases", derandomize=True)
settings.load_profile("default" if os.environ.get("INSTRUCTMIX_NEW_CASES") else "same-cases")
