import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from system import storage
from system.errors import DataError, RunBusyError
from system.rundir import (
    RunDir,
    StageRecord,
    describe_change,
    fingerprint,
    flatten,
    shared_uri,
)


def record(attempt: str, **changes: object) -> StageRecord:
    values: dict = {
        "stage": "solve",
        "fingerprint": attempt,
        "inputs": {"solve.budget": 10},
        "outputs": {"mix": f"mix/{attempt}/mix.json"},
        "counts": {"categories": 2},
        "lines": ("moved 3 %",),
        "seconds": 1.5,
        "finished": "2026-01-01T00:00:00+00:00",
        "versions": {"highspy": "1.15.1"},
    }
    return StageRecord(**(values | changes))


def test_a_committed_record_is_read_back_unchanged(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.commit("mix", record("aa"))
    assert run_dir.read_record("mix") == record("aa")


def test_commit_links_outputs_to_the_committed_attempt(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    for attempt in ("aa", "bb"):
        storage.write_bytes(f"{tmp_path}/mix/{attempt}/mix.json", attempt.encode())
        run_dir.commit("mix", record(attempt))
    assert (tmp_path / "mix/mix.json").read_text() == "bb"
    assert not os.readlink(tmp_path / "mix/mix.json").startswith("/"), "a run may be moved"


def test_an_attempt_without_record_is_no_result(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/mix/aa/mix.json", b"x")
    assert RunDir(str(tmp_path)).read_record("mix") is None


def test_an_earlier_finished_attempt_is_found_again(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.commit("mix", record("aa"))
    run_dir.commit("mix", record("bb"))
    assert run_dir.read_attempt_record("mix", "aa") == record("aa")


def test_invalidate_forgets_record_and_attempt(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.commit("mix", record("aa"))
    shared = shared_uri(run_dir.attempt_uri("mix", "aa"))
    storage.write_bytes(f"{shared}/unit.json", b"{}")
    run_dir.invalidate("mix", "aa")
    assert not storage.exists(shared), "again means again: nothing may be found"
    assert run_dir.read_record("mix") is None
    assert run_dir.read_attempt_record("mix", "aa") is None


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/mix/record.json", {"format": 99})
    with pytest.raises(DataError, match="99"):
        RunDir(str(tmp_path)).read_record("mix")


def test_fingerprint_depends_on_values_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_changes_are_named() -> None:
    text = describe_change({"a.b": 1, "c": 2, "d": 0}, {"a.b": 3, "c": 2, "e": 0})
    assert text == 'a.b 1 -> 3, d 0 -> "(absent)", e "(absent)" -> 0'


def test_flatten_names_leaves() -> None:
    assert flatten("a", {"b": {"c": 1}, "d": [2]}) == {"a.b.c": 1, "a.d": [2]}


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    with (
        run_dir.lease(),
        pytest.raises(RunBusyError, match=str(os.getpid())),
        RunDir(str(tmp_path)).lease(),
    ):
        pass
    with run_dir.lease():
        pass  # free again


def test_the_lease_of_a_dead_driver_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from system.rundir import RunDir\n"
        "lease = RunDir(sys.argv[1]).lease()\n"
        "lease.__enter__()\n"
        "os._exit(9)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert process.returncode == 9
    assert (tmp_path / "lease.json").exists()
    with RunDir(str(tmp_path)).lease():
        holder = storage.read_json(f"{tmp_path}/lease.json")
        assert holder["pid"] == os.getpid()


def test_a_fresh_lease_of_another_host_is_respected_and_an_old_one_is_not(tmp_path: Path) -> None:
    lease = {"token": "x", "host": f"not-{socket.gethostname()}", "pid": 1, "time": time.time()}
    storage.write_json(f"{tmp_path}/lease.json", lease)
    with pytest.raises(RunBusyError), RunDir(str(tmp_path)).lease():
        pass
    storage.write_json(f"{tmp_path}/lease.json", lease | {"time": time.time() - 3600})
    with RunDir(str(tmp_path)).lease():
        pass


def test_drivers_that_start_together_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    """Both found the directory free; the second one to write has it, the first one must stop."""
    rival = {"token": "x", "host": f"not-{socket.gethostname()}", "pid": 1}

    def write_after_the_other(seconds: float) -> None:
        storage.write_json(f"{tmp_path}/lease.json", rival | {"time": time.time()})

    monkeypatch.setattr("system.rundir.time.sleep", write_after_the_other)
    with pytest.raises(RunBusyError), RunDir(str(tmp_path)).lease():
        pass
    assert storage.read_json(f"{tmp_path}/lease.json")["token"] == "x"


def test_the_lease_is_kept_fresh(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("system.rundir.HEARTBEAT_SECONDS", 0.02)
    with RunDir(str(tmp_path)).lease():
        first = storage.read_json(f"{tmp_path}/lease.json")["time"]
        deadline = time.monotonic() + 30.0
        while storage.read_json(f"{tmp_path}/lease.json")["time"] == first:
            assert time.monotonic() < deadline, "the lease was written once and never again"
            time.sleep(0.02)


def test_a_kill_within_a_commit_leaves_an_attempt_that_is_found_again(
    tmp_path: Path, monkeypatch
) -> None:
    """The attempt's own record comes first: a stage never points to an attempt without one."""
    run_dir = RunDir(str(tmp_path))
    write, written = storage.write_json, []

    def killed_before_the_second(uri: str, value: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(uri)
        write(uri, value)

    monkeypatch.setattr("system.rundir.storage.write_json", killed_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_dir.commit("mix", record("aa"))
    assert run_dir.read_record("mix") is None
    assert run_dir.read_attempt_record("mix", "aa") == record("aa")
