"""One driver at a time, and what it commits after it lost the lease is no result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.overview import describe_status
from system import rundir, storage
from system.errors import DataError, RunBusyError
from system.rundir import RunDir, StageRecord


def record(attempt: str, seconds: float = 1.0) -> StageRecord:
    return StageRecord(
        stage="solve",
        fingerprint=attempt,
        inputs={},
        outputs={},
        counts={},
        lines=(),
        seconds=seconds,
        finished="2026-01-01T00:00:00+00:00",
        versions={},
    )


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://lease-{tmp_path.name}"


def lease_of(uri: str) -> dict[str, Any]:
    return storage.read_json(f"{uri}/lease.json")


@contextlib.contextmanager
def taken_over(uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    """Another driver takes the lease, for which the one before was silent for too long."""
    other = RunDir(uri)
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "LEASE_SECONDS", -1.0)
        lease = other.lease()
        lease.__enter__()
    try:
        yield other
    finally:
        lease.__exit__(None, None, None)


def test_every_driver_has_a_higher_epoch(uri: str) -> None:
    for epoch in (1, 2, 3):
        with RunDir(uri).lease():
            assert lease_of(uri)["epoch"] == epoch
    assert not storage.exists(f"{uri}/lease.json")
    storage.write_json(f"{uri}/lease.json", {**abroad(), "epoch": 7, "time": 0.0})
    with RunDir(uri).lease():
        assert lease_of(uri)["epoch"] == 8


def test_records_carry_the_epoch_and_stay_valid_for_later_drivers(uri: str) -> None:
    with (run_dir := RunDir(uri)).lease():
        run_dir.commit("mix", record("aa"))
        assert run_dir.read_record("mix") == replace(record("aa"), epoch=1)
    with (run_dir := RunDir(uri)).lease():
        found = storage.read_json(f"{uri}/epochs/00000002.json")["commits"]
        assert sorted(found) == ["mix/aa/record.json", "mix/record.json"]
        run_dir.commit("mix", record("bb"))
    with RunDir(uri).lease():
        pass
    assert RunDir(uri).read_record("mix") == replace(record("bb"), epoch=2)
    assert RunDir(uri).read_attempt_record("mix", "aa") == replace(record("aa"), epoch=1)


def test_a_driver_that_lost_the_lease_commits_and_deletes_nothing(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (paused := RunDir(uri)).lease():
        paused.commit("mix", record("aa"))
        with taken_over(uri, monkeypatch) as other:
            for action in (
                lambda: paused.commit("mix", record("bb")),
                lambda: paused.invalidate("mix", "aa"),
                paused.check_lease,
            ):
                with pytest.raises(RunBusyError, match=r"taken over.*epoch 1.*commits nothing"):
                    action()
            assert other.read_record("mix") == replace(record("aa"), epoch=1)
            assert other.read_attempt_record("mix", "bb") is None
    assert not storage.exists(f"{uri}/lease.json")


def test_a_driver_that_lost_the_lease_leaves_it_to_the_other_one(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = RunDir(uri).lease()
    paused.__enter__()
    with taken_over(uri, monkeypatch):
        paused.__exit__(None, None, None)
        assert lease_of(uri)["epoch"] == 2
        with pytest.raises(RunBusyError, match="in use"), RunDir(uri).lease():
            pass


def test_a_commit_that_was_under_way_at_the_takeover_is_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check came before the takeover, the write after it."""
    with (paused := RunDir(uri)).lease():
        paused.commit("mix", record("aa"))
        paused.commit("corpus", record("cc"))
        with taken_over(uri, monkeypatch) as other:
            with monkeypatch.context() as patch:
                patch.setattr(RunDir, "_has_lease", lambda *_: True)
                paused.commit("mix", record("bb"))
                paused.commit("corpus", record("cc", seconds=2.0))
            for reader in (other, RunDir(uri)):
                assert reader.read_record("mix") is None
                assert reader.read_attempt_record("mix", "bb") is None
                assert reader.read_record("corpus") is None
                assert reader.read_attempt_record("mix", "aa") == replace(record("aa"), epoch=1)
            other.commit("mix", record("aa"))
    # The driver after that must not take what was refused for a commit that it found.
    with RunDir(uri).lease():
        assert RunDir(uri).read_record("mix") == replace(record("aa"), epoch=2)
        assert RunDir(uri).read_record("corpus") is None


def test_a_heartbeat_survives_errors_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "HEARTBEAT_SECONDS", 0.01)
    write, failures = storage.write_json, []

    def fail_at_first(uri: str, value: object) -> None:
        if threading.current_thread().name == "lease" and len(failures) < 5:
            failures.append(uri)
            raise [OSError, RuntimeError][len(failures) % 2]("lost")
        write(uri, value)

    with RunDir(str(tmp_path)).lease():
        first = lease_of(str(tmp_path))["time"]
        monkeypatch.setattr(storage, "write_json", fail_at_first)
        wait_for(lambda: lease_of(str(tmp_path))["time"] != first)
    assert len(failures) == 5


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a driver; pytest's worker processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_heartbeat_never_renews_the_lease_of_another_driver_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: None
) -> None:
    uri = str(tmp_path)
    with (
        pytest.raises(RunBusyError, match="taken over"),
        RunDir(uri).lease(),
        taken_over(uri, monkeypatch),
    ):
        monkeypatch.setattr(rundir, "HEARTBEAT_SECONDS", 0.01)
        # The thread of the first driver has begun to wait for the usual time.
        assert lease_of(uri)["epoch"] == 2
        time.sleep(30.0)
        pytest.fail("the driver went on without a lease")


