"""The whole run that several modules look at: made once a session."""

from __future__ import annotations

import pytest
from small_job import WholeRun, job_config, run_job


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """From raw files to the report on a local Ray; nothing disturbed it."""
    config = job_config(tmp_path_factory.mktemp("whole"))
    return WholeRun.of(config, run_job("run", str(config)))
