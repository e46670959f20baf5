"""Kill the driver and actors at work: the same numbers as an undisturbed run."""

import os
import signal
from pathlib import Path

import pytest
from disturbance import actors_of, kill_driver_in, started, wait_until
from small_job import WholeRun, job_config, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3000)]

KILLED_STAGES = ("ingest", "model", "tag", "influence", "select", "train", "evaluate")


def test_a_killed_driver_and_killed_actors_change_no_number(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    """The short one: the influence stage alone, driver and both kinds of actors killed in it."""
    rough = whole_run.begin_another(tmp_path, "ingest", "model", "tag")
    units = tmp_path / "run/influence"
    with started("run", str(rough), "--until", "curriculum") as (process, log):
        assert wait_until(lambda: any(units.glob("*/scores/*.parquet")), process, log)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert "tag: already finished" in log.read_text()
    done = len(list(units.glob("*/scores/*.parquet")))
    assert 0 < done < 10, "the driver must die while there is work left"
    with started("run", str(rough), "--until", "curriculum") as (process, log):
        for name in ("Tuner", "Scorer"):
            assert wait_until(lambda name=name: actors_of(process, name), process, log), name
            for actor in actors_of(process, name)[:1]:
                actor.kill()
        assert process.wait(timeout=1200) == 0, log.read_text()
    whole_run.assert_same(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.long
def test_a_driver_killed_in_every_stage_ends_in_the_same_bytes(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    rough = job_config(tmp_path)
    killed = [stage for stage in KILLED_STAGES if kill_driver_in(stage, rough, 1.5)]
    assert {"ingest", "tag", "influence", "train", "evaluate"} <= set(killed), killed
    result = run_job("run", str(rough))
    assert result.returncode == 0, result.stderr
    whole_run.assert_same(tmp_path / "run")
    for file in (tmp_path / "run/selection/parts").glob("*"):
        same = whole_run.run_dir / "selection/parts" / file.name
        assert file.read_bytes() == same.read_bytes()
    assert not (tmp_path / "run/lease.json").exists()