def test_one_of_many_drivers_that_start_together_gets_in(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a write takes: the slow one must not come back over the winner's."""
    write, number = RunDir._write_lease, iter(range(100))

    def slowly(self: RunDir, mine: Any) -> None:
        time.sleep(0.05 * next(number))
        write(self, mine)

    monkeypatch.setattr(RunDir, "_write_lease", slowly)
    together = threading.Barrier(8)

    def start(_: int) -> bool:
        together.wait()
        try:
            with RunDir(uri).lease():
                time.sleep(1.0)
                return True
        except RunBusyError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(start, range(8))) == 1


def abroad(seconds: float = 0.0) -> dict[str, Any]:
    """A lease of another machine, from a while ago."""
    host = f"not-{socket.gethostname()}"
    return {"token": "x", "host": host, "pid": 1, "time": time.time() - seconds}


def test_a_driver_whose_lease_is_not_written_yet_is_respected(tmp_path: Path) -> None:
    """It created its epoch first."""
    value = {"holder": {**abroad(), "epoch": 4}, "commits": {}}
    storage.write_json(f"{tmp_path}/epochs/00000004.json", value)
    with pytest.raises(RunBusyError, match="in use"), RunDir(str(tmp_path)).lease():
        pass
    value["holder"]["time"] -= 3600
    storage.write_json(f"{tmp_path}/epochs/00000004.json", value)
    with RunDir(str(tmp_path)).lease():
        assert lease_of(str(tmp_path))["epoch"] == 5


@pytest.mark.parametrize("here", [True, False])
def test_a_lease_from_the_future_is_free_unless_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    uri = f"{tmp_path}/lease.json"
    lease = abroad(-(10.0**8))
    if here:
        lease |= {"host": socket.gethostname(), "pid": os.getpid()}
    storage.write_json(uri, lease)
    monkeypatch.setattr(rundir, "HEARTBEAT_SECONDS", 0.01)
    with RunDir(str(tmp_path)).lease():
        assert lease_of(str(tmp_path))["pid"] == os.getpid()
    storage.write_json(uri, lease)
    beats = iter(range(1, 100))
    monkeypatch.setattr(
        rundir.time,
        "sleep",
        lambda _: storage.write_json(uri, lease | {"time": lease["time"] + next(beats)}),
    )
    with pytest.raises(RunBusyError, match="in use"), RunDir(str(tmp_path)).lease():
        pass


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "{}", "7", '"x"', "\x00\xff",
        *(
            json.dumps({"token": "x", "host": "h", "pid": 1, "time": 1.0} | changes)
            for changes in (
                {"pid": "1"}, {"pid": -1}, {"pid": 0}, {"pid": True}, {"pid": 10**30},
                {"time": None}, {"time": "now"}, {"time": float("nan")}, {"time": float("inf")},
                {"host": 3}, {"token": []}, {"epoch": "1"}, {"epoch": -1}, {"epoch": 1.5},
            )
        ),
    ],
)  # fmt: skip
def test_an_odd_lease_is_one_clear_error(tmp_path: Path, content: str) -> None:
    storage.write_bytes(f"{tmp_path}/lease.json", content.encode("latin-1"))
    storage.write_json(f"{tmp_path}/config.json", {})
    with pytest.raises(DataError, match=r"lease.json: expected the lease.*delete the file"):
        RunDir(str(tmp_path)).lease().__enter__()
    with pytest.raises(DataError, match=r"delete the file"):
        describe_status(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"holder": 1, "commits": []}'])
def test_an_odd_epoch_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    storage.write_bytes(f"{tmp_path}/epochs/00000003.json", content)
    with pytest.raises(DataError, match=r"00000003.json: expected the epoch"):
        RunDir(str(tmp_path)).read_record("mix")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "x": 2}'])
def test_an_odd_record_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    storage.write_bytes(f"{tmp_path}/mix/record.json", content)
    with pytest.raises(DataError, match=r"mix/record.json: expected a stage record.*--redo"):
        RunDir(str(tmp_path)).read_record("mix")
    with RunDir(str(tmp_path)).lease():
        pass  # `--redo` must be possible


def test_an_odd_lease_does_not_stop_the_driver_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "HEARTBEAT_SECONDS", 0.01)
    with (run_dir := RunDir(str(tmp_path))).lease():
        storage.write_bytes(f"{tmp_path}/lease.json", b"{}")
        wait_for(lambda: lease_of(str(tmp_path)).get("epoch") == 1)
        storage.delete(f"{tmp_path}/lease.json")
        run_dir.commit("mix", record("aa"))
        wait_for(lambda: storage.exists(f"{tmp_path}/lease.json"))
