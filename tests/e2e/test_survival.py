"""Kill the driver and actors at work: the same numbers as an undisturbed run."""

import os
import signal
from pathlib import Path

import pytest
from disturbance import actors_of, results, started, wait_until
from small_job import job_config, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


def test_a_killed_driver_and_killed_actors_change_no_number(tmp_path: Path) -> None:
    """The short one: the influence stage alone, driver and both kinds of actors killed in it."""
    calm = job_config(tmp_path / "calm")
    result = run_job("run", str(calm), "--until", "curriculum")
    assert result.returncode == 0, result.stderr

    rough = job_config(tmp_path / "rough")
    units = tmp_path / "rough/run/influence"
    with started("run", str(rough), "--until", "curriculum") as (process, log):
        assert wait_until(lambda: any(units.glob("*/scores/*.parquet")), process, log)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(list(units.glob("*/scores/*.parquet")))
    assert 0 < done < 10, "the driver must die while there is work left"
    with started("run", str(rough), "--until", "curriculum") as (process, log):
        for name in ("Tuner", "Scorer"):
            assert wait_until(lambda name=name: actors_of(process, name), process, log), name
            for actor in actors_of(process, name)[:1]:
                actor.kill()
        assert process.wait(timeout=400) == 0, log.read_text()
    assert results(tmp_path / "rough/run") == results(tmp_path / "calm/run")
