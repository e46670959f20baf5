"""Property tests try the same cases in every run, so that a change is judged by what it changed.

INSTRUCTMIX_NEW_CASES=1 pytest tests/unit tries new ones.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: how fast a machine is says nothing about what is tested.
settings.register_profile("same-cases", derandomize=True, deadline=None)
settings.register_profile("new-cases", deadline=None)
settings.load_profile("new-cases" if os.environ.get("INSTRUCTMIX_NEW_CASES") else "same-cases")

SHARED = {
    "tests/e2e/test_run.py": "whole run",
    "tests/e2e/test_survival.py": "whole run",
    "tests/ray/test_trainer.py": "undisturbed training",
    "tests/ray/test_trainer_failures.py": "undisturbed training",
}
"""Modules that share a session's fixture, which takes minutes."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Two processes (`-n 2 --dist loadgroup`) share modules between them, never one module.

    What a module starts once - a Ray, a vLLM engine, a run - is then still started once.
    """
    for item in items:
        path = Path(item.path).relative_to(config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group(SHARED.get(path, path)))
